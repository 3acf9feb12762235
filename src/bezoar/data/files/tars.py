"""Tars that others wrote, read record by record; whatever a header asks for has a bound.

They are read with Python's tarfile. Webdataset's reader takes a member of any size into memory,
lets a damaged tar end the stream (or, with its handlers, drops the rest) and does not name what it
left out.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bezoar.data.files.paths import FILE_BYTES, TEXT_BYTES, is_confined, open_regular
from bezoar.data.files.skipped import Skipped
from bezoar.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
BLOCK = 512
EXTENDED = (b"L", b"K", b"x", b"g", b"X")  # headers before a header: long names, PAX records
# Of one of them: Python's search in PAX records takes time by the square of their length.
EXTENDED_BYTES = 16 << 10
# What tarfile raises for a broken header.
HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)


class Member(NamedTuple):
    """A file `KEY.EXTENSION` in a tar: its content, and the byte of the tar where that begins."""

    key: str
    extension: str
    content: bytes
    offset: int


class Group(NamedTuple):
    """The members of one record by extension: their contents, and where in the tar these begin."""

    key: str
    files: dict[str, bytes]
    offsets: dict[str, int]


class _BoundedReader(io.BufferedReader):
    """A file whose reads are bounded by the size of an image: a header cannot ask for memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(FILE_BYTES if size is None or not 0 <= size <= FILE_BYTES else size)


class _BoundedHeader(tarfile.TarInfo):
    """A header of a possible size: tarfile would otherwise seek backwards, or search for hours."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in EXTENDED and self.size > EXTENDED_BYTES):
            raise tarfile.InvalidHeaderError(f"a header of {self.size} bytes")  # type: ignore[attr-defined]
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


def read_groups(path: Path, extensions: Sequence[str]) -> Iterator[Group | Skipped]:
    """Read the records of a tar: consecutive members of one key that have one of the extensions.

    A tar that breaks off is read up to the break, which is named. The record before it is left out,
    since its other members may have been lost.

    Raises:
        UserError: if the file does not exist or is not a tar.
    """
    group: Group | None = None
    for item in read_members(path, extensions):
        if isinstance(item, Skipped):
            if not item.member and group:
                yield Skipped(str(path), group.key, "record cut off where the tar breaks")
                group = None
            yield item
            continue
        if group is None or item.key != group.key:
            if group:
                yield group
            group = Group(item.key, {}, {})
        if item.extension in group.files:
            yield Skipped(str(path), f"{item.key}.{item.extension}", "duplicate member")
            continue
        group.files[item.extension] = item.content
        group.offsets[item.extension] = item.offset
    if group:
        yield group


def read_members(path: Path, extensions: Sequence[str]) -> Iterator[Member | Skipped]:
    """Read the members of a tar that have one of the extensions, and name what cannot be read.

    Raises UserError if the file does not exist or is not a tar.
    """
    try:
        with (
            _BoundedReader(open_regular(path).detach()) as file,
            tarfile.open(fileobj=file, mode="r:", tarinfo=_BoundedHeader) as tar,
        ):
            yield from _read_members(path, file, tar, extensions)
    except HEADER_ERRORS as error:
        raise UserError(f"{path} is not a tar file: {error}") from error
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror or error}") from error


def _read_members(
    path: Path, file: io.BufferedReader, tar: tarfile.TarFile, extensions: Sequence[str]
) -> Iterator[Member | Skipped]:
    """Read members up to the end of the tar, or to where it breaks."""
    last_offset = -1
    while True:
        try:
            header = tar.next()
        except HEADER_ERRORS as error:
            yield Skipped(str(path), "", f"broken tar: {error}")
            return
        if header is None:
            break
        if header.size < 0 or tar.offset <= last_offset:  # as PAX records can have it
            yield Skipped(str(path), "", "broken tar: a header points back")
            return
        last_offset = tar.offset
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
        if header.isdir():
            continue
        member = _read_member(path, file, header, extensions)
        if member is not None:
            yield member
        if isinstance(member, Skipped) and not member.member:
            return
    file.seek(tar.offset)  # tarfile stops silently at a header that it cannot read
    if file.read(BLOCK) != bytes(BLOCK):
        yield Skipped(str(path), "", f"broken tar: no header and no end mark at byte {tar.offset}")


def _read_member(
    path: Path, file: io.BufferedReader, header: tarfile.TarInfo, extensions: Sequence[str]
) -> Member | Skipped | None:
    """Read a member; None if its extension is none of those wanted.

    A skipped one without a name ends the tar.
    """
    folder, slash, base = header.name.rpartition("/")
    stem, _, extension = base.partition(".")  # webdataset's rule: the key ends at the first dot
    extension = extension.lower()
    shown = header.name if header.name.isprintable() else ascii(header.name)
    if not header.isreg() or header.issparse():
        return Skipped(str(path), shown, "not a regular file: link, device or sparse")
    if not is_confined(header.name) or not header.name.isprintable() or not stem:
        return Skipped(str(path), shown, "unsafe name")
    if extension not in extensions:
        return None
    if header.size > (FILE_BYTES if extension in IMAGE_EXTENSIONS else TEXT_BYTES):
        return Skipped(str(path), header.name, f"too large: {header.size} bytes")
    file.seek(header.offset_data)
    content = file.read(header.size)
    if len(content) < header.size:
        return Skipped(str(path), "", f"broken tar: it ends inside {header.name}")
    return Member(folder + slash + stem, extension, content, header.offset_data)
