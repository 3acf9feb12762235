"""Copies of pictures: the same but for a crop, a mirror, light, noise or JPEG.

Pictures are compared at SIDE x SIDE pixels. The middle of the second is laid over the first at the
place and scale where they correlate best: first over all places and SCALES at half the size, by
Fourier transforms; then by a few steps of Gauss and Newton at full size (Lucas, Kanade 1981). There
all that the two have in common is compared, noise smoothed away: as it is, and in its middle
frequencies, because pictures that are merely alike agree in their coarse parts alone. A correlation
does not see brightness and contrast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from bezoar.data.blocks import blocks

SIDE, HALF = 32, 16
SCALES = (1.19, 1.14, 1.09, 1.045, 1.0, 0.957, 0.917, 0.878, 0.84)  # of the first picture
WINDOW = 20  # side of the middle of the second picture
PADDED = 20  # side of the Fourier transforms; the first picture has at most 19 pixels there
STEPS = 3
CONTRAST = 1.0  # length of a vector of levels below which nothing is correlated
# Correlations from which a pair is looked at again, and from which it is one picture. Of 16,348
# pairs with like thumbnails among 20,000 scenes 12 are taken for copies, and of 10,771 among 6,000
# photographs two, which are one photograph; of pairs of copies (area of 70 % or more, light of 20
# %, noise of 6 levels, JPEG 60) 70 % and 99 % are. Scenes that lose pairs are those that are noisy.
COARSE, FITTING, WHOLE, MIDDLE = 0.82, 0.88, 0.96, 0.87
SMOOTHED, BLURRED = 3, 7  # sides of boxes: middle frequencies are between their means
PICTURES, PAIRS = 512, 256  # that are transformed, and compared, at a time
Floats = NDArray[Any]  # float32; float64 where it is between two steps
Rows = NDArray[np.int64]


def find_copies(
    pictures: NDArray[np.uint8], first: Rows, second: Rows, mirrored: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Tell which pairs of pictures are copies of one.

    Args:
        pictures: uint8 (M, 3, SIDE, SIDE).
        first, second: int64 (P,), rows of the pictures.
        mirrored: bool (P,), whether the second picture of a pair is taken mirrored.

    Returns:
        bool (P,).
    """
    are_copies = np.zeros(len(first), bool)
    by_first = np.argsort(first, kind="stable")
    rows, starts = np.unique(first[by_first], return_index=True)
    ends = np.append(starts[1:], len(first))
    for block in blocks(len(rows), PICTURES):
        spectra = Spectra.of(pictures[rows[block]])
        pairs = by_first[starts[block][0] : ends[block][-1]]
        for part in blocks(len(pairs), PAIRS):
            pair = pairs[part]
            second_pictures = pictures[second[pair]].astype(np.float32)
            turned = mirrored[pair, None, None, None]
            second_pictures = np.where(turned, second_pictures[..., ::-1], second_pictures)
            index = np.searchsorted(rows[block], first[pair])
            correlation, places = spectra.correlate(index, second_pictures)
            like = correlation >= COARSE
            if like.any():
                first_pictures = pictures[first[pair[like]]].astype(np.float32)
                aligned, places = align(first_pictures, second_pictures[like], places[like])
                fits = aligned >= FITTING
                if not fits.any():
                    continue
                like[like] = fits
                whole, middle = compare_overlap(
                    first_pictures[fits], second_pictures[like], places[fits]
                )
                are_copies[pair[like]] = (whole >= WHOLE) & (middle >= MIDDLE)
    return are_copies


@dataclass(frozen=True)
class Spectra:
    """Fourier transforms of M pictures of half the size."""

    # complex64 (M, scales, 3, PADDED, PADDED / 2 + 1), of each at every scale
    wholes: NDArray[np.complex64]
    # float32 (M, scales, PADDED, PADDED), 1 / length of the window that begins at a pixel, less its
    # channels' means; 0 where it does not lie inside
    inverse_lengths: Floats

    @staticmethod
    def of(pictures: NDArray[np.uint8]) -> Spectra:
        """Transform uint8 (M, 3, SIDE, SIDE)."""
        count, window = len(pictures), WINDOW // 2
        wholes = np.empty((count, len(SCALES), 3, PADDED, PADDED // 2 + 1), np.complex64)
        inverse = np.zeros((count, len(SCALES), PADDED, PADDED), np.float32)
        small = halve(pictures.astype(np.float32))
        for k, side in enumerate(_sides()):
            weights = resizing_weights(HALF, side)
            scaled = weights @ small @ weights.T  # (M, 3, side, side)
            wholes[:, k] = scipy.fft.rfft2(scaled, (PADDED, PADDED))
            sums = sum_windows(scaled, window)
            variance = (sum_windows(scaled * scaled, window) - sums * sums / window**2).sum(1)
            inside = side - window + 1
            inverse[:, k, :inside, :inside] = 1 / np.sqrt(np.maximum(variance, CONTRAST))
        return Spectra(wholes, inverse)

    def correlate(self, first: Rows, second: Floats) -> tuple[Floats, Floats]:
        """Correlate the middle of each second picture with all places and scales of the first.

        Args:
            first: int64 (P,), rows of the pictures that were transformed.
            second: (P, 3, SIDE, SIDE).

        Returns:
            The largest correlation, float32 (P,), and where it is, float32 (P, 3): the logarithm of
            the first picture's pixels in one of the second's, and the middle's row and column, in
            shares of the side.
        """
        middle = _centred(_middle(halve(second), WINDOW // 2))
        middle /= np.maximum(np.sqrt((middle * middle).sum((1, 2, 3), keepdims=True)), CONTRAST)
        spectrum = scipy.fft.rfft2(middle, (PADDED, PADDED)).conj()
        products = (self.wholes[first] * spectrum[:, None]).sum(2)
        correlations = scipy.fft.irfft2(products, (PADDED, PADDED)) * self.inverse_lengths[first]
        flat = correlations.reshape(len(first), -1)
        best = flat.argmax(1)
        scale, row, column = np.unravel_index(best, correlations.shape[1:])
        sides = np.array(_sides())[scale]
        half = WINDOW / 4
        places = np.log(HALF / sides), (row + half) / sides, (column + half) / sides
        return (
            flat[np.arange(len(flat)), best].astype(np.float32),
            np.stack(places, axis=1).astype(np.float32),
        )


def align(first: Floats, second: Floats, places: Floats) -> tuple[Floats, Floats]:
    """Lay the middle of each second picture over the first as well as that goes.

    Args:
        first, second: (P, 3, SIDE, SIDE).
        places: (P, 3), where to begin; see `Spectra.correlate`.

    Returns:
        The largest correlation of the windows, float32 (P,), and where it is, (P, 3).
    """
    target = _centred(_middle(second, WINDOW))
    steps = _steps(WINDOW)
    window = read_windows(first, places, WINDOW)
    best = correlate(_centred(window), target)
    for _ in range(STEPS):
        down, right = np.gradient(window, axis=(2, 3))
        growth = down * steps[:, None] + right * steps
        parts = [_centred(x).reshape(len(window), -1) for x in (window, growth, down, right)]
        moves = solve_moves(np.stack(parts, axis=1), target.reshape(len(target), -1))
        moves[:, 1:] *= np.exp(places[:, :1]) / SIDE
        moved = places + moves
        candidate = read_windows(first, moved, WINDOW)
        correlation = correlate(_centred(candidate), target)
        better = correlation > best
        best = np.where(better, correlation, best)
        places = np.where(better[:, None], moved, places)
        window = np.where(better[:, None, None, None], candidate, window)
    return best, places


def compare_overlap(first: Floats, second: Floats, places: Floats) -> tuple[Floats, Floats]:
    """Correlate what each two pictures have in common, smoothed, and its middle frequencies.

    Args:
        first, second: (P, 3, SIDE, SIDE).
        places: (P, 3), where the second lies on the first.

    Returns:
        The two correlations, float32 (P,) each.
    """
    rows, columns = (_pixels_at(places, axis, SIDE) for axis in (1, 2))  # (P, SIDE)
    inside = [(at >= 0) & (at <= SIDE - 1) for at in (rows, columns)]
    mask = (inside[0][:, :, None] & inside[1][:, None])[:, None].astype(np.float32)
    count = mask.sum((2, 3), keepdims=True)
    smoothed, middle = [], []
    for picture in (read_windows(first, places, SIDE), second):
        smooth = blur(picture, SMOOTHED)
        mean = (smooth * mask).sum((2, 3), keepdims=True) / np.maximum(count, 1)
        smoothed.append((smooth - mean) * mask)
        middle.append((smooth - blur(picture, BLURRED)) * mask)
    return correlate(*smoothed), correlate(*middle)


def solve_moves(parts: Floats, target: Floats) -> Floats:
    """Return the moves that bring a window nearer to its target, by least squares.

    parts: (P, 4, D), the window and its derivatives by scale, row and column. target: (P, D).

    Returns:
        float32 (P, 3): change of the logarithm of the scale, and of row and column in pixels.
    """
    products = (parts @ parts.transpose(0, 2, 1)).astype(np.float64)
    diagonal = np.einsum("pii->pi", products)
    products += np.eye(4) * (
        1e-3 * diagonal[:, None] + 1e-3
    )  # so that flat windows have a solution
    seen = (parts @ target[:, :, None]).astype(np.float64)
    weights = np.linalg.solve(products, seen)[..., 0]
    moves = weights[:, 1:] / np.maximum(weights[:, :1], 0.2)  # the first is the gain of the light
    bounded: Floats = moves.clip([-0.05, -1, -1], [0.05, 1, 1]).astype(np.float32)
    return bounded


def read_windows(pictures: Floats, places: Floats, side: int) -> Floats:
    """Read a window of each picture bilinearly, (P, 3, side, side), repeating the border."""
    (low_row, down), (low_column, right) = (
        _split_place(_pixels_at(places, axis, side)) for axis in (1, 2)
    )
    image = np.arange(len(pictures))[:, None]
    # Rows first, then columns; the axis that is read stands behind the picture's.
    by_row = pictures.transpose(0, 2, 1, 3)  # (P, y, 3, x)
    down = down[:, :, None, None]
    rows = by_row[image, low_row] * (1 - down) + by_row[image, low_row + 1] * down
    by_column = rows.transpose(0, 3, 2, 1)  # (P, x, 3, window)
    right = right[:, :, None, None]
    read = by_column[image, low_column] * (1 - right) + by_column[image, low_column + 1] * right
    windows: Floats = read.transpose(0, 2, 3, 1)
    return windows


def _pixels_at(places: Floats, axis: int, side: int) -> Floats:
    """Where the pixels of a window lie on its picture by rows (1) or columns (2): (P, side)."""
    at: Floats = places[:, axis, None] * SIDE + np.exp(places[:, :1]) * _steps(side) - 0.5
    return at


def _steps(side: int) -> Floats:
    """Return the pixels of a window, counted from its middle, float32 (side,)."""
    return (np.arange(side) - (side - 1) / 2).astype(np.float32)


def _split_place(place: NDArray[np.floating]) -> tuple[Rows, Floats]:
    """Split places, pixel coordinates, into the pixel before and the share of the one behind."""
    inside = place.clip(0, SIDE - 1)
    low = np.minimum(np.floor(inside), SIDE - 2)
    return low.astype(np.int64), (inside - low).astype(np.float32)


def halve(pictures: Floats) -> Floats:
    """Return (n, 3, SIDE, SIDE) at half the size, means of four pixels."""
    halved: Floats = pictures.reshape(-1, 3, HALF, 2, HALF, 2).mean((3, 5))
    return halved


def blur(pictures: Floats, side: int) -> Floats:
    """Return the mean over side x side pixels around each, of which the border is repeated."""
    radius = side // 2
    padded = np.pad(pictures, [(0, 0), (0, 0), (radius, radius), (radius, radius)], mode="edge")
    mean: Floats = sum_windows(padded, side) / side**2
    return mean


def sum_windows(x: Floats, side: int) -> Floats:
    """Sum all windows of `side` pixels, (n, c, h, w) -> (n, c, h - side + 1, w - side + 1)."""
    sums = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (1, 0), (1, 0)]).cumsum(2).cumsum(3)
    rows = sums[:, :, side:] - sums[:, :, :-side]
    windows: Floats = (rows[..., side:] - rows[..., :-side]).astype(np.float32)
    return windows


def resizing_weights(old: int, new: int) -> Floats:
    """Return the weights (new, old) of a linear resizing, antialiased where it makes smaller."""
    scale = old / new
    middles = (np.arange(new) + 0.5) * scale
    distance = abs(np.arange(old) + 0.5 - middles[:, None]) / max(1.0, scale)
    weights = np.clip(1 - distance, 0, None)
    shares: Floats = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return shares


def correlate(first: Floats, second: Floats) -> Floats:
    """Return the cosine of each pair (P, ...), float32 (P,)."""
    a, b = first.reshape(len(first), -1), second.reshape(len(second), -1)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: Floats = ((a * b).sum(1) / np.maximum(lengths, CONTRAST)).astype(np.float32)
    return cosines


def _sides() -> list[int]:
    """Return the side of a picture of half the size at every scale."""
    return [round(HALF * scale) for scale in SCALES]


def _middle(pictures: Floats, side: int) -> Floats:
    border = (pictures.shape[-1] - side) // 2
    return pictures[:, :, border : border + side, border : border + side]


def _centred(x: Floats) -> Floats:
    """Return (n, 3, h, w) less each channel's mean."""
    centred: Floats = x - x.mean((2, 3), keepdims=True)
    return centred
