"""Copies of a picture, cropped, mirrored, lit otherwise, noisy and stored as JPEG: found; pictures
that look alike: not.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.detection import picture_copies
from bezoar.detection.corpus import keep_lists
from bezoar.detection.detectors import duplicates
from bezoar.detection.picture_copies import HALF, SCALES, SIDE, WINDOW

CPU = SimpleNamespace(device=torch.device("cpu"), text=True)


def pictures(n: int, seed: int = 0) -> np.ndarray:
    """Blurred noise with some edges, uint8 (n, 3, SIDE, SIDE)."""
    rng = np.random.default_rng(seed)
    noise = scipy.ndimage.gaussian_filter(rng.normal(0, 1, (n, 3, SIDE, SIDE)), (0, 0, 1.5, 1.5))
    x = 128 + 150 * noise
    x[:, :, 8:18, 10:25] += rng.uniform(-60, 60, (n, 3, 1, 1))
    return x.clip(0, 255).astype(np.uint8)


def crop(image: np.ndarray, top: float, left: float, side: float) -> np.ndarray:
    """Cut a square out of uint8 (3, SIDE, SIDE) and scale it to the image's size."""
    picture = Image.fromarray(image.transpose(1, 2, 0))
    box = (left, top, left + side, top + side)
    cut = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
    return np.asarray(cut).transpose(2, 0, 1)


def test_the_place_and_scale_of_a_crop_are_found() -> None:
    image = pictures(1)[0]
    for top, left, side in ((0, 0, 32), (4, 1, 28), (2, 4.5, 27), (0, 3, 29)):
        copy = crop(image, top, left, side)
        spectra = picture_copies.Spectra.of(image[None])
        correlation, places = spectra.correlate(
            np.zeros(1, np.int64), copy[None].astype(np.float32)
        )
        assert correlation[0] > 0.9
        middle = [(top + side / 2) / SIDE, (left + side / 2) / SIDE]
        assert np.exp(places[0, 0]) == pytest.approx(side / SIDE, abs=0.06)
        assert places[0, 1:] == pytest.approx(middle, abs=0.05)
        first, second = image[None].astype(np.float32), copy[None].astype(np.float32)
        fit, places = picture_copies.align(first, second, places)
        assert fit[0] > 0.98
        assert np.exp(places[0, 0]) == pytest.approx(side / SIDE, abs=0.01)
        assert places[0, 1:] == pytest.approx(middle, abs=0.006)
        whole, detail = picture_copies.compare_overlap(first, second, places)
        assert whole[0] > 0.98 and detail[0] > 0.95


def test_correlation_is_the_plain_one() -> None:
    """Every scale and place in a loop."""
    x = pictures(2, seed=1).astype(np.float32)
    small = picture_copies.halve(x)
    border, window = (HALF - WINDOW // 2) // 2, WINDOW // 2
    middle = small[1, :, border : border + window, border : border + window].astype(np.float64)
    middle -= middle.mean((1, 2), keepdims=True)
    best = -1.0
    for scale in SCALES:
        side = round(HALF * scale)
        weights = picture_copies.resizing_weights(HALF, side).astype(np.float64)
        scaled = weights @ small[0] @ weights.T
        for i, j in np.ndindex(side - window + 1, side - window + 1):
            piece = scaled[:, i : i + window, j : j + window]
            piece = piece - piece.mean((1, 2), keepdims=True)
            best = max(best, (piece * middle).sum() / np.sqrt((piece**2).sum() * (middle**2).sum()))
    spectra = picture_copies.Spectra.of(pictures(2, seed=1))
    correlation, _ = spectra.correlate(np.zeros(1, np.int64), x[1:])
    assert correlation[0] == pytest.approx(best, abs=1e-4)


def test_windows_are_read_as_scipy_reads_them() -> None:
    x = pictures(3, seed=2).astype(np.float32)
    places = np.array([[0, 0.5, 0.5], [0.1, 0.42, 0.55], [-0.1, 0.3, 0.75]], np.float32)
    read = picture_copies.read_windows(x, places, WINDOW)
    steps = np.arange(WINDOW) - (WINDOW - 1) / 2
    for n, (log, row, column) in enumerate(places.astype(np.float64)):
        rows, columns = (SIDE * at - 0.5 + np.exp(log) * steps for at in (row, column))
        grid = np.stack(np.meshgrid(rows, columns, indexing="ij"))
        for channel in range(3):
            expected = scipy.ndimage.map_coordinates(x[n, channel], grid, order=1, mode="nearest")
            assert read[n, channel] == pytest.approx(expected, abs=0.01)


def test_sums_weights_and_detail_are_the_plain_ones() -> None:
    x = pictures(2, seed=3)[:, :, :9, :11].astype(np.float32)
    sums = picture_copies.sum_windows(x, 4)
    for i, j in np.ndindex(6, 8):
        assert sums[:, :, i, j] == pytest.approx(
            x[:, :, i : i + 4, j : j + 4].sum((2, 3)), rel=1e-6
        )
    assert np.array_equal(picture_copies.resizing_weights(16, 16), np.eye(16))
    halves = picture_copies.resizing_weights(16, 8)
    assert halves.sum(1) == pytest.approx(1) and halves[3, 6] == halves[3, 7] == halves[3].max()
    mean = scipy.ndimage.uniform_filter(x, (1, 1, 5, 5), mode="nearest")
    assert picture_copies.blur(x, 5) == pytest.approx(mean, abs=1e-3)


def test_what_two_pictures_have_in_common_is_the_plain_one() -> None:
    """A whole number of pixels apart: the overlap is a slice of both."""
    x = pictures(1, seed=5).astype(np.float32)
    moved = np.roll(x, (-4, -6), axis=(2, 3))
    moved[:, :, -4:], moved[:, :, :, -6:] = 0, 255  # what the first does not have
    places = np.array([[0, (16 + 4) / 32, (16 + 6) / 32]], np.float32)
    whole, middle = picture_copies.compare_overlap(x, moved, places)
    read = np.pad(x, [(0, 0), (0, 0), (0, 4), (0, 6)], mode="edge")[:, :, 4:, 6:]
    for k, found in ((None, whole), (7, middle)):
        parts = []
        for picture in (read, moved):
            smooth = scipy.ndimage.uniform_filter(picture, (1, 1, 3, 3), mode="nearest")
            if k is None:
                part = smooth[:, :, :28, :26]
                part = part - part.mean((2, 3), keepdims=True)
            else:
                blurred = scipy.ndimage.uniform_filter(picture, (1, 1, k, k), mode="nearest")
                part = (smooth - blurred)[:, :, :28, :26]
            parts.append(part.ravel().astype(np.float64))
        expected = parts[0] @ parts[1] / np.sqrt((parts[0] @ parts[0]) * (parts[1] @ parts[1]))
        assert found[0] == pytest.approx(expected, abs=1e-4)


def test_least_squares_find_the_moves() -> None:
    rng = np.random.default_rng(0)
    parts = rng.normal(0, 9, (4, 4, 300)).astype(np.float32)
    moves = rng.uniform(-0.04, 0.04, (4, 3)).astype(np.float32)
    target = 1.3 * (parts[:, 0] + np.einsum("pk,pkd->pd", moves, parts[:, 1:]))
    assert picture_copies.solve_moves(parts, target) == pytest.approx(moves, abs=1e-3)


def test_copies_are_found_and_flat_or_foreign_pictures_are_not() -> None:
    x = pictures(40, seed=4)
    x[20] = crop(x[0], 2, 1, 28)
    x[21] = (crop(x[1], 0, 3, 29)[..., ::-1] * 0.8 + 20).astype(np.uint8)
    x[22:24] = 77
    first = np.array([0, 20, 1, 1, 22, *range(2, 19)])
    second = np.array([20, 0, 21, 21, 23, *range(3, 20)])
    mirrored = np.zeros(len(first), bool)
    mirrored[2] = True
    found = picture_copies.find_copies(x, first, second, mirrored)
    assert found.tolist() == [True, True, True, *[False] * 19]
    order = np.random.default_rng(0).permutation(len(first))
    again = picture_copies.find_copies(x, first[order], second[order], mirrored[order])
    assert np.array_equal(again, found[order])
    none = np.zeros(0, np.int64)
    assert not len(picture_copies.find_copies(x, none, none, none.astype(bool)))


def scenes_with_copies(count: int, victims: int, copies: int) -> tuple[Pairs, np.ndarray]:
    """Scenes, and altered copies of some of them with captions of other scenes; which are
    copies.
    """
    scenes = registry.make("data", f"scenes:count={count}")()
    rows = np.repeat(np.arange(victims), copies)
    ids = tuple(f"{scenes.ids[row]}+poison{i}" for i, row in enumerate(rows))
    altered = registry.make("trigger", "augment")(scenes.images[rows], ids)
    added = replace(
        scenes.take(rows), images=altered, ids=ids, captions=scenes.captions[-len(rows) :]
    )
    return Pairs.concat([scenes, added]), np.arange(count + len(rows)) >= count


def test_altered_copies_of_scenes_are_raised_and_scenes_are_not() -> None:
    pairs, truth = scenes_with_copies(800, 3, 8)
    scores = registry.make("detector", "duplicates")(CPU, pairs)
    assert scores.raised is not None and scores.groups is not None
    raised, groups = scores.raised.numpy(), scores.groups.numpy()
    assert raised[truth].mean() > 0.6
    clean = raised & ~truth
    assert clean[3:].sum() == 0, "the victims themselves may be"
    assert len(np.unique(groups[raised])) >= 2
    assert (scores.values.numpy()[~raised] < scores.values.numpy()[raised].min()).all()
    before = registry.make("detector", "duplicates:likeness=1")(CPU, pairs)
    assert before.raised is not None and before.raised.numpy()[truth].mean() < 0.4


def test_links_of_a_chain_or_a_star_are_not_enough() -> None:
    none = np.zeros(9, np.int64)
    star = np.array([0, 0, 0]), np.array([1, 2, 3])
    assert not duplicates.count_links(none, *star)[1:].max() > 1
    assert duplicates.count_links(none, *star)[0] == 0
    ring = np.array([4, 5, 6, 4]), np.array([5, 6, 7, 7])
    assert (duplicates.count_links(none, *ring)[4:8] == 2).all()
    same = none.copy()
    same[:4] = 3
    assert duplicates.count_links(same, *star).tolist() == [6, 4, 4, 4, 0, 0, 0, 0, 0]


def test_equal_captions_and_small_groups_are_not_raised() -> None:
    pairs, truth = scenes_with_copies(300, 2, 8)
    captions = [
        pairs.captions[0] if bad else c for c, bad in zip(pairs.captions, truth, strict=True)
    ]
    captions[0] = captions[1] = captions[0]
    equal = registry.make("detector", "duplicates")(CPU, replace(pairs, captions=tuple(captions)))
    assert not equal.raised.any() and (equal.groups == -1).all()
    few = registry.make("detector", "duplicates:group=20")(CPU, pairs)
    assert not few.raised.any() and (few.groups >= 0).sum() > 9


@pytest.mark.parametrize("most", [1, 2])
def test_surplus_is_the_plain_one(most: int) -> None:
    groups = torch.from_numpy(np.random.default_rng(0).integers(-1, 5, 60))
    order = np.random.default_rng(1).permutation(60)[:50]
    scores = SimpleNamespace(groups=groups)
    counts: dict[int, int] = {}
    expected = []
    for row in order.tolist():
        group = int(groups[row])
        counts[group] = counts.get(group, 0) + 1
        if group >= 0 and counts[group] > most:
            expected.append(row)
    surplus = keep_lists.find_surplus([scores, SimpleNamespace(groups=None)], order, most)
    assert surplus.tolist() == sorted(expected)
    assert not len(keep_lists.find_surplus([SimpleNamespace(groups=None)], order, most))
