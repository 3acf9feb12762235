"""Assembly: the files of all units of a corpus put end to end; what could not be read is listed, double ids are told apart."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bezoar.data.blocks import block_bounds
from bezoar.data.stored_pairs import PLACE
from bezoar.detection.corpus import columns, units
from bezoar.detection.corpus.units import Unit
from bezoar.errors import UserError

SKIPPED = "skipped.jsonl"  # what was not read, or renamed: [file, member, reason] a line
LISTED = 1000  # of it, how much stands in the manifest
ROWS = 1 << 16  # rows copied at a time


@dataclass
class Unread:
    """What could not be read: all of it in a file, counted by reason, the first of it at hand."""

    file: IO[str]
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, file: str, member: str, reason: str) -> None:
        """One more."""
        self.file.write(json.dumps((file, member, reason)) + "\n")
        self.reasons[reason.partition(":")[0]] += 1
        if len(self.first) < LISTED:
            self.first.append((file, member, reason))


def assemble(todo: Sequence[Unit], folder: Path, skipped: Path) -> None:
    """The files of all units -> one of each kind; `done.json`, the last, says what there is; then the units' own go.

    Units whose vectors are of another width than the first one's are set aside, captions' vectors are kept when all units
    have them, and a record with an id that was there before is called `ID~2`, `ID~3` ...: an id stands for one record.
    Raises UserError when there is no record at all; then nothing is kept, so that another attempt reads again.
    """
    with skipped.open("w") as file:
        unread = Unread(file)
        told = [_told(unit, folder, unread) for unit in todo]
        width = next((t["images"] for t in told if t["read"]), 0)
        for unit, t in zip(todo, told, strict=True):
            if t["read"] and t["images"] != width:
                unread.add(
                    unit.name,
                    "",
                    f"vectors of another width: {t['images']}, the first are {width} wide",
                )
        good = [u for u, t in zip(todo, told, strict=True) if t["read"] and t["images"] == width]
        if not good:
            where, *rest = unread.first[0] if unread.first else ("there is none",)
            why = " ".join(
                filter(None, rest if any(w.startswith(where) for w in rest) else (where, *rest))
            )
            more = f"; and {n - 1} more" if (n := unread.reasons.total()) > 1 else ""
            shutil.rmtree(folder)
            raise UserError(f"nothing to scan: no record could be read and embedded: {why}{more}")
        deep = {t["texts"] for t in told if t["read"] and t["images"] == width}
        texts = deep.pop() if len(deep) == 1 else 0
        renamed = _renamed([u.file(folder, "parquet") for u in good])
        captions = _joined(good, folder, width, texts, renamed, file)
    if not skipped.stat().st_size:
        skipped.unlink()
    told_of = {
        "read": sum(t["read"] for t in told if t["images"] == width), "skipped": unread.first,
        "unread": unread.reasons.total(), "reasons": dict(unread.reasons.most_common()), "doubles": len(renamed),
        "texts": bool(texts), "captions": captions, "names": units.file_names(todo), "states": [t["state"] for t in told],
    }  # fmt: skip
    columns.partial(folder / "done.json").write_text(json.dumps(told_of))
    os.replace(columns.partial(folder / "done.json"), folder / "done.json")
    for unit in todo:
        for ending in ("images.npy", "texts.npy", "parquet", "json"):
            unit.file(folder, ending).unlink(missing_ok=True)


def _told(unit: Unit, folder: Path, unread: Unread) -> dict[str, Any]:
    """What a unit's last file says, less what could not be read, which is taken down."""
    told = unit.summary(folder)
    assert told is not None
    for what in told.pop("skipped"):
        unread.add(*what)
    return told


def _joined(
    good: Sequence[Unit],
    folder: Path,
    width: int,
    texts: int,
    renamed: dict[int, str],
    file: IO[str],
) -> bool:
    """Write the files that all units have together. -> whether any record has a caption."""
    captions, count = False, 0
    with ExitStack() as stack:
        rows = {n: stack.enter_context(columns.TextWriter(folder, n)) for n in units.TEXTS}
        place = stack.enter_context(columns.ArrayWriter(folder / "place.npy", PLACE, None))
        kinds = {"images": width} | ({"texts": texts} if texts else {})
        z = {
            n: stack.enter_context(columns.ArrayWriter(folder / f"{n}.npy", np.float32, w))
            for n, w in kinds.items()
        }
        for unit in good:
            for name, out in z.items():
                own = columns.map_array(unit.file(folder, f"{name}.npy"))
                for start, stop in block_bounds(len(own), ROWS):
                    out.append(own[start:stop])
            for batch in units.read_records(unit.file(folder, "parquet")):
                batch, lines = _told_apart(batch, renamed, count, unit.name)
                file.writelines(lines)
                captions = captions or bool(
                    pc.any(pc.not_equal(batch.column("caption"), "")).as_py()
                )
                for name, column in rows.items():
                    column.append(batch.column(name))
                places = np.zeros(len(batch), PLACE)
                places["goal"] = -1
                for name in ("shard", "offset", "length"):
                    places[name] = batch.column(name).to_numpy()
                place.append(places)
                count += len(batch)
    return captions


def _renamed(files: Sequence[Path]) -> dict[int, str]:
    """Row -> another id, of the records whose id another had before them. Costs 16 bytes a record."""
    marks = np.concatenate(
        [_marks(b) for path in files for b in units.read_records(path)] or [np.empty(0, np.int64)]
    )
    marks.sort()
    twice = np.unique(marks[1:][marks[1:] == marks[:-1]])
    if not len(twice):
        return {}
    out: dict[int, str] = {}
    seen: Counter[str] = Counter()
    row = 0
    for batch in (b for path in files for b in units.read_records(path)):
        suspects = np.flatnonzero(np.isin(_marks(batch), twice))
        for i, key in zip(
            suspects.tolist(), batch.column("id").take(pa.array(suspects)).to_pylist(), strict=True
        ):
            seen[key] += 1
            if seen[key] > 1:
                out[row + i] = key
        row += len(batch)
    number: Counter[str] = Counter()
    for i, key in out.items():
        number[key] += 1
        while _among(marks, new := f"{key}~{number[key] + 1}"):
            number[key] += 1
        out[i] = new
    return out


def _among(marks: np.ndarray, key: str) -> bool:
    """Whether an id is there, or seems so, among the sorted marks of all."""
    at = int(np.searchsorted(marks, hash(key)))
    return at < len(marks) and int(marks[at]) == hash(key)


def _marks(batch: pa.RecordBatch) -> np.ndarray:
    """A number for each id, the same within this process and of no meaning outside: equal ids have equal numbers."""
    return np.fromiter(map(hash, batch.column("id").to_pylist()), np.int64, len(batch))


def _told_apart(
    batch: pa.RecordBatch, renamed: dict[int, str], start: int, file: str
) -> tuple[pa.RecordBatch, list[str]]:
    """A batch whose first record is row `start`, with the new ids, and a line of JSON for each."""
    mine = [i for i in range(len(batch)) if start + i in renamed] if renamed else []
    if not mine:
        return batch, []
    ids, members = batch.column("id").to_pylist(), batch.column("member").to_pylist()
    lines = []
    for i in mine:
        lines.append(
            json.dumps(
                (file, members[i], f"id seen before: {ids[i]} is called {renamed[start + i]} here")
            )
            + "\n"
        )
        ids[i] = renamed[start + i]
    return batch.set_column(
        batch.schema.get_field_index("id"), "id", pa.array(ids, pa.large_string())
    ), lines
