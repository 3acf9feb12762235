"""Ready embeddings: clip-retrieval's folders (Beaumont 2022), or one .npy file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc

from bezoar.data.blocks import blocks
from bezoar.data.files import npy, parquet
from bezoar.data.files.metadata import ORIGIN_COLUMNS
from bezoar.data.files.paths import existing_file
from bezoar.data.files.skipped import ReadReport
from bezoar.data.files.tables import CAPTION_COLUMNS, ID_COLUMNS, match_column
from bezoar.data.source import COLUMNS, Source, Unit, VectorBlock, number_units, until_broken
from bezoar.errors import UserError, expand_home
from bezoar.registry import method

UNIT_ROWS = 1 << 17  # of a unit of work
BLOCK_ROWS = 1 << 13  # in memory at a time
# Names of columns of metadata, by their contents.
METADATA_COLUMNS = {
    "id": (*ID_COLUMNS, "image_path"),
    "caption": ("caption", *CAPTION_COLUMNS),
    "url": ("url",),
    "origin": ORIGIN_COLUMNS,
}


@method
class Embeddings:
    """Float16 or float32 rows.

    A folder holds img_emb/*.npy and, with the same numbers, text_emb/ and metadata/.
    """

    path: Annotated[str, "folder of img_emb, text_emb, metadata; or one .npy file of image vectors"]
    texts: Annotated[str | None, "beside one .npy file: the captions' vectors"] = None
    metadata: Annotated[
        str | None, "beside one .npy file: Parquet with a row a vector (key, caption, url)"
    ] = None

    def files(self) -> list[Path]:
        """Every file that is read."""
        source = self()
        return [*source.images, *source.texts, *source.metadata]

    def __call__(self) -> EmbeddingSource:
        """Return a source of the vectors; nothing is read yet.

        Raises UserError if files are missing.
        """
        folder = expand_home(self.path)
        if not folder.is_dir():
            return self._open_file()
        if self.texts or self.metadata:
            raise UserError(
                "texts and metadata are named beside one .npy file; a folder has its own"
            )
        images = numbered_files(folder / "img_emb", ".npy")
        if not images:
            raise UserError(
                f"{self.path!r} holds no img_emb/img_emb_0.npy, where clip-retrieval writes image "
                "vectors"
            )
        numbers = sorted(images)
        others: dict[str, tuple[Path, ...]] = {}
        for name, ending in (("text_emb", ".npy"), ("metadata", ".parquet")):
            files = numbered_files(folder / name, ending)
            if files and (unpaired := sorted(files.keys() ^ images.keys())):
                raise UserError(
                    f"{self.path!r}: img_emb and {name} do not hold the same numbers, such as "
                    f"{unpaired[0]}"
                )
            others[name] = tuple(files[i] for i in numbers) if files else ()
        return EmbeddingSource(
            tuple(images[i] for i in numbers), others["text_emb"], others["metadata"]
        )

    def _open_file(self) -> EmbeddingSource:
        texts: tuple[Path, ...] = ()
        metadata: tuple[Path, ...] = ()
        if self.texts:
            texts = (existing_file(self.texts, ".npy file of the captions' vectors"),)
        if self.metadata:
            metadata = (existing_file(self.metadata, "Parquet file of metadata"),)
        images = existing_file(self.path, ".npy file of vectors")
        return EmbeddingSource((images,), texts, metadata)


def numbered_files(folder: Path, ending: str) -> dict[int, Path]:
    """The files of an ending by the number that their names end in.

    Raises UserError if one has none, or two have one.
    """
    files: dict[int, Path] = {}
    for path in sorted(folder.glob(f"*{ending}")):
        if not os.path.isfile(path):  # a pipe would be waited for, a device never ends
            raise UserError(f"{path} is not a regular file")
        number = re.search(r"\d{1,18}$", path.stem)
        if number is None:
            raise UserError(
                f"{path}: its name ends in no number, by which vectors, texts and metadata belong "
                "together"
            )
        other = files.setdefault(int(number[0]), path)
        if other != path:
            raise UserError(
                f"{other} and {path} are both number {int(number[0])}; take one of them away"
            )
    return files


@dataclass(eq=False)
class EmbeddingSource(Source):
    """N vectors, float16 or float32, in .npy files of any size, read in blocks; no images.

    An id is the metadata's key, else the image's path, else FILE/ROW. Columns of metadata are named
    as img2dataset names them (caption, key, image_path, url).
    """

    images: tuple[Path, ...]  # the files of image vectors
    texts: tuple[Path, ...] = ()  # as many files of the captions' vectors, or none
    metadata: tuple[Path, ...] = ()  # as many Parquet files with a row a vector, or none
    size = 0
    has_images = False

    def __len__(self) -> int:
        return sum(npy.read_shape(p)[0] for p in self.images)

    def units(self) -> list[Unit]:
        """Cut the files into blocks of rows; a file that cannot be read is an empty unit."""
        pieces: list[tuple[str, int, tuple[int, ...]]] = []
        for number, path in enumerate(self.images):
            try:
                parts = blocks(npy.read_shape(path)[0], UNIT_ROWS)
            except UserError:
                parts = []
            for part in parts or [slice(0, 0)]:
                pieces.append((str(path), part.stop - part.start, (number, part.start, part.stop)))
        return number_units(pieces)

    def read(self, unit: Unit, report: ReadReport) -> Iterator[VectorBlock]:
        """Read the vectors of a unit in order; the report takes a file that does not fit."""
        yield from until_broken(self._read(unit), unit, report)

    def _read(self, unit: Unit) -> Iterator[VectorBlock]:
        number, start, stop = unit.place
        path = self.images[number]
        texts = self.texts[number] if self.texts else None
        shape = npy.read_shape(path)
        if texts and npy.read_shape(texts) != shape:
            raise UserError(f"{texts} is of shape {npy.read_shape(texts)}, {path} of {shape}")
        for part in blocks(stop - start, BLOCK_ROWS):
            rows = slice(start + part.start, start + part.stop)
            yield VectorBlock(
                columns=self._read_columns(number, shape[0], rows),
                images=npy.read_rows(path, rows.start, rows.stop),
                texts=npy.read_rows(texts, rows.start, rows.stop) if texts else None,
                done=part.stop / (stop - start),
            )

    def _read_columns(self, number: int, count: int, rows: slice) -> dict[str, pa.Array]:
        """The columns of some rows of a file of `count`: texts are empty where nothing is known."""
        n = rows.stop - rows.start
        texts = {name: pa.nulls(n, pa.large_string()) for name in METADATA_COLUMNS}
        if self.metadata:
            texts |= _read_metadata(self.metadata[number], self.images[number], count, rows)
        row_numbers = range(rows.start, rows.stop)
        stem = self.images[number].stem
        default_ids = pa.array([f"{stem}/{row}" for row in row_numbers], pa.large_string())
        has_id = pc.not_equal(pc.fill_null(texts["id"], ""), "")
        return {
            "id": pc.if_else(has_id, texts["id"], default_ids),
            "caption": texts["caption"],
            "member": pa.array([f"row {row}" for row in row_numbers], pa.large_string()),
            "url": texts["url"],
            "origin": texts["origin"],
            "shard": pa.array([number] * n, COLUMNS.field("shard").type),
            "offset": pa.array([0] * n, COLUMNS.field("offset").type),
            "length": pa.array([0] * n, COLUMNS.field("length").type),
        }


def _read_metadata(path: Path, images: Path, count: int, rows: slice) -> dict[str, pa.Array]:
    """Read what is known of some rows of a file of `count` vectors, by name.

    Raises UserError if the file does not fit.
    """
    header = parquet.read_header(path)
    if header.rows != count:
        raise UserError(f"{path} has {header.rows} rows, {images} {count}")
    matches = {k: match_column(header.names, names) for k, names in METADATA_COLUMNS.items()}
    columns = {ours: theirs for ours, theirs in matches.items() if theirs}
    if not columns:
        return {}
    batches: list[pa.RecordBatch] = []
    nbytes = 0
    for batch in parquet.read_batches(path, list(columns.values()), rows.start, rows.stop):
        batches.append(batch)
        nbytes += batch.nbytes
        if nbytes > parquet.MAX_HELD_BYTES:
            raise UserError(
                f"{path}: the rows {rows.start} to {rows.stop} hold more than "
                f"{parquet.MAX_HELD_BYTES >> 20} MiB of text"
            )
    table = pa.Table.from_batches(batches)
    return {
        ours: _as_text(table.column(theirs).combine_chunks(), f"{path}: column {theirs}")
        for ours, theirs in columns.items()
    }


def _as_text(column: pa.Array, where: str) -> pa.Array:
    """Return a foreign column as text; bytes that are not UTF-8 become the replacement character.

    Raises UserError for a column of another type.
    """
    try:
        texts = column.cast(pa.large_string())
        texts.validate(full=True)
    except pa.ArrowInvalid:
        values = column.cast(pa.large_binary()).to_pylist()
        return pa.array([b and b.decode(errors="replace") for b in values], pa.large_string())
    except pa.ArrowException as error:
        raise UserError(f"{where} is not text: {str(error).splitlines()[0][:200]}") from error
    return texts
