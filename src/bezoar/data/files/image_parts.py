"""Which parts an encoded picture is made of: a file of millions of empty ones costs its reader
minutes or gigabytes.

Pillow walks through them in Python before it says how large the picture is, keeps them, and joins
those of EXIF, and cuts out comments, in a time that is the square of their number.
"""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import islice

from PIL import Image

from bezoar.data.files.skipped import Unreadable

MAX_PARTS = 2048  # that are no pixels; cameras write a few dozen
MAX_PART_BYTES = 16 << 20  # of all of them
MAX_STRIPS = 1 << 16  # of a TIFF
NETPBM_HEADER = 1 << 16  # bytes; Pillow reads it byte by byte, its comments too
JPEG, PNG, GIF, NETPBM = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"P"
PLAIN = (b"P1", b"P2", b"P3")  # forms of NETPBM that are text
# By their first bytes: the order of bytes, and the types of the count of entries and of offsets.
TIFFS = {
    b"II*\0": ("<", "H", "I"),
    b"MM\0*": (">", "H", "I"),
    b"II+\0": ("<", "Q", "Q"),
    b"MM\0+": (">", "Q", "Q"),
}
STRIP_OFFSETS, TILE_OFFSETS = 273, 324  # tags of TIFF


@contextmanager
def open_picture(content: bytes, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Open a picture that has no more parts than pictures have, by its header alone.

    Raises Unreadable, or what Pillow raises for a header that ends before its end.
    """
    sizes = list(islice(_part_sizes(content), MAX_PARTS + 1))
    if len(sizes) > MAX_PARTS or sum(sizes) > MAX_PART_BYTES:
        raise Unreadable(
            f"too many parts: {len(sizes)} or more of {sum(sizes)} bytes hold no pixels"
        )
    if (strips := _strip_count(content)) > MAX_STRIPS:
        raise Unreadable(f"too many parts: {strips} strips")
    if content.startswith(NETPBM):
        Image.open(BytesIO(content[:NETPBM_HEADER]), formats=formats).close()
    with Image.open(BytesIO(content), formats=formats) as picture:
        yield picture


def _part_sizes(content: bytes) -> Iterator[int]:
    """The bytes of each part before the pixels of a JPEG or a GIF, and of each that is none in a
    PNG or a text.
    """
    walkers = {JPEG: _segment_sizes, PNG: _chunk_sizes, GIF: _block_sizes}
    walkers |= dict.fromkeys(PLAIN, _comment_sizes)
    walk = next((walk for mark, walk in walkers.items() if content.startswith(mark)), None)
    with suppress(IndexError, struct.error):  # it breaks off, as the decoder will say
        yield from walk(content) if walk else ()


def _segment_sizes(content: bytes) -> Iterator[int]:
    at = 2
    while content[at] == 0xFF and content[at + 1] != 0xDA:
        mark = content[at + 1]
        is_bare = mark < 2 or 0xD0 <= mark <= 0xD9
        size = 2 if is_bare else 2 + int.from_bytes(content[at + 2 : at + 4])
        size = 1 if mark == 0xFF else size  # a byte that fills
        yield size
        at += size


def _chunk_sizes(content: bytes) -> Iterator[int]:
    at = len(PNG)
    while True:
        size, name = struct.unpack_from(">I4s", content, at)
        if name not in (b"IDAT", b"fdAT") or not size:
            yield size + 12
        at += size + 12


def _block_sizes(content: bytes) -> Iterator[int]:
    flags = content[10]
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while content[at] == ord("!"):
        start = at
        at += 2
        while size := content[at]:
            at += size + 1
        at += 1
        yield at - start


def _comment_sizes(content: bytes) -> Iterator[int]:
    return (comment.end() - comment.start() for comment in re.finditer(rb"#[^\r\n]*", content))


def _strip_count(content: bytes) -> int:
    """Return how many strips or tiles the first directory of a TIFF lists; 0 for any other file."""
    codes = TIFFS.get(content[:4])
    if codes is None:
        return 0
    order, count_code, code = codes
    entry = f"{order}HH{code}"
    step = struct.calcsize(entry) + struct.calcsize(f"{order}{code}")
    try:
        (start,) = struct.unpack_from(order + code, content, 4 if code == "I" else 8)
        (count,) = struct.unpack_from(order + count_code, content, start)
        first = start + struct.calcsize(order + count_code)
        entries = (struct.unpack_from(entry, content, first + step * i) for i in range(count))
        return max((n for tag, _, n in entries if tag in (STRIP_OFFSETS, TILE_OFFSETS)), default=0)
    except (struct.error, OverflowError):
        return 0
