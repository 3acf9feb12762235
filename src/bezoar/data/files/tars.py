"""Tars that others wrote, as the members of their records in order; whatever a header asks for has a bound.

They are read with Python's tarfile, not with webdataset's reader: that one takes a member of any size into memory, lets a
damaged tar end the stream (or, with its handlers, drops the rest) and does not name what it left out.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bezoar.data.files.paths import FILE_BYTES, TEXT_BYTES, is_confined
from bezoar.data.files.skipped import Skipped
from bezoar.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
BLOCK = 512
EXTENDED = (b"L", b"K", b"x", b"g", b"X")  # headers before a header: long names, PAX records
EXTENDED_BYTES = (
    16 << 10
)  # of one of them; Python's search in PAX records takes time by the square of their length
BROKEN = (
    tarfile.TarError,
    ValueError,
    OverflowError,
    RecursionError,
)  # what tarfile raises of a header


class Group(NamedTuple):
    """The members of one record: extension -> content, and where in the tar it begins."""

    key: str
    files: dict[str, bytes]
    offsets: dict[str, int]


class _Bounded(io.BufferedReader):
    """A file of which no read takes more than an image may: a header cannot ask for memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(FILE_BYTES if size is None or not 0 <= size <= FILE_BYTES else size)


class _Header(tarfile.TarInfo):
    """A header whose size is one that a member can have: tarfile would go back to where it was, or search for hours."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in EXTENDED and self.size > EXTENDED_BYTES):
            raise tarfile.InvalidHeaderError(f"a header of {self.size} bytes")  # type: ignore[attr-defined]
        return super()._proc_member(tar)  # type: ignore[misc]


def read_groups(path: Path, wanted: Sequence[str]) -> Iterator[Group | Skipped]:
    """The records of a tar: consecutive members of one key, only those whose extension is wanted, in order.

    Raises UserError when the file is not there or is not a tar. A tar that breaks off is read up to the break and
    named; its last record is left out, since its other members may have been lost.
    """
    key, files, offsets = "", dict[str, bytes](), dict[str, int]()
    for item in members(path, wanted):
        if isinstance(item, Skipped):
            if not item.member and key:
                yield Skipped(str(path), key, "record cut off where the tar breaks")
                key = ""
            yield item
            continue
        name, extension, content, offset = item
        if name != key:
            if key:
                yield Group(key, files, offsets)
            key, files, offsets = name, {}, {}
        if extension in files:
            yield Skipped(str(path), f"{name}.{extension}", "duplicate member")
        files.setdefault(extension, content)
        offsets.setdefault(extension, offset)
    if key:
        yield Group(key, files, offsets)


def members(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, str, bytes, int] | Skipped]:
    """(key, extension, content, its offset) of the wanted members of a tar in order, and what cannot be read."""
    try:
        with (
            _Bounded(io.FileIO(path)) as file,
            tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar,
        ):
            yield from _members(path, file, tar, wanted)
    except BROKEN as error:
        raise UserError(f"{path} is not a tar file: {error}") from error
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror or error}") from error


def _members(
    path: Path, file: io.BufferedReader, tar: tarfile.TarFile, wanted: Sequence[str]
) -> Iterator[tuple[str, str, bytes, int] | Skipped]:
    before = -1
    while True:
        try:
            member = tar.next()
        except BROKEN as error:
            yield Skipped(str(path), "", f"broken tar: {error}")
            return
        if member is None:
            break
        if member.size < 0 or tar.offset <= before:  # as PAX records can have it
            yield Skipped(str(path), "", "broken tar: a header points back")
            return
        before = tar.offset
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
        if member.isdir():
            continue
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(
            "."
        )  # webdataset's rule: the key ends at the first dot of the name
        if not (member.isreg() and not member.issparse()):
            yield Skipped(
                str(path), _shown(member.name), "not a regular file: link, device or sparse"
            )
        elif not is_confined(member.name) or not member.name.isprintable() or not stem:
            yield Skipped(str(path), _shown(member.name), "unsafe name")
        elif extension.lower() in wanted:
            bound = FILE_BYTES if extension.lower() in IMAGE_EXTENSIONS else TEXT_BYTES
            if member.size > bound:
                yield Skipped(str(path), member.name, f"too large: {member.size} bytes")
                continue
            file.seek(member.offset_data)
            content = file.read(member.size)
            if len(content) < member.size:
                yield Skipped(str(path), "", f"broken tar: it ends inside {member.name}")
                return
            yield folder + slash + stem, extension.lower(), content, member.offset_data
    file.seek(tar.offset)  # tarfile stops without a word at a header it cannot read
    if file.read(BLOCK) != bytes(BLOCK):
        yield Skipped(str(path), "", f"broken tar: no header and no end mark at byte {tar.offset}")


def _shown(name: str) -> str:
    """A member's name, fit to print."""
    return name if name.isprintable() else ascii(name)
