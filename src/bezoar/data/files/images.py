"""data.files.images"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bezoar.data.files.paths import read_file
from bezoar.data.files.skipped import Unreadable

IMAGE_PIXELS = 64_000_000  # one decoded image
SMALLEST = 8  # pixels a side; img2dataset and dead links leave 1x1 images behind
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"})
# What Pillow's decoders raise when they are given bytes that are not what they claim to be.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, OverflowError, IndexError, KeyError,
          TypeError, MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning)  # fmt: skip


def decode_image(image: bytes | Path, size: int | None) -> np.ndarray:
    """An encoded image -> uint8 (3, size, size), or (3, h, w) as it is when size is None. Raises Unreadable.

    The largest centred square, resized bicubically (antialiased): the shorter side becomes `size`, the longer is cut
    at both ends. A JPEG at least twice as large is scaled down by 2, 4 or 8 while it is decoded (`draft`).
    """
    try:
        content = image if isinstance(image, bytes) else read_file(image)
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > IMAGE_PIXELS:
                raise Unreadable(f"too many pixels: {width}x{height}")
            if min(width, height) < SMALLEST:
                raise Unreadable(f"smaller than {SMALLEST} pixels a side: {width}x{height}")
            if size is not None:
                opened.draft("RGB", (size, size))
            picture = opened.convert("RGB")
            if size is not None and picture.size != (size, size):
                picture = picture.crop(centred_square(*picture.size)).resize(
                    (size, size), Image.Resampling.BICUBIC
                )
    except UnidentifiedImageError as error:  # whose own words hold an address in memory
        raise Unreadable("not decodable: no image format that is known") from error
    except DECODING_ERRORS as error:
        raise Unreadable(
            f"not decodable: {' '.join(str(error).split())[:200] or type(error).__name__}"
        ) from error
    return np.asarray(picture).transpose(2, 0, 1)


def centred_square(width: int, height: int) -> tuple[int, int, int, int]:
    """The largest centred square, as Pillow's box (left, upper, right, lower)."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side
