"""Corpus: everything a scan embedded, as one: its rows in mapped files, its images wherever they were read from.

What detectors are called with. The files of all units are put end to end; two records of one id are told apart, and both
named. What a scan leaves behind is read again with `scored` (ids, places, captions, scores) and `reopened` (images, vectors).
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bezoar.data.blocks import block_bounds
from bezoar.data.embeddings import EmbeddingSource
from bezoar.data.folders import FolderImages, FolderSource
from bezoar.data.pairs import Pairs
from bezoar.data.shards import ShardSource
from bezoar.data.stored_pairs import ShardFiles, StoredPairs
from bezoar.data.strings import Strings
from bezoar.data.tables import TableImages, TableSource
from bezoar.detection.corpus import columns, units
from bezoar.detection.corpus.assembly import SKIPPED, assemble
from bezoar.encoders.encoder import EmbeddedRecords, Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.progress import Progress
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings

FOLDER = "vectors"
SCORES, RAISED = "scores.parquet", ".raised"
FIXED = ("id", "shard", "member", "caption", "score")  # every other column is a detector's
ROWS = 1 << 16  # records of a row group


class Vectors:
    """Stands for the encoder where vectors come without one: it gives them back, and can make none."""

    device = torch.device("cpu")
    text = None

    def embed(self, source: Any, batch: int = 0) -> EmbeddedRecords:
        """The vectors that the source brings."""
        return source.embedded

    def encode_images(self, x: Any) -> Tensor:
        """Raises UserError."""
        raise UserError(
            "ready embeddings come without their encoder; what needs it cannot be asked here"
        )

    encode_texts = tokenize = encode_tokens = prepare_images = encode_images


@dataclass(frozen=True, eq=False)
class Corpus:
    """N records, embedded. It can stand where Pairs stand, but for ready embeddings, which have no images.

    places: N of PLACE, the file (a row of `names`) and where in it; see `place` for it in words. by: who embedded them.
    told: how they were read: `records`, `read`, `skipped` (how many), `reasons`, `renamed`, `states` of the shards.
    """

    source: Any
    by: Encoder | Vectors
    file_names: list[str]
    ids: Strings
    captions: Strings | tuple[str, ...]
    members: Strings
    urls: Strings
    places: np.ndarray
    embedded: EmbeddedRecords
    summary: dict[str, Any]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def encoder(self) -> Encoder | Vectors:
        """Whose vectors these are: `encoder.embed` gives them back to it alone."""
        return self.by

    @functools.cached_property
    def records(self) -> Pairs | StoredPairs:
        """The same records with their images, in memory or read as they are asked for. Raises UserError without images."""
        if isinstance(self.source, EmbeddingSource):
            next(self.source.batches(1))
        if isinstance(self.source, (ShardSource, TableSource, FolderSource)):
            files: ShardFiles | TableImages | FolderImages
            places = np.array(self.places)
            labels, classes = None, self.classes
            if isinstance(self.source, ShardSource):
                files = ShardFiles(self.source.paths, self.summary["states"])
            else:  # images that are files of their own are found by their name
                named = places["length"] == 0
                places["offset"][named] = np.flatnonzero(named)
                files = (
                    TableImages(self.source, self.members)
                    if isinstance(self.source, TableSource)
                    else FolderImages(self.source, self.members)
                )
            if isinstance(self.source, FolderSource):
                labels, classes = self.source.labels(self.members), self.source.classes
            return StoredPairs(
                files,
                self.source.size,
                places,
                self.ids,
                Strings.from_texts(self.captions),
                labels,
                classes,
            )
        rows = self.places["offset"]
        if len(rows) == len(self.source) and not self.summary["doubles"]:
            return self.source
        if isinstance(self.source, Pairs):
            return replace(self.source.take(rows), ids=tuple(self.ids))
        return replace(self.source.select(rows), ids=self.ids)

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.records.size

    @property
    def images(self) -> Any:
        """Images by row."""
        return self.records.images

    def take(self, rows: Sequence[int] | Tensor | np.ndarray) -> Pairs:
        """The records at the given rows, in that order, in memory."""
        return self.records.take(rows)

    def batches(self, size: int) -> Iterator[Pairs]:
        """The records in order, `size` at a time. Raises UserError without images."""
        yield from self.records.batches(size)

    def place_of(self, row: int) -> str:
        """Where a record lies."""
        return f"{self.file_names[self.places['shard'][row]]} {self.members[row]}".strip()

    def reading_notes(self) -> dict[str, Any]:
        """For the manifest: how many records were read, and file, member and reason of the first of what was not."""
        return {"reading": {k: self.summary[k] for k in ("read", "skipped", "unread", "reasons")}}


def embed_corpus(
    given: Any, by: Any, folder: Path, settings: Settings, progress: Progress
) -> Corpus:
    """Given data, cut into units, embedded by an encoder (a run or a method; None for ready embeddings), put together.

    What is there already of an earlier attempt is used, unless the settings ask for a fresh run. Raises UserError when
    nothing is left to scan.
    """
    place, found = folder / FOLDER, units.open_source(given)
    if settings.fresh:
        shutil.rmtree(place, ignore_errors=True)
    if not (place / "done.json").exists():
        todo = units.cut_units(found)
        units.embed_all(given, by, todo, place, settings, progress)
        assemble(todo, place, folder / SKIPPED)
    return _opened(found, units.load_encoder(by, settings.device) or Vectors(), place)


def reopen_corpus(run: Run) -> Corpus:
    """The corpus of a finished scan, to look at its records; it has vectors, and no encoder."""
    return _opened(units.open_source(run), Vectors(), run.file(FOLDER))


def _opened(found: Any, by: Encoder | Vectors, folder: Path) -> Corpus:
    told = json.loads((folder / "done.json").read_text())
    ids, captions, members, urls = (columns.map_texts(folder, n) for n in units.TEXTS)
    texts = columns.map_tensor(folder / "texts.npy") if told["texts"] else None
    e = EmbeddedRecords(ids, columns.map_tensor(folder / "images.npy"), texts)
    places = columns.map_array(folder / "place.npy")
    return Corpus(
        found,
        by,
        told["names"],
        ids,
        captions if told["captions"] else (),
        members,
        urls,
        places,
        e,
        told,
    )


@dataclass(frozen=True)
class ScanScores:
    """N scanned records, in the order of the corpus.

    captions: empty texts where there are none. places: where each record lies: `FILE MEMBER`, or `FILE row N`.
    merged: of all detectors. detectors: each one's scores, by the name it was asked by.
    """

    ids: Strings
    captions: Strings
    places: Strings
    merged: Scores
    detectors: dict[str, Scores]

    def __len__(self) -> int:
        return len(self.ids)


def load_scores(folder: Path) -> ScanScores:
    """What a scan run found. Raises UserError when the folder holds no readable scores."""
    path = folder / SCORES
    try:
        table = pq.read_table(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if missing := [n for n in FIXED if n not in table.column_names]:
        raise UserError(f"{path} holds no scores of a scan: no column {missing[0]}")

    def text(name: str) -> pa.Array:
        return pa.concat_arrays(
            table.column(name).cast(pa.large_string()).chunks or [pa.array([], pa.large_string())]
        )

    ids = Strings(text("id"))
    joined = pc.binary_join_element_wise(
        text("shard"), text("member"), pa.scalar(" ", pa.large_string())
    )
    raised = {f.name for f in table.schema if pa.types.is_boolean(f.type)}

    def column(name: str) -> torch.Tensor:
        return torch.from_numpy(table.column(name).to_numpy().copy())

    scores = {
        n: Scores(
            ids, column(n).float(), raised=column(n + RAISED) if n + RAISED in raised else None
        )
        for n in table.column_names
        if n not in FIXED[:-1] and n not in raised
    }
    merged = scores.pop("score")
    return ScanScores(
        ids, Strings(text("caption")), Strings(pc.utf8_trim_whitespace(joined)), merged, scores
    )


def write_scores(path: Path, corpus: Corpus, merged: Scores, detectors: dict[str, Scores]) -> None:
    """One row a record, in the order of the corpus; whatever is not known of a record is an empty text.

    Columns: those of `FIXED`, the score of each detector, and of one that decides which records it raised.
    """
    same = {"score": merged.select(corpus.ids)} | {
        k: s.select(corpus.ids) for k, s in detectors.items()
    }
    values = {k: s.values.float().cpu().numpy() for k, s in same.items()}
    values |= {
        k + RAISED: s.raised.cpu().numpy()
        for k, s in same.items()
        if k in detectors and s.raised is not None
    }
    told = [(n, pa.from_numpy_dtype(v.dtype)) for n, v in values.items()]
    schema = pa.schema([(n, pa.large_string()) for n in FIXED[:-1]] + told)
    with pq.ParquetWriter(path.with_suffix(".tmp"), schema, compression="zstd") as out:
        for start, stop in block_bounds(len(corpus), ROWS):
            out.write_table(
                pa.table(
                    text_columns(corpus, start, stop)
                    | {n: v[start:stop] for n, v in values.items()},
                    schema,
                )
            )
    path.with_suffix(".tmp").replace(path)


def text_columns(corpus: Corpus, start: int, stop: int) -> dict[str, pa.Array]:
    """id, shard, member and caption of some records."""
    n = stop - start
    names = pa.array(corpus.file_names, pa.large_string()).take(
        pa.array(corpus.places["shard"][start:stop])
    )
    captions = (
        corpus.captions.column.slice(start, n)
        if isinstance(corpus.captions, Strings)
        else pa.array([""] * n)
    )
    ids, members = corpus.ids.column.slice(start, n), corpus.members.column.slice(start, n)
    return {
        "id": ids,
        "shard": names,
        "member": members,
        "caption": captions.cast(pa.large_string()),
    }
