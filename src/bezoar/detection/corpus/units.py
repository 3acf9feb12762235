"""Units: a corpus cut into pieces, each embedded by itself: without state, with the same result each time, in any order.

A unit is a shard, or a block of a table, a folder, ready embeddings or records in memory. What is made of it lies in files
of its own, the last of which says that it is whole; a scan that was cut off goes on with the units that are missing.
Units are done in this process, in worker processes, or as Ray tasks; the files are the same.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bezoar import registry
from bezoar.data import decoding
from bezoar.data.blocks import block_bounds
from bezoar.data.embeddings import EmbeddingSource, VectorBlock
from bezoar.data.files import paths
from bezoar.data.files.skipped import ReadReport, Skipped
from bezoar.data.folders import FolderSource
from bezoar.data.pairs import Pairs
from bezoar.data.shards import ShardSource, StoredRecord
from bezoar.data.stored_pairs import StoredPairs
from bezoar.data.tables import TableSource, cut_blocks
from bezoar.detection.corpus import columns
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.progress import Progress
from bezoar.runs import inputs, sweep
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings

HELD = 4096  # records of a unit of a set that is in memory, or read by index
CELLS = 1 << 25  # pixel values that are embedded at a time
MOST = 512  # images that are
LONGEST = 1024  # characters of an id
TEXTS = ("id", "caption", "member", "url")
STRAY = (
    "not an image by its name",
    "not in a class folder",
    "no file in the class folder",
)  # what is no record at all
FIELDS = pa.schema(
    [(n, pa.large_string()) for n in TEXTS]
    + [("shard", pa.int32()), ("offset", pa.int64()), ("length", pa.int64())]
)
Step = Callable[[float], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Unit:
    """number: its place in the corpus. name: the file it is of. weight: its share of the work. place: what part it is."""

    number: int
    name: str
    weight: int
    place: tuple[int, ...]

    def file(self, folder: Path, ending: str) -> Path:
        """One of the files that are made of it."""
        return folder / f"{self.number:05d}.{ending}"

    def summary(self, folder: Path) -> dict[str, Any] | None:
        """What its last file says of it; None while it is not whole."""
        path = self.file(folder, "json")
        return json.loads(path.read_text()) if path.exists() else None


@functools.lru_cache(1)
def open_source(given: Any) -> Any:
    """What is cut: shards, tables, folders and ready embeddings as they are, unless a plan or a limit goes over them; else the
    records of the data set, in memory or by index."""
    parts = inputs.open_dataset(given)
    found = inputs.open_source(parts.method)
    if (
        isinstance(found, (ShardSource, TableSource, FolderSource, EmbeddingSource))
        and not parts.plan.edits
        and getattr(found, "limit", None) is None
    ):
        return found
    if isinstance(found, EmbeddingSource):
        raise UserError("ready embeddings cannot be poisoned: there is no image to change")
    return parts.records


def cut_units(found: Any) -> list[Unit]:
    """A source, cut."""
    pieces: list[tuple[str, int, tuple[int, ...]]]
    if isinstance(found, ShardSource):
        pieces = [(str(p), _size(p), (i,)) for i, p in enumerate(found.paths)]
    elif isinstance(found, TableSource):
        found.confine()
        pieces = [
            (str(p), n, (i, *place)) for i, p in enumerate(found.paths) for n, place in _cut(p)
        ]
    elif isinstance(found, FolderSource):
        pieces = [(str(found.root), place[3], (0, *place)) for place in found.cut()]
    elif isinstance(found, EmbeddingSource):
        pieces = [
            (str(p), stop - start, (i, start, stop))
            for i, p in enumerate(found.images)
            for start, stop in found.cut(i)
        ]
    else:
        pieces = [
            ("", stop - start, (start, stop)) for start, stop in block_bounds(len(found), HELD)
        ]
    return [
        Unit(i, paths.encodable(name), weight, place)
        for i, (name, weight, place) in enumerate(pieces)
    ]


def _cut(table: Path) -> list[tuple[int, tuple[int, ...]]]:
    """(rows, place) of a table's blocks; a broken table is one unit, read up to where it breaks and named."""
    try:
        return [(place[2], place) for place in cut_blocks(table) if place[2]]
    except UserError:
        return [(1, ())]


def embed(
    found: Any, unit: Unit, encoder: Encoder | None, folder: Path, step: Step = lambda _: None
) -> None:
    """Make a unit's files, each under a temporary name first: vectors, then records, then what was read, as JSON.

    What cannot be read, and what the encoder gives no finite vector of, is named in the last; nothing of it is kept.
    """
    report, made, count = ReadReport(), {"images": 0, "texts": 0}, 0
    if isinstance(found, (Pairs, StoredPairs)) and found.report is not None and unit.number == 0:
        report.skipped += [
            s for s in found.report.skipped if s.reason not in STRAY
        ]  # read whole, before it was cut
    state = _state(found.paths[unit.place[0]]) if isinstance(found, ShardSource) else None
    records = columns.partial(unit.file(folder, "parquet"))
    with ExitStack() as stack:
        growing: dict[str, columns.ArrayWriter] = {}
        table = stack.enter_context(pq.ParquetWriter(records, FIELDS, compression="zstd"))
        for block in _blocks(found, unit, encoder, report, step):
            block = _usable(block, unit, report)
            for name, z in (("images", block.images), ("texts", block.texts)):
                if z is None or not len(z):
                    continue
                if name not in growing:
                    path = unit.file(folder, f"{name}.npy")
                    growing[name] = stack.enter_context(
                        columns.ArrayWriter(path, np.float32, z.shape[1])
                    )
                growing[name].append(z)
                made[name] = z.shape[1]
            table.write_table(_table(block, unit))
            count += len(block.images)
    os.replace(records, unit.file(folder, "parquet"))
    write_summary(unit, folder, {"read": count, "skipped": report.skipped, "state": state, **made})


def refuse(unit: Unit, folder: Path, reason: str) -> None:
    """Set a whole unit aside."""
    write_summary(
        unit,
        folder,
        {"read": 0, "skipped": [(unit.name, "", reason)], "state": None, "images": 0, "texts": 0},
    )


def write_summary(unit: Unit, folder: Path, told: dict[str, Any]) -> None:
    """A unit's last file, with which it is whole; it appears under its name only when complete."""
    last = columns.partial(unit.file(folder, "json"))
    last.write_text(json.dumps(told))
    os.replace(last, unit.file(folder, "json"))


def embed_all(
    given: Any, by: Any, todo: Sequence[Unit], folder: Path, settings: Settings, progress: Progress
) -> None:
    """Make the files of all units that have none: given data, embedded by an encoder (a run, a method, or None).

    One process does it where the records are in its memory or there is but one unit; worker processes, as a sweep's, where
    they are read from files; Ray tasks when asked.
    """
    folder.mkdir(exist_ok=True)
    for left in folder.glob("*.part"):
        left.unlink()
    missing = [u for u in todo if u.summary(folder) is None]
    total, done = sum(u.weight for u in missing), 0
    found = open_source(given)
    streamed = isinstance(found, (ShardSource, TableSource, FolderSource, EmbeddingSource))
    text = "embedding, KiB" if isinstance(found, ShardSource) else "embedding"
    progress.step(0, total, text)
    workers = (
        min(len(missing), settings.workers or sweep.worker_count(settings))
        if streamed and by is not None
        else 1
    )
    if not settings.ray and workers < 2:
        encoder = load_encoder(by, settings.device)
        for unit in missing:
            start, weight = done, unit.weight
            embed(
                found,
                unit,
                encoder,
                folder,
                lambda part: progress.step(start + int(part * weight), total, text),
            )
            done += weight
        return
    common = {
        "data": _reference(given, "data"),
        "encoder": _reference(by, "network"),
        "folder": str(folder.absolute()),
        "cwd": str(Path.cwd()),
    }
    waiting = list(reversed(missing))
    with sweep.worker_pool(settings, workers, answer) as (submit, places):
        going: dict[Future[dict], Unit] = {}
        while waiting or going:
            while waiting and len(going) < places:
                unit = waiting.pop()
                going[submit({**common, "unit": asdict(unit), "device": settings.device})] = unit
            for future in wait(going, return_when=FIRST_COMPLETED)[0]:
                unit, said = going.pop(future), future.result()
                if "refused" in said:
                    raise UserError(said["refused"])
                if "bug" in said:
                    raise RuntimeError(
                        f"a worker failed at {unit.name or unit.number}: {said['bug']}"
                    )
                if "error" in said:
                    refuse(unit, folder, said["error"])
                done += unit.weight
                progress.step(done, total, text)


def answer(asked: dict) -> dict:
    """A worker's part: `{"done": number}`, `{"refused": what the user must be told}`, or `{"bug": what failed}`."""
    try:
        os.chdir(asked["cwd"])
        raw = asked["unit"]
        unit = Unit(raw["number"], raw["name"], raw["weight"], tuple(raw["place"]))
        encoder = _loaded(asked["encoder"], asked["device"])
        embed(_opened(asked["data"]), unit, encoder, Path(asked["folder"]))
        return {"done": unit.number}
    except UserError as error:
        return {"refused": str(error)}
    except OSError as error:
        return {"refused": f"{error.filename or asked['folder']}: {error.strerror or error}"}
    except Exception as error:  # whoever asked must hear of it
        import traceback

        traceback.print_exc()
        return {"bug": f"{type(error).__name__}: {error}"}


def load_encoder(by: Any, device: str) -> Encoder | None:
    """The encoder of a run or a method, one object for all who ask; None of None."""
    return _loaded(_reference(by, "network"), device)


def _reference(value: Any, kind: str) -> str:
    """A run or a method, in a word that another process understands."""
    if isinstance(value, Run):
        return f"run:{value.path.absolute()}"
    return f"{kind}:{registry.spec(value)}" if value is not None else ""


def _referred(word: str) -> Any:
    kind, _, rest = word.partition(":")
    return None if not word else Run(Path(rest)) if kind == "run" else registry.make(kind, rest)


@functools.lru_cache(1)
def _opened(word: str) -> Any:
    return open_source(_referred(word))


@functools.lru_cache(1)
def _loaded(word: str, device: str) -> Encoder | None:
    from bezoar.machine import select_device as chosen

    return None if not word else inputs.load_encoder(_referred(word), chosen(device))


def _blocks(
    found: Any, unit: Unit, encoder: Encoder | None, report: ReadReport, step: Step
) -> Iterator[VectorBlock]:
    """A unit's records with their vectors, not checked yet."""
    if isinstance(found, EmbeddingSource):
        done = 0
        for block in _survived(found.blocks(*unit.place), unit, report):
            yield block
            done += len(block.images)
            step(done / max(1, unit.weight))
        return
    assert encoder is not None
    held = isinstance(found, (Pairs, StoredPairs))
    for fields, images, which, share in (
        _held(found, unit) if held else _streamed(found, unit, report)
    ):
        yield _encoded(encoder, fields, images, which)
        step(share)


def _survived(items: Iterable[T], unit: Unit, report: ReadReport) -> Iterator[T]:
    """A stream up to where its file cannot be read any further, which is named."""
    try:
        yield from items
    except UserError as error:
        report.skipped.append(Skipped(unit.name, "", str(error)))


Batch = tuple[dict[str, list], torch.Tensor, list[int], float]


def _streamed(
    found: ShardSource | TableSource | FolderSource, unit: Unit, report: ReadReport
) -> Iterator[Batch]:
    """Columns of some records, the images they are of (uint8 (n, 3, S, S)), which is whose, and the share that is done."""
    most = max(8, min(MOST, CELLS // (3 * found.size**2)))
    fields: dict[str, list] = {n: [] for n in FIELDS.names}
    images: list[np.ndarray] = []
    which: list[int] = []

    def batch(done: float) -> Batch:
        made = (
            {n: list(c) for n, c in fields.items()},
            torch.from_numpy(np.stack(images)),
            list(which),
            done,
        )
        for column in (*fields.values(), images, which):
            column.clear()
        return made

    before = unit.place[1] if len(unit.place) > 1 else 0
    for record, image in decoding.decode_records(
        _survived(found.records(*unit.place), unit, report), found.size, report
    ):
        assert isinstance(record, StoredRecord)
        images.append(image)
        texts = record.captions or ("",) * len(record.ids)
        for key, caption in zip(record.ids, texts, strict=True):
            row: tuple[Any, ...] = (
                key,
                caption,
                record.member,
                record.url,
                record.shard,
                record.offset,
                record.length,
            )
            for name, value in zip(FIELDS.names, row, strict=True):
                fields[name].append(value)
            which.append(len(images) - 1)
        at = record.offset / 1024 if isinstance(found, ShardSource) else record.offset - before
        if len(images) >= most:
            yield batch(min(1.0, at / unit.weight))
    if images:
        yield batch(1.0)


def _held(found: Pairs | StoredPairs, unit: Unit) -> Iterator[Batch]:
    start, stop = unit.place
    most = max(8, min(MOST, CELLS // (3 * found.size**2)))
    for low, high in block_bounds(stop - start, most):
        rows = range(start + low, start + high)
        part = found.take(rows)
        n = len(part)
        captions = list(part.captions) if part.captions else [""] * n
        values: list[list] = [
            list(part.ids),
            captions,
            [f"row {i}" for i in rows],
            [""] * n,
            [0] * n,
            list(rows),
            [0] * n,
        ]
        yield (
            dict(zip(FIELDS.names, values, strict=True)),
            part.images,
            list(range(n)),
            high / (stop - start),
        )


@torch.inference_mode()
def _encoded(
    encoder: Encoder, fields: dict[str, list], images: torch.Tensor, which: list[int]
) -> VectorBlock:
    """Embed a batch; captions where all have one and the encoder reads them."""
    encoder.eval()
    z = encoder.encode_images(images).float().cpu()[which].numpy()
    captions = fields["caption"]
    texts = (
        encoder.encode_texts(captions).float().cpu().numpy()
        if encoder.text is not None and all(captions)
        else None
    )
    return VectorBlock({n: pa.array(c, FIELDS.field(n).type) for n, c in fields.items()}, z, texts)


def _usable(block: VectorBlock, unit: Unit, report: ReadReport) -> VectorBlock:
    """The records with a finite vector and a decent id, their vectors of unit length; the others are named."""
    ids = block.columns["id"].to_pylist()
    reasons = np.full(len(ids), "", object)
    made = {"image": block.images} | ({} if block.texts is None else {"caption": block.texts})
    lengths = {whose: np.linalg.norm(z.astype(np.float64), axis=1) for whose, z in made.items()}
    for whose, length in lengths.items():
        reasons[~np.isfinite(length)] = f"NaN or infinite vector of its {whose}"
        reasons[length == 0] = f"zero vector of its {whose}"
    for i, key in enumerate(ids):
        if not key or len(key) > LONGEST or not key.isprintable():
            reasons[i] = "unsafe id"
    keep, fields = np.flatnonzero(reasons == ""), block.columns
    if len(keep) < len(ids):
        members = fields["member"].to_pylist()
        for i in np.flatnonzero(reasons != "").tolist():
            report.skipped.append(
                Skipped(unit.name, ascii(members[i] or ids[i])[1:-1][:LONGEST], reasons[i])
            )
        fields = {n: c.take(pa.array(keep)) for n, c in fields.items()}
    z = {whose: _unit(made[whose][keep], lengths[whose][keep, None]) for whose in made}
    return VectorBlock(fields, z["image"], z.get("caption"))


def _unit(z: np.ndarray, length: np.ndarray) -> np.ndarray:
    """float32 (n, D), rows of unit length; those that are already are left to the bit."""
    length = np.where(np.abs(length - 1) < 1e-6, 1, length)
    return (z / length.astype(np.float32)).astype(np.float32)


def _table(block: VectorBlock, unit: Unit) -> pa.Table:
    n = len(block.images)
    numbers = {"shard": [unit.place[0]] * n, "offset": [0] * n, "length": [0] * n}
    return pa.table(
        {
            f.name: block.columns.get(f.name, pa.array(numbers.get(f.name, []), f.type))
            for f in FIELDS
        },
        FIELDS,
    )


def _size(path: Path) -> int:
    """KiB of a file, at least 1: one that is not there any more says so when it is its turn."""
    try:
        return max(1, path.stat().st_size >> 10)
    except OSError:
        return 1


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of change, by which a file that changes later is known."""
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None


def read_records(path: Path) -> Iterator[pa.RecordBatch]:
    """A unit's records, a bounded number at a time."""
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(1 << 14)


def file_names(of: Iterable[Unit]) -> list[str]:
    """The files that units are of, by their number in the source."""
    found: dict[int, str] = {}
    for unit in of:
        found.setdefault(unit.place[0] if unit.name else 0, unit.name)
    return [found.get(i, "") for i in range(max(found, default=-1) + 1)]


if __name__ == "__main__":
    sweep.serve_requests(answer)
