"""Tars that others wrote, read record by record; whatever a header asks for has a bound.

They are read with Python's tarfile. Webdataset's reader takes a member of any size into memory,
lets a damaged tar end the stream (or, with its handlers, drops the rest) and does not name what it
left out.

A key ends at the last dot of a name, so that keys may hold dots. Webdataset ends it at the first:
`a.seg.png` is there a part of `a`. It is here as well where `a` is a record and `a.seg` is none.
"""

import io
import os
import tarfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bezoar.data.files import paths
from bezoar.data.files.images import OTHER_IMAGES
from bezoar.data.files.skipped import Skipped
from bezoar.errors import UserError

TEXT_EXTENSIONS = ("txt", "json")
EXTENSIONS = (*paths.IMAGE_EXTENSIONS, *TEXT_EXTENSIONS)
IMAGE_FILES = OTHER_IMAGES.union(paths.IMAGE_EXTENSIONS)
# Files that describe a set and no record of it.
NOTES = ("readme", "license", "licence")
BLOCK = 512
SEARCHED_BYTES = 64 << 20  # of zeros behind an end mark
EXTENDED = (b"L", b"K", b"x", b"g", b"X")  # headers before a header: long names, PAX records
# Of one of them: Python's search in PAX records takes time by the square of their length.
EXTENDED_BYTES = 16 << 10
MAX_GLOBALS = 64  # PAX records that hold for all members, and are applied to each; git writes one
MAX_NAME = 1024  # characters of a name behind its folder; each part that ends at a dot may be a key
# What tarfile raises for a broken header.
HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


class Member(NamedTuple):
    """A file `KEY.EXTENSION` in a tar, and where in the tar its content lies."""

    name: str
    key: str
    extension: str
    offset: int
    size: int


class Group(NamedTuple):
    """The members of one record by extension: their contents, and where in the tar these begin.

    `others` are the extensions of members that are not read.
    """

    key: str
    files: dict[str, bytes]
    offsets: dict[str, int]
    others: tuple[str, ...] = ()


@dataclass
class _Draft:
    """A record as far as its members were met."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    others: list[Member] = field(default_factory=list)

    def add(self, member: Member) -> bool:
        """Take a member; False if there is one of its extension already."""
        if member.extension not in EXTENSIONS:
            self.others.append(member)
        elif self.members.setdefault(member.extension, member) is not member:
            return False
        return True

    def all_members(self) -> list[Member]:
        """The members, those that are not read last."""
        return [*self.members.values(), *self.others]

    @property
    def whole(self) -> bool:
        """Whether there is an image, and a text or metadata."""
        return any(e in self.members for e in paths.IMAGE_EXTENSIONS) and any(
            e in self.members for e in TEXT_EXTENSIONS
        )


class _BoundedReader(io.BufferedReader):
    """A file whose reads are bounded by the size of an image: a header cannot ask for memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(
            paths.FILE_BYTES if size is None or not 0 <= size <= paths.FILE_BYTES else size
        )


class _BoundedHeader(tarfile.TarInfo):
    """A header of a possible size: tarfile would otherwise seek backwards, or search for hours."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in EXTENDED and self.size > EXTENDED_BYTES):
            raise tarfile.InvalidHeaderError(f"a header of {self.size} bytes")  # type: ignore[attr-defined]
        if len(tar.pax_headers) > MAX_GLOBALS:
            raise tarfile.InvalidHeaderError(f"more than {MAX_GLOBALS} records of all members")  # type: ignore[attr-defined]
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


def read_groups(path: Path, contents: Collection[str] = EXTENSIONS) -> Iterator[Group | Skipped]:
    """Read the records of a tar, those whose members stand side by side first.

    Members of one key that stand apart are put together at the end. A tar that breaks off is read
    up to the break, which is named. The record before it is left out, since its other members may
    have been lost.

    Args:
        contents: extensions of the members whose contents are read.

    Yields:
        A record, whole or not, or a member that belongs to none.

    Raises:
        UserError: if the file does not exist or is not a tar.
    """
    with _open_tar(path) as (file, tar):
        sorter = _Sorter(path)
        for draft in sorter.sort(_read_members(path, file, tar)):
            yield draft if isinstance(draft, Skipped) else _read_group(path, file, draft, contents)


class _Sorter:
    """Puts the members of a tar together by their keys."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.held: dict[str, _Draft] = {}  # by key: what is not whole yet
        self.keys: set[str] = set()  # of records that were whole

    def sort(self, members: Iterator[Member | Skipped | None]) -> Iterator[_Draft | Skipped]:
        """Put members together; what is not whole by the end comes last."""
        draft: _Draft | None = None
        for item in members:
            if item is None:
                if draft:
                    yield from self._close(draft)
                draft = None
                continue
            if isinstance(item, Skipped):
                if not item.member and draft:
                    yield Skipped(self.path, draft.key, "record cut off where the tar breaks")
                    draft = None
                yield item
                continue
            is_part = item.extension in EXTENSIONS
            if draft and item.name.startswith(f"{draft.key}.") and item.key != draft.key:
                yield from self._hold(item)  # `a.seg.png` between members of `a`
                continue
            if not is_part and not (draft and item.key == draft.key):
                yield from self._hold(item)
                continue
            if draft is None or item.key != draft.key:
                if draft:
                    yield from self._close(draft)
                draft = _Draft(item.key)
            if not draft.add(item):
                yield Skipped(self.path, item.name, "duplicate member")
        if draft:
            yield from self._close(draft)
        yield from self._finish()

    def _hold(self, member: Member) -> Iterator[Skipped]:
        """Keep a member for later."""
        if not self.held.setdefault(member.key, _Draft(member.key)).add(member):
            yield Skipped(self.path, member.name, "duplicate member")

    def _close(self, draft: _Draft) -> Iterator[_Draft | Skipped]:
        """Pass a whole record on, and keep any other for later."""
        if draft.whole:
            self.keys.add(draft.key)
            yield draft
            return
        for member in draft.all_members():
            yield from self._hold(member)

    def _finish(self) -> Iterator[_Draft | Skipped]:
        """Pass on what was kept, but for members that describe a record which was passed on."""
        whole = [draft for draft in self.held.values() if draft.whole]
        self.keys.update(draft.key for draft in whole)
        yield from whole
        for draft in self.held.values():
            if draft.whole or any(owner in self.keys for owner in _owners(draft.key)):
                continue
            has_image = any(m.extension in IMAGE_FILES for m in draft.all_members())
            if not has_image and draft.key.rpartition("/")[2].lower() in NOTES:
                continue
            if draft.members or (has_image and draft.key not in self.keys):
                yield draft
            elif draft.key not in self.keys:
                for member in draft.others:
                    yield Skipped(self.path, member.name, "neither image nor text by its name")


def _owners(key: str) -> Iterator[str]:
    """The keys of which one that holds dots may be a part: `a.b` and `a` of `a.b.c`."""
    at = key.rfind(".")
    while at > key.rfind("/") + 1:
        yield key[:at]
        at = key.rfind(".", 0, at)


def _read_group(
    path: Path, file: io.BufferedReader, draft: _Draft, contents: Collection[str]
) -> Group | Skipped:
    """Read the contents of a record's members."""
    files: dict[str, bytes] = {}
    for extension, member in draft.members.items():
        if extension not in contents:
            continue
        file.seek(member.offset)
        files[extension] = file.read(member.size)
        if len(files[extension]) < member.size:
            return Skipped(str(path), draft.key, "cut off while it was read")
    offsets = {extension: member.offset for extension, member in draft.members.items()}
    return Group(draft.key, files, offsets, tuple(m.extension for m in draft.others))


@contextmanager
def _open_tar(path: Path) -> Iterator[tuple[io.BufferedReader, tarfile.TarFile]]:
    """Open a tar to be read member by member. Raises UserError if there is none."""
    try:
        with _BoundedReader(paths.open_regular(path).detach()) as file:
            start = file.read(10)
            file.seek(0)
            for mark, name in COMPRESSIONS.items():
                if start.startswith(mark):
                    raise UserError(
                        f"{path} is packed with {name}, and shards are read in place: unpack it to "
                        "a .tar first"
                    )
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_BoundedHeader) as tar:
                yield file, tar
    except HEADER_ERRORS as error:
        raise UserError(f"{path} is not a tar file: {error}") from error
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror or error}") from error


def _read_members(
    path: Path, file: io.BufferedReader, tar: tarfile.TarFile
) -> Iterator[Member | Skipped | None]:
    """Read headers up to the end of the tar, or to where it breaks.

    None stands for an end mark, and a skipped one without a name ends the tar.
    """
    size = os.fstat(file.fileno()).st_size
    last_offset = -1
    while True:
        try:
            header = tar.next()
        except HEADER_ERRORS as error:
            yield Skipped(str(path), "", f"broken tar: {error}")
            return
        if header is None:
            last_end = tar.offset
            problem = _skip_end_mark(path, file, tar)
            if tar.offset > last_end:
                yield None
            if isinstance(problem, Skipped):
                yield problem
            if problem:
                return
            continue
        if header.size < 0 or tar.offset <= last_offset:  # as PAX records can have it
            yield Skipped(str(path), "", "broken tar: a header points back")
            return
        last_offset = tar.offset
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
        if header.isdir():
            continue
        member = _read_header(path, header)
        if isinstance(member, Member) and member.offset + member.size > size:
            yield Skipped(str(path), "", f"broken tar: it ends inside {header.name}")
            return
        if member is not None:
            yield member


def _skip_end_mark(path: Path, file: io.BufferedReader, tar: tarfile.TarFile) -> Skipped | bool:
    """Move a tar behind its end mark, where another may follow, as `cat` leaves it.

    Returns True where nothing follows, or what is wrong: tarfile stops silently at a header that it
    cannot read.
    """
    file.seek(tar.offset)
    start = tar.offset
    while block := file.read(BLOCK):
        if block != bytes(len(block)):
            if tar.offset == start:
                where = f"no header and no end mark at byte {start}"
                return Skipped(str(path), "", f"broken tar: {where}")
            return False
        tar.offset += BLOCK
        if tar.offset > start + SEARCHED_BYTES:
            return Skipped(str(path), "", f"broken tar: zeros without end from byte {start} on")
    if tar.offset == start:
        return Skipped(str(path), "", f"broken tar: no header and no end mark at byte {start}")
    return True


def _read_header(path: Path, header: tarfile.TarInfo) -> Member | Skipped | None:
    """Read what a header says; None for what packers leave behind."""
    folder, slash, base = header.name.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    if not dot:
        stem, extension = base, ""
    extension = extension.lower()
    shown = header.name if header.name.isprintable() else ascii(header.name)
    if not header.isreg() or header.issparse():
        return Skipped(str(path), shown, "not a regular file: link, device or sparse")
    if base.startswith("._") or base == ".DS_Store":  # macOS writes them beside every file
        return None
    if (
        not paths.is_confined(header.name)
        or not header.name.isprintable()
        or not stem
        or len(base) > MAX_NAME
    ):
        return Skipped(str(path), shown, "unsafe name")
    limit = paths.FILE_BYTES if extension in paths.IMAGE_EXTENSIONS else paths.TEXT_BYTES
    if extension in EXTENSIONS and header.size > limit:
        return Skipped(str(path), header.name, f"too large: {header.size} bytes")
    key = folder + slash + stem
    return Member(header.name, key, extension, header.offset_data, header.size)
