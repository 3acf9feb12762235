"""Encoded images, decoded within bounds; only plain formats are opened."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bezoar.data.files.paths import read_file
from bezoar.data.files.skipped import Unreadable

IMAGE_PIXELS = 64_000_000  # the largest image that is decoded
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
            if size is not None:
                encoded.draft("RGB", (size, size))
            picture = encoded.convert("RGB")
            if size is not None and picture.size != (size, size):
                picture = picture.crop(centred_square(*picture.size)).resize(
                    (size, size), Image.Resampling.BICUBIC
                )
    except UnidentifiedImageError as error:  # its message holds an address in memory
        raise Unreadable("not decodable: no image format that is known") from error
    except DECODING_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Unreadable(f"not decodable: {reason}") from error
    return np.asarray(picture).transpose(2, 0, 1)


def centred_square(width: int, height: int) -> tuple[int, int, int, int]:
    """Return the largest centred square as Pillow's box (left, upper, right, lower)."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side
