"""What is stored of an image beside its pixels: its header, and what a file system or a tar says of
it.

The files are hostile: their readers bound the members, nothing is decoded, and of an image at most
HEAD_BYTES bytes and MAX_SEGMENTS parts of its header are looked at.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bezoar.data.decoding import Record
from bezoar.data.files.image_parts import open_picture
from bezoar.data.files.images import DECODING_ERRORS, FORMATS
from bezoar.data.files.paths import open_regular, regular_descriptor
from bezoar.data.files.skipped import Skipped, Unreadable
from bezoar.data.files.tars import BLOCK
from bezoar.errors import UserError

HEAD_BYTES = 1 << 20  # bytes of a file that are looked at
MAX_SEGMENTS = 256  # parts of a header that are looked at


@dataclass(frozen=True)
class ImageHeader:
    """What the first bytes of an image say."""

    format: str = ""
    layout: str = ""
    tables: str = ""  # a digest of a JPEG's quantisation tables
    shape: tuple[int, int] = (0, 0)  # (0, 0) if not known


@dataclass(frozen=True)
class StoredImage:
    """What is stored of a record's image, beside its pixels."""

    header: ImageHeader
    size: int
    time: float
    owner: str
    extension: str
    shard: int = 0
    place: int = 0  # its number in the shard


def with_tar_headers(
    records: Iterable[Record | Skipped],
) -> Iterator[tuple[Record, bytes | None]]:
    """Each record that was read, and the tar header before its image; None in no tar."""
    file, descriptor = "", -1
    try:
        for record in records:
            if isinstance(record, Skipped):
                continue
            if not record.length or not isinstance(record.image, bytes):
                yield record, None
                continue
            if record.file != file:
                if descriptor >= 0:
                    os.close(descriptor)
                    descriptor = -1
                file, descriptor = record.file, regular_descriptor(record.file)
            offset = record.offset - BLOCK
            yield record, os.pread(descriptor, BLOCK, offset) if offset >= 0 else b""
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def describe_image(record: Record, tar_header: bytes | None) -> StoredImage | None:
    """None when the image cannot be read."""
    if isinstance(record.image, bytes):
        header = parse_image_header(record.image[:HEAD_BYTES])
        return StoredImage(header, len(record.image), *parse_tar_header(tar_header or b""))
    try:
        with open_regular(record.image) as file:
            status = os.fstat(file.fileno())
            header = parse_image_header(file.read(HEAD_BYTES))
    except (OSError, UserError):
        return None
    owner = f"{status.st_uid}:{status.st_gid}:{status.st_mode:o}"
    return StoredImage(header, status.st_size, status.st_mtime, owner, record.image.suffix)


def parse_tar_header(block: bytes) -> tuple[float, str, str]:
    """Time, owner and extension in a member's header (512 bytes); empty when it is none."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return 0.0, "", ""
    owner = f"{member.uid}:{member.gid}:{member.uname}:{member.gname}:{member.mode:o}"
    extension = member.name.rpartition("/")[2].partition(".")[2]
    return float(member.mtime), owner, extension


def parse_image_header(content: bytes) -> ImageHeader:
    """The first bytes of an image -> its header, as far as it can be read."""
    if content[:2] == b"\xff\xd8":
        return parse_jpeg(content)
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return parse_png(content)
    try:
        with open_picture(content, FORMATS) as image:  # reads the header alone
            return ImageHeader(image.format or "", image.mode, "", image.size)
    except (Unreadable, *DECODING_ERRORS):
        return ImageHeader()


def parse_jpeg(content: bytes) -> ImageHeader:
    """Layout: the markers up to the first scan, whose order Pillow loses, and the sampling."""
    at, markers, sampling, shape = 2, list[str](), "", (0, 0)
    tables, digest = False, hashlib.blake2b(digest_size=8)
    while at + 4 <= len(content) and len(markers) < MAX_SEGMENTS:
        if content[at] != 0xFF:
            break
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        body = content[at + 4 : at + 2 + length]
        markers.append(f"{marker:02x}")
        if marker == 0xDB:  # quantisation tables
            tables = True
            digest.update(body)
        elif marker == 0xDA:  # the first scan
            break
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:
            shape = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
            sampling = body[6:18].hex()
        at += 2 + max(2, length)
    layout = " ".join([*markers, sampling])
    return ImageHeader("JPEG", layout, digest.hexdigest() if tables else "", shape)


def parse_png(content: bytes) -> ImageHeader:
    """Layout: the chunks up to the pixels, whose order Pillow loses, and the pixels' format."""
    at, chunks = 8, list[str]()
    while at + 8 <= len(content) and len(chunks) < MAX_SEGMENTS:
        length, name = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        chunks.append(name.decode("latin-1"))
        if name == b"IDAT":
            break
        at += 12 + length
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    return ImageHeader("PNG", " ".join([*chunks, content[24:29].hex()]), "", (width, height))
