"""Labelled images from a NumPy archive: BadEncoder's x and y, plain image arrays, or JPEG files packed end to end.

Three layouts, told by their names; S is the split.
    x (N, H, W, 3) uint8, y (N,)                   BadEncoder's data files (Jia, Liu, Gong 2022)
    S_images (N, H, W[, 1 or 3]) uint8, S_labels   one file for all splits
    S_jpeg (bytes,) uint8, S_offsets (N + 1,)      file i is S_jpeg[S_offsets[i]:S_offsets[i + 1]]; S_labels, S_ids
and `classes`, the names, where they are known. Nothing is unpickled, and no array is made before its header was
checked against the size of what is stored.
"""

import lzma
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated

import numpy as np
import numpy.lib.format as npy

from bezoar.data.decoding import (
    MAX_LABELS,
    Record,
    check_fields,
    class_captions,
    gather_pairs,
    pairs_from_arrays,
)
from bezoar.data.files.paths import FILE_BYTES, existing_file
from bezoar.data.files.skipped import Skipped
from bezoar.data.pairs import Pairs
from bezoar.errors import UserError
from bezoar.registry import method

ARRAY_BYTES = 16 << 30  # one array, at most
FREE_BYTES = (
    64 << 20
)  # beyond this an array may be at most RATIO times as large as what is stored of it
RATIO = 100
# What unpacking raises; RuntimeError: it is encrypted, or packed in a way that is not known.
BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)


@method
class Npz:
    """Ids are the archive's own (S_ids), else FILE/SPLIT/ROW, or FILE/ROW for x and y."""

    path: Annotated[str, "the .npz file"]
    split: Annotated[str, "which split, where the file holds several"] = "train"
    size: Annotated[
        int | None, "pixels a side: the largest centred square, resized; none keeps them"
    ] = None
    template: Annotated[str, "caption; {c} is the class name"] = "a photo of a {c}"
    limit: Annotated[int | None, "read at most so many records"] = None

    def __post_init__(self) -> None:
        check_fields(self.size, self.limit, self.template)

    def files(self) -> list[Path]:
        """The archive."""
        return [existing_file(self.path, ".npz file")]

    def __call__(self) -> Pairs:
        """-> Pairs. Raises UserError that names the array that does not fit."""
        path = existing_file(self.path, ".npz file")
        try:
            archive = zipfile.ZipFile(path)
        except (
            *BROKEN,
            ValueError,
            struct.error,
        ) as error:  # ValueError: names that are no text, places before the file
            raise UserError(f"{self.path} cannot be read as .npz: {error}") from error
        with archive:
            return self.read(archive)

    def read(self, archive: zipfile.ZipFile) -> Pairs:
        """The layout that the archive holds."""
        held = {n.removesuffix(".npy") for n in archive.namelist()}
        stem, prefix = Path(self.path).stem, self.split + "_"
        classes: tuple[str, ...] = ()
        if "classes" in held:
            classes = tuple(texts(archive, self.path, "classes"))
        if prefix + "jpeg" in held:
            return self.packed(archive, held, classes)
        if prefix + "images" in held:
            images, labels, start = prefix + "images", prefix + "labels", f"{stem}/{self.split}"
        elif "x" in held:
            images, labels, start = "x", "y", stem
        else:
            known = f"{prefix}jpeg, {prefix}images or x"
            raise UserError(
                f"{self.path} holds no array {known}; it holds: {', '.join(sorted(held)) or 'nothing'}"
            )
        pixels = array(archive, self.path, images, "u1", None)
        pixels = pixels[..., None] if pixels.ndim == 3 else pixels
        if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or not pixels.size:
            raise UserError(
                f"{self.path}: {images} must be (N, H, W) or (N, H, W, 1 or 3); got {pixels.shape}"
            )
        numbers = self.labels(archive, labels, len(pixels), classes) if labels in held else None
        pixels = np.broadcast_to(
            pixels[: self.limit], (*pixels[: self.limit].shape[:3], 3)
        ).transpose(0, 3, 1, 2)
        ids = [f"{start}/{i:06d}" for i in range(len(pixels))]
        numbers = None if numbers is None else numbers[: self.limit]
        return pairs_from_arrays(pixels, numbers, ids, classes, self.template, self.size)

    def labels(
        self, archive: zipfile.ZipFile, name: str, count: int, classes: tuple[str, ...]
    ) -> np.ndarray:
        """int64 (count,), in -1..C-1."""
        numbers = array(archive, self.path, name, "iu", 1).astype(np.int64)
        top = len(classes) or MAX_LABELS
        if len(numbers) != count:
            raise UserError(f"{self.path}: {count} images but {len(numbers)} {name}")
        if count and not -1 <= numbers.min() <= numbers.max() < top:
            raise UserError(
                f"{self.path}: {name} must lie in 0..{top - 1}; got {numbers.min()}..{numbers.max()}"
            )
        return numbers

    def packed(self, archive: zipfile.ZipFile, held: set[str], classes: tuple[str, ...]) -> Pairs:
        """Decode the JPEG files that lie end to end."""
        prefix = self.split + "_"
        missing = sorted({prefix + "offsets", prefix + "labels"} - held)
        if missing:
            raise UserError(f"{self.path} holds {prefix}jpeg but no {', '.join(missing)}")
        blob = array(archive, self.path, prefix + "jpeg", "u1", 1)
        offsets = array(archive, self.path, prefix + "offsets", "iu", 1).astype(np.int64)
        count = len(offsets) - 1
        if count < 1 or offsets[0] < 0 or offsets[-1] > len(blob) or (np.diff(offsets) < 0).any():
            raise UserError(
                f"{self.path}: {prefix}offsets must rise within 0..{len(blob)}, the size of {prefix}jpeg"
            )
        labels = self.labels(archive, prefix + "labels", count, classes)
        ids = [f"{Path(self.path).stem}/{self.split}/{i:06d}" for i in range(count)]
        if prefix + "ids" in held:
            ids = texts(archive, self.path, prefix + "ids")
            if len(ids) != count:
                raise UserError(f"{self.path}: {count} images but {len(ids)} {prefix}ids")
        names = class_captions(classes, self.template)

        def records() -> Iterator[Record | Skipped]:
            for i, (start, end) in enumerate(
                zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
            ):
                label = int(labels[i])
                if end - start > FILE_BYTES:
                    yield Skipped(self.path, ids[i], f"too large: {end - start} bytes")
                    continue
                caption = (names[label],) if names and labels.min() >= 0 else ()
                yield Record(
                    blob[start:end].tobytes(), (ids[i],), caption, label, self.path, ids[i]
                )

        return gather_pairs(records(), self.size, self.path, classes, self.limit, labelled=True)


def texts(archive: zipfile.ZipFile, path: str, name: str) -> list[str]:
    """An array of text, each fit to print. Raises UserError."""
    try:
        found: list[str] = array(archive, path, name, "U", 1).tolist()
    except ValueError as error:
        raise UserError(f"{path}: {name} is not Unicode") from error
    if not all(text.isprintable() for text in found):
        raise UserError(f"{path}: {name} holds characters that cannot be printed")
    return found


def array(
    archive: zipfile.ZipFile, path: str, name: str, kinds: str, sides: int | None
) -> np.ndarray:
    """One array of an archive, checked before it is made: kinds (u1 = uint8, iu = integers, U = text), dimensions.

    Raises UserError for Python objects (pickles), a header that does not match what is stored, or a size out of bounds.
    """
    where = f"{path}: {name}"
    info = next(
        (archive.getinfo(n) for n in (name + ".npy", name) if n in archive.namelist()), None
    )
    if info is None:
        raise UserError(f"{path} holds no array {name}")
    try:
        with archive.open(info) as file:
            shape, fortran, dtype = header(file, where, kinds, sides)
            size = math.prod(shape) * dtype.itemsize
            stored = info.file_size - file.tell()
            if min(shape, default=0) < 0 or size != stored:
                raise UserError(
                    f"{where}: its header asks for {size} bytes, but {stored} are stored"
                )
            packed = min(info.compress_size, Path(path).expanduser().stat().st_size)
            if size > ARRAY_BYTES or (size > FREE_BYTES and size > RATIO * packed):
                raise UserError(
                    f"{where} would unpack {packed} bytes to {size}: refused as a zip bomb"
                )
            content = file.read(size)
    except BROKEN as error:
        raise UserError(f"{where} cannot be unpacked: {error}") from error
    if len(content) < size:
        raise UserError(f"{where} ends after {len(content)} of {size} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def header(
    file: IO[bytes], where: str, kinds: str, sides: int | None
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of a .npy stream, when they are what is wanted. Raises UserError."""
    parsers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        shape, fortran, dtype = parsers[npy.read_magic(file)](file)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"{where} has no NumPy header that can be read") from error
    if dtype.hasobject:
        raise UserError(f"{where} holds Python objects (a pickle), which are never read")
    right = dtype == np.uint8 if kinds == "u1" else dtype.kind in kinds
    if not right or (sides is not None and len(shape) != sides):
        wanted = {"u1": "uint8", "iu": "integers", "U": "text"}[kinds]
        raise UserError(
            f"{where} must be {wanted}{f' of {sides} dimension' if sides else ''}; got {dtype} {shape}"
        )
    return shape, fortran, dtype
