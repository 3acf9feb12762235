"""Encoded images, decoded within bounds; only plain formats are opened."""

import contextlib
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from bezoar.data.files.image_parts import open_picture
from bezoar.data.files.paths import printable, read_file
from bezoar.data.files.skipped import Unreadable

IMAGE_PIXELS = 64_000_000  # the largest image that is decoded
MAX_SCANS = 64  # of a JPEG; progressive ones have about 10
MAX_SCANNED_PIXELS = 1 << 30  # its pixels times its scans
SLOW_DECODERS = ("ppm", "ppm_plain", "bmp_rle")  # Pillow's own, in Python: a second a megapixel
MAX_SLOW_PIXELS = 1 << 23
SMALLEST = 8  # pixels a side; img2dataset and dead links leave 1x1 images behind
MAX_TILE_PIXELS = 1 << 24  # of a strip or a tile of a TIFF, which is unpacked as a whole
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
# TIFFs hold pictures of other formats too, whose sizes may be others than the TIFF says.
TIFF_COMPRESSIONS = ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate")
# Tags of TIFF.
BITS, INTERPRETATION, TILE_WIDTH, TILE_LENGTH = 258, 262, 322, 323
WHITE_IS_ZERO = 0  # of INTERPRETATION
# How files of other formats begin: they are named, not read. Pillow would read AVIF, but its
# decoder takes the memory that the video stream inside asks for, whatever size the file states.
OTHER_FORMATS = (
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"<svg", "SVG"),
)
# How files of such formats are called; those of one key in a tar make it a record that is named.
OTHER_IMAGES = frozenset(("avif", "heic", "heif", "jxl", "jp2", "svg", "pnm", "pfm", "tga", "ico"))
# Pillow warns of tags that are broken, of which none is read, and of sizes that are refused.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
ORIENTATION = 0x0112  # the tag of EXIF
LONG = 4  # a type of EXIF: 32 bits
RAW_PROFILE = "Raw profile type exif"  # ImageMagick's EXIF of a PNG, in hexadecimal digits
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)(\d)')
# What turns a picture upright, by its orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise when they are given bytes that are not what they claim to be.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, OverflowError, IndexError,
    KeyError, TypeError, MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def decode_image(image: bytes | Path, size: int | None) -> np.ndarray:
    """Decode an image and cut it to a square; of several pictures in a file, the first.

    The largest centred square is resized bicubically with antialiasing. A JPEG at least twice as
    large as asked for is scaled down by 2, 4 or 8 while it is decoded (Pillow's `draft`). Pictures
    are turned as their EXIF or XMP says, 16 bits become 8, and transparency is ignored.

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
        with open_picture(content, FORMATS) as encoded:
            width, height = encoded.size
            if width * height > IMAGE_PIXELS:
                raise Unreadable(f"too many pixels: {width}x{height}")
            if min(width, height) < SMALLEST:
                raise Unreadable(f"smaller than {SMALLEST} pixels a side: {width}x{height}")
            check_effort(content, encoded)
            if size is not None:
                encoded.draft("RGB", (size, size))
            with _PIXELS.claimed(width * height):
                picture = to_rgb(encoded)
                if size is not None and picture.size != (size, size):
                    if picture.width != picture.height:  # a copy that a bomb would fill
                        picture = picture.crop(centred_square(*picture.size))
                    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
                picture = turn_upright(picture, encoded)
    except UnidentifiedImageError as error:  # its message holds an address in memory
        raise Unreadable(f"not decodable: {name_format(content)}") from error
    except DECODING_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Unreadable(f"not decodable: {reason}") from error
    return np.asarray(picture).transpose(2, 0, 1)


def read_shorter_side(image: bytes | Path) -> int:
    """The shorter side of an image in pixels, by its header. Raises Unreadable for what is none."""
    try:
        content = image if isinstance(image, bytes) else read_file(image)
        with open_picture(content, FORMATS) as encoded:
            return min(encoded.size)
    except DECODING_ERRORS as error:
        raise Unreadable("not decodable") from error


def check_effort(content: bytes, encoded: Image.Image) -> None:
    """Raise Unreadable for a picture that takes more work than its pixels: each scan of a JPEG
    costs a pass.
    """
    if isinstance(encoded, TiffImageFile):
        _check_tiff(encoded)
    is_slow = isinstance(encoded, ImageFile) and any(t[0] in SLOW_DECODERS for t in encoded.tile)
    if is_slow and encoded.width * encoded.height > MAX_SLOW_PIXELS:
        raise Unreadable(f"too many pixels: {encoded.width}x{encoded.height} in a slow format")
    # Within compressed data a byte 255 is followed by 0, so these two are the mark of a scan.
    scans = content.count(b"\xff\xda") if content.startswith(b"\xff\xd8") else 1
    if scans > MAX_SCANS or scans * encoded.width * encoded.height > MAX_SCANNED_PIXELS:
        raise Unreadable(f"too many scans: {scans} of {encoded.width}x{encoded.height} pixels")


def _check_tiff(encoded: TiffImageFile) -> None:
    """Raise Unreadable for a TIFF that unpacks to more than its pixels, or whose greys Pillow reads
    as they stand.
    """
    kind = encoded.info.get("compression")
    if kind not in TIFF_COMPRESSIONS:
        raise Unreadable(f"not decodable: TIFF with compression {printable(str(kind))} is not read")
    width, height = (encoded.tag_v2.get(tag, 1) for tag in (TILE_WIDTH, TILE_LENGTH))
    if not isinstance(width, int) or not isinstance(height, int):
        raise Unreadable("not decodable: a TIFF whose tiles have no size")
    if not 0 < width * height <= MAX_TILE_PIXELS:
        raise Unreadable(f"too many pixels: tiles of {width}x{height}")
    if encoded.mode[0] in "IF" and encoded.tag_v2.get(INTERPRETATION) == WHITE_IS_ZERO:
        raise Unreadable("not decodable: a TIFF of more than 8 bits in which white is 0")
    if encoded.mode == "I" or (encoded.mode[0] == "I" and encoded.tag_v2.get(BITS) != (16,)):
        raise Unreadable("not decodable: whole numbers of an unknown range")


class _Allowance:
    """An amount that threads share: who claims more than is left waits for the others.

    A claim that is larger than the whole amount is admitted alone.
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


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8 bits a channel, red, green and blue.

    Pillow cuts greys of 16 bits off at 255. Raises Unreadable for numbers of an unknown range.
    """
    if picture.mode.startswith("I"):  # 16 bits: I;16 of PNGs, I of PGMs
        greys = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((greys + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        values = np.asarray(picture)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise Unreadable("not decodable: floating-point pixels beyond 0..1")
        return Image.fromarray(np.round(values * 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "P" and "transparency" in picture.info:  # otherwise Pillow warns
        return picture.convert("RGBA").convert("RGB")
    return picture.convert("RGB")


def turn_upright(picture: Image.Image, encoded: Image.Image) -> Image.Image:
    """Turn a picture as its file says that it lies: in EXIF, or else in XMP."""
    orientation = _read_exif_orientation(encoded)
    xmp = encoded.info.get("xmp")
    if orientation is None and isinstance(xmp, bytes) and (stated := XMP_ORIENTATION.search(xmp)):
        orientation = int(stated[1])
    turn = TURNS.get(orientation or 1)
    return picture if turn is None else picture.transpose(turn)


def _read_exif_orientation(picture: Image.Image) -> int | None:
    """Read how EXIF says that a picture lies; None if it says nothing that can be read.

    Pillow's own reader parses every tag, and prints warnings of those that are broken. It has
    turned a TIFF already, and forgotten how that lay.
    """
    if isinstance(picture, TiffImageFile):
        return picture.getexif().get(ORIENTATION)
    try:
        exif = picture.info.get("exif")
        if isinstance(profile := picture.info.get(RAW_PROFILE), str) and exif is None:
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        if not isinstance(exif, bytes):
            return None
        exif = exif.removeprefix(b"Exif\0\0")
        order = ">" if exif.startswith(b"MM") else "<"
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, place)
            if tag == ORIENTATION:
                value = struct.unpack_from(order + ("I" if kind == LONG else "H"), exif, place + 8)
                return int(value[0])
    except (struct.error, ValueError):
        pass
    return None


def name_format(content: bytes, formats: Sequence[str] = FORMATS) -> str:
    """Say what an image is that cannot be read, as far as that is known, and which formats are."""
    start = content[:256].lstrip()
    for mark, name in OTHER_FORMATS:
        if start.startswith(mark):
            return f"{name} is not read; {', '.join(formats)} are"
    if content[4:8] == b"ftyp":
        return f"AVIF, HEIC or a video is not read; {', '.join(formats)} are"
    return "no image format that is known"


def centred_square(width: int, height: int) -> tuple[int, int, int, int]:
    """Return the largest centred square as Pillow's box (left, upper, right, lower)."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side
