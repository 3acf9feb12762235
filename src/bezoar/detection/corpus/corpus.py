"""Corpus: everything a scan embedded, rows in mapped files, images where they were read from.

What a scan leaves behind is read again with `load_scores` (ids, places, captions, scores) and
`reopen_corpus` (images, vectors).
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.data.files.artefacts import read_facts
from bezoar.data.files.writing import own_folder, remove_debris, remove_folder, whole_file
from bezoar.data.pairs import Pairs, Rows
from bezoar.data.source import TEXT_COLUMNS, RecordIndex, Source, as_source
from bezoar.data.stored_pairs import StoredImages, StoredPairs
from bezoar.data.streams import RecordStream
from bezoar.data.strings import Strings
from bezoar.detection.corpus import columns, units
from bezoar.detection.corpus.assembly import DONE, SKIPPED, assemble, remove_units
from bezoar.detection.corpus.shared_embeddings import VECTORS, Entry, find_entry, remove_unused
from bezoar.encoders.encoder import EmbeddedRecords, Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.progress import Progress
from bezoar.runs import inputs
from bezoar.runs.devices import select_device
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings

SCORES = "scores.parquet"
RAISED = ".raised"  # ending of the columns that say which records a detector raised
FIXED = ("id", "shard", "member", "caption", "score")  # every other column is a detector's
ROWS = 1 << 16  # records of a row group


class Vectors:
    """Stands for the encoder where vectors come without one: it gives these back and makes none."""

    device = torch.device("cpu")
    text = None

    def embed(self, source: Any, batch: int = 0) -> EmbeddedRecords:
        """Return the vectors that the source brings."""
        embedded: EmbeddedRecords = source.embedded
        return embedded

    def encode_images(self, x: Any) -> NoReturn:
        """Raise UserError."""
        raise UserError(
            "ready embeddings come without their encoder; what needs it cannot be asked here"
        )

    encode_texts = tokenize = encode_tokens = prepare_images = encode_images


@dataclass(frozen=True, eq=False)
class Corpus(RecordIndex):
    """N records, embedded, which can stand where Pairs stand; ready embeddings have no images."""

    source: Source  # what the records were read from
    by: Encoder | Vectors  # what embedded them
    embedded: EmbeddedRecords  # their vectors, over mapped files
    # how they were read: `read`, `skipped` (the first of what was not), `unread` (how many),
    # `reasons`, `doubles` (how many were renamed)
    summary: dict[str, Any]
    classes: tuple[str, ...] = ()  # names by label
    # where scans of the same data with the same encoder share their vectors; None where they do not
    shared: Entry | None = None

    @property
    def encoder(self) -> Encoder | Vectors:
        """Whose vectors these are: `encoder.embed` gives them back to it alone."""
        return self.by

    @functools.cached_property
    def records(self) -> Pairs | StoredPairs:
        """The same records with their images, in memory or on disk.

        Raises UserError without images.
        """
        return self.source.find_images(self)

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.records.size

    @property
    def images(self) -> Tensor | StoredImages:
        """Images by row."""
        return self.records.images

    def take(self, rows: Rows) -> Pairs:
        """Return the records at the given rows, in that order, in memory."""
        return self.records.take(rows)

    def batches(self, size: int) -> Iterator[Pairs]:
        """Iterate over the records in order, `size` at a time. Raises UserError without images."""
        yield from self.records.batches(size)

    def reading_notes(self) -> dict[str, Any]:
        """For the manifest: how many records were read, and the first of what was not."""
        keys = ("read", "skipped", "unread", "reasons")
        return {"reading": {key: self.summary[key] for key in keys}}


def embed_corpus(
    data: Any, by: Any, folder: Path, settings: Settings, progress: Progress
) -> Corpus:
    """Cut data into units, embed them and put them together.

    What an earlier attempt left is used, or what another scan of the same data with the same
    encoder did, unless the settings ask for a fresh run.

    Args:
        data: the run or data method that is scanned.
        by: what embeds it: a run or a network; None for ready embeddings.
        settings: workers, device and so on.

    Raises:
        UserError: if nothing is left to scan.
    """
    vectors = folder / VECTORS
    source = units.open_source(data)
    if settings.fresh:
        remove_folder(vectors)
    entry = _shared_entry(data, by, folder, settings)

    def embed(target: Path, skipped: Path) -> None:
        todo = source.units()
        units.embed_all(data, by, todo, target, settings, progress)
        assemble(todo, target, skipped)

    if (vectors / DONE).exists():
        remove_units(vectors)  # that an attempt has left which was killed at its end
    elif entry is None:
        embed(vectors, folder / SKIPPED)
    else:
        with entry.lock():
            if settings.fresh:
                entry.clear()
            try:
                if not entry.is_done:
                    embed(entry.vectors, entry.skipped)
                remove_units(entry.vectors)
            finally:
                remove_debris(entry.folder)  # of workers that were ended in the middle of a file
                entry.link_into(folder)
        remove_unused(entry)
    encoder = units.load_encoder(by, settings.device) or Vectors()
    return dataclasses.replace(_open(source, encoder, vectors), shared=entry)


def _shared_entry(data: Any, by: Any, folder: Path, settings: Settings) -> Entry | None:
    """Return where the vectors are shared; None for images that the run's question does not fix."""
    source = as_source(inputs.open_source(inputs.open_dataset(data).method))
    if not getattr(source, "is_fingerprinted", True):
        return None
    ask = Run(folder).manifest["ask"]
    return find_entry(settings.runs, ask, (data, by), select_device(settings.device).type)


def reopen_corpus(run: Run) -> Corpus:
    """Open the corpus of a finished scan to look at its records; it has vectors, no encoder."""
    source = units.open_source(run)
    size = run.manifest["notes"].get("size")  # at which its images were read
    if isinstance(source, RecordStream) and isinstance(size, int) and 0 < size < source.size:
        source.size = size
    return _open(source, Vectors(), own_folder(run.file(VECTORS)))


def _open(source: Source, by: Encoder | Vectors, folder: Path) -> Corpus:
    summary = read_facts(folder / DONE)
    summary.texts("names")
    ids, captions, members, urls, origins = (
        columns.map_texts(folder, name) for name in TEXT_COLUMNS
    )
    texts = columns.map_tensor(folder / "texts.npy") if summary["texts"] else None
    return Corpus(
        file_names=summary["names"],
        file_stamps=summary["states"],
        ids=ids,
        captions=captions if summary["captions"] else (),
        members=members,
        urls=urls,
        origins=origins,
        places=columns.map_array(folder / "place.npy"),
        renamed=bool(summary["doubles"]),
        source=source,
        by=by,
        embedded=EmbeddedRecords(ids, columns.map_tensor(folder / "images.npy"), texts),
        summary=summary,
    )


@dataclass(frozen=True)
class ScanScores:
    """The scores of N records, in the order of the corpus."""

    ids: Strings  # of the records
    captions: Strings  # empty where there are none
    places: Strings  # where each record lies: `FILE MEMBER`, or `FILE row N`
    merged: Scores  # of all detectors
    detectors: dict[str, Scores]  # each one's scores, by the name it was asked for by

    def __len__(self) -> int:
        return len(self.ids)


def load_scores(folder: Path) -> ScanScores:
    """Load what a scan found. Raises UserError if the folder holds no readable scores."""
    path = folder / SCORES
    try:
        table = pq.read_table(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if missing := [name for name in FIXED if name not in table.column_names]:
        raise UserError(f"{path} holds no scores of a scan: no column {missing[0]}")

    def read_text(name: str) -> pa.Array:
        chunks = table.column(name).cast(pa.large_string()).chunks
        return pa.concat_arrays(chunks or [pa.array([], pa.large_string())])

    def read_numbers(name: str) -> Tensor:
        return torch.from_numpy(table.column(name).to_numpy().copy())

    ids = Strings(read_text("id"))
    space = pa.scalar(" ", pa.large_string())
    places = pc.binary_join_element_wise(read_text("shard"), read_text("member"), space)
    raised = {f.name for f in table.schema if pa.types.is_boolean(f.type)}
    scores: dict[str, Scores] = {}
    for name in table.column_names:
        if name not in FIXED[:-1] and name not in raised:
            decisions = read_numbers(name + RAISED) if name + RAISED in raised else None
            scores[name] = Scores(ids, read_numbers(name).float(), raised=decisions)
    return ScanScores(
        ids=ids,
        captions=Strings(read_text("caption")),
        places=Strings(pc.utf8_trim_whitespace(places)),
        merged=scores.pop("score"),
        detectors=scores,
    )


def write_scores(
    path: Path, corpus: Corpus, merged: Scores, detectors: Mapping[str, Scores]
) -> None:
    """Write a row a record, in the order of the corpus; what is not known is an empty text.

    Columns: those of `FIXED`, the score of each detector, and of one that decides which records it
    raised.
    """
    ordered = {
        name: scores.select(corpus.ids) for name, scores in {"score": merged, **detectors}.items()
    }
    numbers = {name: scores.values.float().cpu().numpy() for name, scores in ordered.items()}
    for name in detectors:
        raised = ordered[name].raised
        if raised is not None:
            numbers[name + RAISED] = raised.cpu().numpy()
    schema = pa.schema(
        [(name, pa.large_string()) for name in FIXED[:-1]]
        + [(name, pa.from_numpy_dtype(values.dtype)) for name, values in numbers.items()]
    )
    with (
        whole_file(path, "wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd") as table,
    ):
        for rows in blocks(len(corpus), ROWS):
            values = {name: column[rows] for name, column in numbers.items()}
            table.write_table(pa.table(corpus.text_columns(rows) | values, schema))
