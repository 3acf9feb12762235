"""Labelled images from a NumPy archive: BadEncoder's x and y, image arrays, or packed JPEG files.

The layout is known by the names of the arrays; S is the split.
    x (N, H, W, 3) uint8, y (N,)                   BadEncoder's data files (Jia, Liu, Gong 2022)
    S_images (N, H, W[, 1 or 3]) uint8, S_labels   one file for all splits S_jpeg (bytes,) uint8,
    S_offsets (N + 1,)      file i is S_jpeg[S_offsets[i]:S_offsets[i + 1]]; S_labels, S_ids
and `classes`, the names, where they are known. Nothing is unpickled, and no array is made before
its header was checked against the size of what is stored.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from bezoar.data.decoding import Record, gather_pairs
from bezoar.data.files import npy
from bezoar.data.files.metadata import MAX_LABELS
from bezoar.data.files.paths import FILE_BYTES, existing_file
from bezoar.data.files.skipped import Skipped
from bezoar.data.files.zips import UNPACKING_ERRORS, check_unpacked_size, open_zip
from bezoar.data.label_sets import check_fields, class_captions, distinct_names, pairs_from_arrays
from bezoar.data.pairs import Pairs
from bezoar.errors import UserError, expand_home
from bezoar.registry import method

ARRAY_BYTES = 16 << 30  # of one array, unpacked
Kind = Literal["uint8", "integers", "text"]


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
        """Return the records. Raises UserError, which names the array that does not fit."""
        path = existing_file(self.path, ".npz file")
        try:
            archive = open_zip(path)
        except UserError as error:
            raise UserError(f"{self.path} cannot be read as .npz: {error}") from error
        with archive:
            return self._read(Archive(archive, self.path))

    def _read(self, archive: Archive) -> Pairs:
        """Read the layout that the archive holds."""
        stem, prefix = Path(self.path).stem, f"{self.split}_"
        classes = archive.read_classes() if "classes" in archive.names else ()
        if prefix + "jpeg" in archive.names:
            return self._read_packed(archive, classes)
        if prefix + "images" in archive.names:
            return self._read_images(
                archive, prefix + "images", prefix + "labels", f"{stem}/{self.split}", classes
            )
        if "x" in archive.names:
            return self._read_images(archive, "x", "y", stem, classes)
        raise UserError(
            f"{self.path} holds no array {prefix}jpeg, {prefix}images or x; "
            f"it holds: {', '.join(sorted(archive.names)) or 'nothing'}"
        )

    def _read_images(
        self, archive: Archive, name: str, labels_name: str, prefix: str, classes: tuple[str, ...]
    ) -> Pairs:
        """Read an array of images. prefix: of the ids."""
        images = archive.read(name, "uint8", None)
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
            raise UserError(
                f"{self.path}: {name} must be (N, H, W) or (N, H, W, 1 or 3); got {images.shape}"
            )
        labels = None
        if labels_name in archive.names:
            labels = archive.read_labels(labels_name, len(images), classes)[: self.limit]
        images = images[: self.limit]  # (N, H, W, 1 or 3)
        images = np.broadcast_to(images, (*images.shape[:3], 3)).transpose(0, 3, 1, 2)
        ids = [f"{prefix}/{i:06d}" for i in range(len(images))]
        return pairs_from_arrays(images, labels, ids, classes, self.template, self.size)

    def _read_packed(self, archive: Archive, classes: tuple[str, ...]) -> Pairs:
        """Decode the JPEG files that lie end to end."""
        prefix = f"{self.split}_"
        missing = sorted({prefix + "offsets", prefix + "labels"} - archive.names)
        if missing:
            raise UserError(f"{self.path} holds {prefix}jpeg but no {', '.join(missing)}")
        blob = archive.read(prefix + "jpeg", "uint8", 1)
        offsets = archive.read(prefix + "offsets", "integers", 1).astype(np.int64)
        count = len(offsets) - 1
        if count < 1 or offsets[0] < 0 or offsets[-1] > len(blob) or (np.diff(offsets) < 0).any():
            raise UserError(
                f"{self.path}: {prefix}offsets must rise within 0..{len(blob)}, the size of "
                f"{prefix}jpeg"
            )
        labels = archive.read_labels(prefix + "labels", count, classes)
        ids = [f"{Path(self.path).stem}/{self.split}/{i:06d}" for i in range(count)]
        if prefix + "ids" in archive.names:
            ids = archive.read_texts(prefix + "ids")
            if len(ids) != count:
                raise UserError(f"{self.path}: {count} images but {len(ids)} {prefix}ids")
        captions = class_captions(classes, self.template) if labels.min() >= 0 else ()

        def records() -> Iterator[Record | Skipped]:
            for key, label, start, end in zip(
                ids, labels.tolist(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True
            ):
                if end - start > FILE_BYTES:
                    yield Skipped(self.path, key, f"too large: {end - start} bytes")
                    continue
                yield Record(
                    image=blob[start:end].tobytes(),
                    ids=(key,),
                    captions=(captions[label],) if captions else (),
                    label=label,
                    file=self.path,
                    member=key,
                )

        return gather_pairs(records(), self.size, self.path, classes, self.limit, labelled=True)


class Archive:
    """The arrays of an .npz file, each checked before memory is allocated.

    Every method raises UserError for Python objects (pickles), a header that contradicts the stored
    data, or an excessive size.

    Args:
        archive: the open file.
    """

    def __init__(self, archive: zipfile.ZipFile, path: str) -> None:
        self.archive = archive
        self.path = path
        self.names = {name.removesuffix(".npy") for name in archive.namelist()}

    def read(self, name: str, kind: Kind, dimensions: int | None) -> np.ndarray:
        """Read an array of a kind of values and, unless None, a number of dimensions."""
        where = f"{self.path}: {name}"
        member = next((m for m in self.archive.infolist() if m.filename == f"{name}.npy"), None)
        member = member or next((m for m in self.archive.infolist() if m.filename == name), None)
        if member is None:
            raise UserError(f"{self.path} holds no array {name}")
        stored = min(member.compress_size, expand_home(self.path).stat().st_size)
        try:
            check_unpacked_size([member], stored, ARRAY_BYTES)
            with self.archive.open(member) as stream:
                header = npy.read_header(stream)
                _check_kind(header, kind, dimensions)
                claimed, rest = header.nbytes, member.file_size - stream.tell()
                if claimed != rest:
                    raise UserError(f"asks for {claimed} bytes, but {rest} are stored")
                return npy.read_data(stream, header)
        except UserError as error:
            raise UserError(f"{where} {error}") from error
        except UNPACKING_ERRORS as error:
            raise UserError(f"{where} cannot be unpacked: {error}") from error

    def read_texts(self, name: str) -> list[str]:
        """Read an array of text, each fit to print."""
        try:
            texts: list[str] = self.read(name, "text", 1).tolist()
        except ValueError as error:
            raise UserError(f"{self.path}: {name} is not Unicode") from error
        if not all(text.isprintable() for text in texts):
            raise UserError(f"{self.path}: {name} holds characters that cannot be printed")
        return texts

    def read_classes(self) -> tuple[str, ...]:
        """Read the names of the classes; equal ones are numbered."""
        names = self.read_texts("classes")
        if "" in names:
            raise UserError(f"{self.path}: class {names.index('')} has no name")
        return distinct_names(names)

    def read_labels(self, name: str, count: int, classes: tuple[str, ...]) -> np.ndarray:
        """Read labels, int64 (count,) in -1..C-1."""
        labels = self.read(name, "integers", 1).astype(np.int64)
        top = len(classes) or MAX_LABELS
        if len(labels) != count:
            raise UserError(f"{self.path}: {count} images but {len(labels)} {name}")
        if count and not -1 <= labels.min() <= labels.max() < top:
            raise UserError(
                f"{self.path}: {name} must lie in 0..{top - 1}; got {labels.min()}..{labels.max()}"
            )
        return labels


def _check_kind(header: npy.Header, kind: Kind, dimensions: int | None) -> None:
    """Raise UserError if an array is of another kind or another number of dimensions."""
    fits = {
        "uint8": header.dtype == np.uint8,
        "integers": header.dtype.kind in "iu",
        "text": header.dtype.kind == "U",
    }[kind]
    if not fits or (dimensions is not None and len(header.shape) != dimensions):
        shape = f" of {dimensions} dimension" if dimensions else ""
        raise UserError(f"must be {kind}{shape}; got {header.dtype} {header.shape}")
