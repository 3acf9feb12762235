"""Units: a source cut into pieces, each embedded by itself, with the same result in any order.

A unit is a shard, or a block of a table, a folder, ready embeddings or records in memory; its
source says which. What is made of it lies in files of its own, the last of which says that it is
whole; a scan that was cut off goes on with the units that are missing. Units are done in this
process, in worker processes, or as Ray tasks; the files are the same.
"""

import functools
import json
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bezoar import registry
from bezoar.data.files.artefacts import read_facts
from bezoar.data.files.skipped import ReadReport, Skipped
from bezoar.data.files.writing import TEMPORARY, make_folder, whole_file, write_whole
from bezoar.data.source import COLUMNS, RecordBlock, Source, Unit, VectorBlock, as_source
from bezoar.detection.corpus import columns
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.progress import Progress
from bezoar.runs import inputs, sweep
from bezoar.runs.devices import select_device
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings

MAX_ID_LENGTH = 1024  # characters
BATCH_ROWS = 1 << 14  # records read again at a time
ENDINGS = ("images.npy", "texts.npy", "parquet", "json")  # of the files of a unit
Report = Callable[[float], None]  # takes how much is done


@functools.lru_cache(1)
def open_source(data: Any) -> Source:
    """Return the source that a run or a data method is scanned by.

    It is the data method's own if that can be cut as it is; under a plan or a limit, it is the data
    set read as a whole. Raises UserError if a plan is to go over ready embeddings.
    """
    dataset = inputs.open_dataset(data)
    source = as_source(inputs.open_source(dataset.method))
    if source.divisible and not dataset.plan.edits:
        return source
    if not source.has_images:
        raise UserError("ready embeddings cannot be poisoned: there is no image to change")
    return as_source(dataset.records)


def unit_path(folder: Path, unit: Unit, ending: str) -> Path:
    """One of the files that are made of a unit; see ENDINGS."""
    return folder / f"{unit.number:05d}.{ending}"


def read_summary(folder: Path, unit: Unit) -> dict[str, Any] | None:
    """Return what a unit's last file says of it; None while the unit is not whole."""
    path = unit_path(folder, unit, "json")
    return read_facts(path) if path.exists() else None


def write_summary(folder: Path, unit: Unit, report: ReadReport, facts: dict[str, Any]) -> None:
    """Write a unit's last file, with which it is whole."""
    names = ("skipped", "reasons", "renamed", "doubles")
    summary = {name: getattr(report, name) for name in names} | facts
    write_whole(unit_path(folder, unit, "json"), json.dumps(summary))


def read_records(folder: Path, unit: Unit) -> Iterator[pa.RecordBatch]:
    """Read a unit's records, a bounded number at a time."""
    with pq.ParquetFile(unit_path(folder, unit, "parquet")) as file:
        yield from file.iter_batches(BATCH_ROWS)


def file_names(units: Iterable[Unit]) -> list[str]:
    """The files that units are of, by their number in the source."""
    names: dict[int, str] = {}
    for unit in units:
        names.setdefault(unit.place[0] if unit.file else 0, unit.file)
    return [names.get(i, "") for i in range(max(names, default=-1) + 1)]


# Embedding one unit


def embed_unit(
    source: Source,
    unit: Unit,
    encoder: Encoder | None,
    folder: Path,
    report_progress: Report = lambda done: None,
) -> None:
    """Make a unit's files: vectors, records, and last what was read, as JSON.

    What cannot be read, and what the encoder gives no finite vector of, is named in the last;
    nothing of it is kept.
    """
    report = ReadReport()
    widths = {"images": 0, "texts": 0}
    count = 0
    stamp = source.stamp(unit)
    with ExitStack() as stack:
        writers: dict[str, columns.ArrayWriter] = {}
        file = stack.enter_context(whole_file(unit_path(folder, unit, "parquet"), "wb"))
        table = stack.enter_context(pq.ParquetWriter(file, COLUMNS, compression="zstd"))
        for block in source.read(unit, report):
            vectors = _select_usable(_embed_block(block, encoder), unit, report)
            for name, z in (("images", vectors.images), ("texts", vectors.texts)):
                if z is None or not len(z):
                    continue
                if name not in writers:
                    path = unit_path(folder, unit, f"{name}.npy")
                    writer = columns.write_array(path, np.float32, z.shape[1])
                    writers[name] = stack.enter_context(writer)
                writers[name].append(z)
                widths[name] = z.shape[1]
            table.write_table(pa.table(vectors.columns, COLUMNS))
            count += len(vectors.images)
            report_progress(block.done)
    write_summary(folder, unit, report, {"read": count, "state": stamp, **widths})


def refuse_unit(unit: Unit, folder: Path, reason: str) -> None:
    """Set a whole unit aside."""
    report = ReadReport()
    report.leave_out(Skipped(unit.file, "", reason))
    write_summary(folder, unit, report, {"read": 0, "state": None, "images": 0, "texts": 0})


@torch.inference_mode()
def _embed_block(block: RecordBlock | VectorBlock, encoder: Encoder | None) -> VectorBlock:
    """Embed a batch; captions only if all records have one and the encoder reads them."""
    if isinstance(block, VectorBlock):
        return block
    assert encoder is not None
    encoder.eval()
    z = encoder.encode_images(block.images).float().cpu()[block.image_rows].numpy()
    captions = [row.caption for row in block.rows]
    texts = None
    if encoder.text is not None and all(captions):
        texts = encoder.encode_texts(captions).float().cpu().numpy()
    arrays = {
        field.name: pa.array(values, field.type)
        for field, values in zip(COLUMNS, zip(*block.rows, strict=True), strict=True)
    }
    return VectorBlock(arrays, z, texts, block.done)


def _select_usable(block: VectorBlock, unit: Unit, report: ReadReport) -> VectorBlock:
    """Return the records with finite vectors and a safe id, normalised; name the others."""
    ids = block.columns["id"].to_pylist()
    reasons = np.full(len(ids), "", object)
    vectors = {"image": block.images}
    if block.texts is not None:
        vectors["caption"] = block.texts
    lengths = {whose: np.linalg.norm(z.astype(np.float64), axis=1) for whose, z in vectors.items()}
    for whose, length in lengths.items():
        reasons[~np.isfinite(length)] = f"NaN or infinite vector of its {whose}"
        reasons[length == 0] = f"zero vector of its {whose}"
    for i, key in enumerate(ids):
        if not key or len(key) > MAX_ID_LENGTH or not key.isprintable():
            reasons[i] = "unsafe id"
    usable = np.flatnonzero(reasons == "")
    arrays = block.columns
    if len(usable) < len(ids):
        members = arrays["member"].to_pylist()
        for i in np.flatnonzero(reasons != "").tolist():
            name = ascii(members[i] or ids[i])[1:-1][:MAX_ID_LENGTH]
            report.leave_out(Skipped(unit.file, name, reasons[i]))
        arrays = {name: array.take(pa.array(usable)) for name, array in arrays.items()}
    unit_vectors = {
        whose: _normalise(z[usable], lengths[whose][usable, None]) for whose, z in vectors.items()
    }
    return VectorBlock(arrays, unit_vectors["image"], unit_vectors.get("caption"), block.done)


def _normalise(z: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Scale rows of float32 (n, D), of lengths (n, 1), to unit length; unit rows keep bits."""
    length = np.where(np.abs(length - 1) < 1e-6, 1, length)
    return (z / length.astype(np.float32)).astype(np.float32)


# Embedding all units


def embed_all(
    data: Any, by: Any, units: Sequence[Unit], folder: Path, settings: Settings, progress: Progress
) -> None:
    """Make the files of all units that have none yet.

    One process does it if the records are in its memory or there is but one unit; worker processes,
    as a sweep's, if they are read from files; Ray tasks when asked for.

    Args:
        data: the run or data method that is scanned.
        by: what embeds it: a run or a network; None for ready embeddings.
        settings: workers, device and Ray.
    """
    make_folder(folder)
    for leftover in folder.glob(f"*{TEMPORARY}"):
        leftover.unlink()
    missing = [u for u in units if read_summary(folder, u) is None]
    total = sum(u.weight for u in missing)
    source = open_source(data)
    text = ", ".join(filter(None, ("embedding", source.progress_unit)))

    def report(done: float) -> None:
        progress.step(int(done), total, text)

    report(0)
    workers = 1
    if source.divisible and by is not None:
        workers = min(len(missing), settings.workers or sweep.worker_count(settings))
    if settings.ray or workers > 1:
        request = {
            "data": _reference(data, "data"),
            "encoder": _reference(by, "network"),
            "folder": str(folder.absolute()),
            "cwd": str(Path.cwd()),
            "device": settings.device,
        }
        _embed_in_workers(request, missing, folder, settings, workers, report)
    else:
        _embed_here(source, load_encoder(by, settings.device), missing, folder, report)


def _embed_here(
    source: Source, encoder: Encoder | None, units: Sequence[Unit], folder: Path, report: Report
) -> None:
    """Embed units in this process. report: takes the weight of what is done."""
    done = 0
    for unit in units:

        def report_unit(share: float, start: int = done, weight: int = unit.weight) -> None:
            report(start + share * weight)

        embed_unit(source, unit, encoder, folder, report_unit)
        done += unit.weight


def _embed_in_workers(
    request: dict[str, str],
    units: Sequence[Unit],
    folder: Path,
    settings: Settings,
    workers: int,
    report: Report,
) -> None:
    """Embed units in workers or as Ray tasks. request: common to all, see `answer_request`."""
    done = 0
    waiting = list(reversed(units))
    with sweep.worker_pool(settings, workers, answer_request) as (submit, places):
        running: dict[Future[dict[str, Any]], Unit] = {}
        while waiting or running:
            while waiting and len(running) < places:
                unit = waiting.pop()
                running[submit({**request, "unit": asdict(unit)})] = unit
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                unit, answer = running.pop(future), future.result()
                _check_answer(answer, unit, folder)
                done += unit.weight
                report(done)


def _check_answer(answer: dict[str, Any], unit: Unit, folder: Path) -> None:
    """Set a unit aside if its worker died over it. Raises what else went wrong."""
    if "refused" in answer:
        raise UserError(answer["refused"])
    if "bug" in answer:
        raise RuntimeError(f"a worker failed at {unit.file or unit.number}: {answer['bug']}")
    if "error" in answer:
        refuse_unit(unit, folder, answer["error"])


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    """Embed a unit in a worker.

    Returns:
        `{"done": number}`, `{"refused": what the user must be told}`, or `{"bug": what failed}`.
    """
    try:
        os.chdir(request["cwd"])
        fields = request["unit"]
        unit = Unit(**{**fields, "place": tuple(fields["place"])})
        encoder = _load_encoder(request["encoder"], request["device"])
        embed_unit(_open_source(request["data"]), unit, encoder, Path(request["folder"]))
        return {"done": unit.number}
    except UserError as error:
        return {"refused": str(error)}
    except OSError as error:
        return {"refused": f"{error.filename or request['folder']}: {error.strerror or error}"}
    except Exception as error:  # whoever asked must hear of it
        traceback.print_exc()
        return {"bug": f"{type(error).__name__}: {error}"}


def load_encoder(by: Any, device: str) -> Encoder | None:
    """Load the encoder of a run or a method, one object for all who ask; None of None."""
    return _load_encoder(_reference(by, "network"), device)


def _reference(value: Any, kind: str) -> str:
    """Name a run or a method so that another process can find it."""
    if isinstance(value, Run):
        return f"run:{value.path.absolute()}"
    return f"{kind}:{registry.spec(value)}" if value is not None else ""


def _resolve(reference: str) -> Any:
    kind, _, rest = reference.partition(":")
    return Run(Path(rest)) if kind == "run" else registry.make(kind, rest)


@functools.lru_cache(1)
def _open_source(reference: str) -> Source:
    return open_source(_resolve(reference))


@functools.lru_cache(1)
def _load_encoder(reference: str, device: str) -> Encoder | None:
    if not reference:
        return None
    return inputs.load_encoder(_resolve(reference), select_device(device))


if __name__ == "__main__":
    sweep.serve_requests(answer_request)
