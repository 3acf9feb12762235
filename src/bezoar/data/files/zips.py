"""Zip archives: members are counted and their sizes bounded before anything is unpacked."""

import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from bezoar.data.files.paths import check_regular
from bezoar.errors import UserError

FREE_BYTES = 64 << 20  # what an archive may unpack to, however small it is
MAX_RATIO = 100  # how many times its own size it may unpack to beyond that
UNPACKING_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)


def open_zip(file: Path | IO[bytes], max_members: int = 100_000) -> zipfile.ZipFile:
    """Open an archive.

    Raises:
        UserError: if it is none, holds more than `max_members`, two of one name (of which other
            readers take another), or members that are encrypted or packed otherwise than by
            deflation.
    """
    try:
        archive = zipfile.ZipFile(check_regular(file) if isinstance(file, Path) else file)
    except (*UNPACKING_ERRORS, struct.error, LookupError, OverflowError) as error:
        raise UserError(f"not a zip archive that can be read ({error})") from error
    members = archive.infolist()
    if len(members) > max_members:
        raise UserError(f"{len(members)} members are too many; at most {max_members} are read")
    names = [member.filename.removesuffix(".npy") for member in members]
    if len(set(names)) < len(names):
        raise UserError("two members of one name")
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(
                f"member {member.filename!r} is packed by a method that is not supported"
            )
    return archive


def check_unpacked_size(
    members: Iterable[zipfile.ZipInfo], stored_bytes: int, max_bytes: int
) -> None:
    """Raise UserError if members unpack to more than `max_bytes`, or far more than is stored."""
    claimed = sum(member.file_size for member in members)
    if claimed > min(max_bytes, max(FREE_BYTES, MAX_RATIO * stored_bytes)):
        raise UserError(
            f"would unpack {stored_bytes} bytes to {claimed}, which are too many: refused as a zip "
            "bomb"
        )
