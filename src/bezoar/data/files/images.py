"""Encoded images, decoded within bounds; only plain formats are opened."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bezoar.data.files.paths import read_file
from bezoar.data.files.skipped import Unreadable

IMAGE_PIXELS = 64_000_000  # the largest image that is decoded
MAX_SCANS = 64  # of a JPEG; progressive ones have about 10
MAX_SCANNED_PIXELS = 1 << 30  # its pixels times its scans
SMALLEST = 8  # pixels a side; img2dataset and dead links leave 1x1 images behind
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"})
# What Pillow's decoders raise when they are given bytes that are not what they claim to be.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, OverflowError, IndexError,
    KeyError, TypeError, MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def decode_image(image: bytes | Path, size: int | None) -> np.ndarray:
    """Decode an image and cut it to a square.

    The largest centred square is resized bicubically with antialiasing. A JPEG at least twice as
    large as asked for is scaled down by 2, 4 or 8 while it is decoded (Pillow's `draft`).

    Args:
        image: the encoded image, or its file.
        size: pixels a side; None keeps the image as it is.

    Returns:
        uint8 (3, size, size), or (3, H, W) if size is None.

    Raises:
        Unreadable: if it is no image, is too large or is smaller than SMALLEST.
    """
    try:
        content = image if isinstance(image, bytes) else read_file(image)
        with Image.open(io.BytesIO(content), formats=FORMATS) as encoded:
            width, height = encoded.size
            if width * height > IMAGE_PIXELS:
                raise Unreadable(f"too many pixels: {width}x{height}")
            if min(width, height) < SMALLEST:
                raise Unreadable(f"smaller than {SMALLEST} pixels a side: {width}x{height}")
            _check_scans(content, encoded)
            if size is not None:
                encoded.draft("RGB", (size, size))
            with _PIXELS.claimed(width * height):
                picture = encoded.convert("RGB")
                if size is not None and picture.size != (size, size):
                    if picture.width != picture.height:  # a copy that a bomb would fill
                        picture = picture.crop(centred_square(*picture.size))
                    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    except UnidentifiedImageError as error:  # its message holds an address in memory
        raise Unreadable("not decodable: no image format that is known") from error
    except DECODING_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Unreadable(f"not decodable: {reason}") from error
    return np.asarray(picture).transpose(2, 0, 1)


def _check_scans(content: bytes, encoded: Image.Image) -> None:
    """Raise Unreadable for a JPEG that would be decoded over and over: each scan costs a pass."""
    # Within compressed data a byte 255 is followed by 0, so these two are the mark of a scan.
    scans = content.count(b"\xff\xda") if encoded.format == "JPEG" else 1
    if scans > MAX_SCANS or scans * encoded.width * encoded.height > MAX_SCANNED_PIXELS:
        raise Unreadable(f"too many scans: {scans} of {encoded.width}x{encoded.height} pixels")


class _Allowance:
    """An amount that threads share: who claims more than is left waits for the others.

    Args:
        amount: of all claims together; a larger claim is admitted alone.
    """

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.in_use = 0
        self.condition = threading.Condition()

    @contextlib.contextmanager
    def claimed(self, amount: int) -> Iterator[None]:
        """Wait until `amount` is left, and give it back at the end."""
        with self.condition:
            self.condition.wait_for(lambda: not self.in_use or self.in_use + amount <= self.amount)
            self.in_use += amount
        try:
            yield
        finally:
            with self.condition:
                self.in_use -= amount
                self.condition.notify_all()


# However many cores there are, so many pixels are decoded at once, about 8 bytes each.
_PIXELS = _Allowance(IMAGE_PIXELS)
# A fork while a thread decodes would leave a child with claims that nobody gives back.
os.register_at_fork(after_in_child=lambda: _PIXELS.__init__(IMAGE_PIXELS))  # type: ignore[misc]


def centred_square(width: int, height: int) -> tuple[int, int, int, int]:
    """Return the largest centred square as Pillow's box (left, upper, right, lower)."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side
