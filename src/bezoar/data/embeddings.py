"""Ready embeddings: vectors that clip-retrieval, img2dataset's users or anyone else made of a corpus, without its images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bezoar.data.blocks import block_bounds
from bezoar.data.files import npy, parquet
from bezoar.data.pairs import Pairs
from bezoar.data.tables import CAPTION_COLUMNS, ID_COLUMNS
from bezoar.errors import UserError

UNIT = 1 << 17  # rows of a unit of work
BLOCK = 1 << 13  # rows in memory at a time


class VectorBlock(NamedTuple):
    """Some records of a corpus: what they are called, lie at and say (id, caption, member, url), and their vectors.

    images: float32 (n, D). texts: the same of the captions, or None.
    """

    columns: dict[str, pa.Array]
    images: np.ndarray
    texts: np.ndarray | None


@dataclass(frozen=True)
class EmbeddingSource:
    """A source of N vectors, float16 or float32, in .npy files of any size; they are read in blocks.

    images: the files. texts: as many, with the captions' vectors, or none. metadata: as many Parquet files with a row for
    each vector (columns caption, key, image_path, url as img2dataset names them), or none.

    An id is the key, else the image's path, else FILE/ROW.
    """

    images: tuple[Path, ...]
    texts: tuple[Path, ...] = ()
    metadata: tuple[Path, ...] = ()
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(npy.read_shape(p)[0] for p in self.images)

    def batches(self, size: int) -> Iterator[Pairs]:
        """Raises UserError: there are no images."""
        raise UserError(
            "ready embeddings hold no images and no captions to encode; what needs them cannot be asked here"
        )

    def cut(self, number: int) -> list[tuple[int, int]]:
        """(start, stop) of each unit of a file's rows; one empty unit when the file cannot be read, to say so."""
        try:
            return list(block_bounds(npy.read_shape(self.images[number])[0], UNIT)) or [(0, 0)]
        except UserError:
            return [(0, 0)]

    def blocks(self, number: int, start: int, stop: int) -> Iterator[VectorBlock]:
        """Rows start..stop of a file. Raises UserError that names the file that does not fit."""
        image, text, facts = (
            x[number] if x else None for x in (self.images, self.texts, self.metadata)
        )
        shape = npy.read_shape(image) if image else (0, 0)
        assert image is not None
        if text and npy.read_shape(text) != shape:
            raise UserError(f"{text} is of shape {npy.read_shape(text)}, {image} of {shape}")
        for low, high in block_bounds(stop - start, BLOCK):
            low, high = start + low, start + high
            facets = self._columns(image, facts, shape[0], low, high)
            z = npy.read_rows(image, low, high)
            yield VectorBlock(facets, z, npy.read_rows(text, low, high) if text else None)

    def _columns(
        self, image: Path, facts: Path | None, count: int, start: int, stop: int
    ) -> dict[str, pa.Array]:
        """Texts of the rows, empty where nothing is known; an id where none is told."""
        rows = [str(i) for i in range(start, stop)]
        own = pa.array([f"{image.stem}/{r}" for r in rows], pa.large_string())
        facets = {
            "id": own,
            "caption": pa.nulls(len(rows), pa.large_string()),
            "url": pa.nulls(len(rows), pa.large_string()),
        }
        facets["member"] = pa.array([f"row {r}" for r in rows], pa.large_string())
        if facts is None:
            return facets
        with parquet.open_parquet(facts) as file:
            if file.metadata.num_rows != count:
                raise UserError(f"{facts} has {file.metadata.num_rows} rows, {image} {count}")
            held = set(file.schema_arrow.names)
        known = {
            "id": (*ID_COLUMNS, "image_path"),
            "caption": ("caption", *CAPTION_COLUMNS),
            "url": ("url",),
        }
        chosen = {
            ours: next((n for n in names if n in held), None) for ours, names in known.items()
        }
        wanted = [n for n in chosen.values() if n]
        if not wanted:
            return facets
        parts, size = [], 0
        for part in parquet.read_batches(facts, wanted, start, stop):
            parts.append(part)
            size += part.nbytes
            if size > parquet.MAX_HELD_BYTES:
                raise UserError(
                    f"{facts}: the rows {start} to {stop} hold more than {parquet.MAX_HELD_BYTES >> 20} MiB of text"
                )
        table = pa.Table.from_batches(parts)
        for ours, theirs in chosen.items():
            if theirs:
                facets[ours] = _texts(
                    table.column(theirs).combine_chunks(), f"{facts}: column {theirs}"
                )
        facets["id"] = pc.if_else(
            pc.fill_null(pc.equal(pc.fill_null(facets["id"], ""), ""), True), own, facets["id"]
        )
        return facets


def _texts(told: pa.Array, where: str) -> pa.Array:
    """A foreign column as text; bytes that are not UTF-8 become the replacement character. Raises UserError."""
    try:
        told = told.cast(pa.large_string())
        told.validate(full=True)
    except pa.ArrowInvalid:
        told = pa.array(
            [b and b.decode(errors="replace") for b in told.cast(pa.large_binary()).to_pylist()],
            pa.large_string(),
        )
    except pa.ArrowException as error:
        raise UserError(f"{where} is not text: {str(error).splitlines()[0][:200]}") from error
    return told
