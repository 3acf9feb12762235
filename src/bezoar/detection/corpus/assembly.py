"""Assembly: the files of all units put end to end, what could not be read, and double ids."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bezoar.data.blocks import blocks
from bezoar.data.distinct_ids import DistinctIds, describe_renaming
from bezoar.data.files.paths import printable
from bezoar.data.files.skipped import LISTED, ReadReport, Skipped
from bezoar.data.files.writing import remove_folder, write_whole
from bezoar.data.source import TEXT_COLUMNS, Unit
from bezoar.data.stored_pairs import PLACE
from bezoar.detection.corpus import columns, units
from bezoar.errors import UserError

DONE = "done.json"  # the last file of a corpus
SKIPPED = "skipped.jsonl"  # what was not read, or renamed: [file, member, reason] a line
ROWS = 1 << 16  # rows copied at a time
NUMBERED = r"~\d+$"  # how an id ends that a record got because its own was taken


@dataclass
class UnreadLog:
    """What could not be read: in a file what units name of it, and a report."""

    file: IO[str]
    report: ReadReport = field(default_factory=ReadReport)

    def add(self, file: str, member: str, reason: str) -> None:
        """Take down one more."""
        self.write_line(file, member, reason)
        self.report.leave_out(Skipped(file, member, reason))

    def write_line(self, file: str, member: str, reason: str) -> None:
        """Write a line that does not count as unread."""
        self.file.write(json.dumps((file, member, reason)) + "\n")

    def describe(self) -> str:
        """Name the first of what was not read, and how many more there are."""
        file, *rest = next(iter(self.report.skipped), ("there is none",))
        words = rest if any(text.startswith(file) for text in rest) else [file, *rest]
        count = self.report.reasons.total()
        more = f"; and {count - 1} more" if count > 1 else ""
        return printable(" ".join(filter(None, words))) + more


def assemble(todo: Sequence[Unit], folder: Path, skipped: Path) -> None:
    """Put the files of all units into one of each kind; `DONE`, the last, says what there is.

    Units whose vectors are of another width than the first one's are set aside. Vectors of captions
    are kept if all units have them. A record whose id another had before it is called `ID~2`,
    `ID~3` ...: an id stands for one record.

    Args:
        todo: the units, all whole; their own files are deleted at the end.
        folder: where these files lie.
        skipped: takes what could not be read, or was renamed; it is not written if there is
            nothing.

    Raises:
        UserError: if there is no record at all; the folder is then deleted, so that another attempt
            reads again.
    """
    skipped.unlink(missing_ok=True)  # of an earlier attempt, or a link that is not followed
    with skipped.open("x") as file:
        unread = UnreadLog(file)
        summaries = [_read_summary(unit, folder, unread) for unit in todo]
        width = next((s["images"] for s in summaries if s["read"]), 0)
        usable: list[Unit] = []
        for unit, summary in zip(todo, summaries, strict=True):
            if summary["read"] and summary["images"] == width:
                usable.append(unit)
            elif summary["read"]:
                reason = (
                    f"vectors of another width: {summary['images']}, the first are {width} wide"
                )
                unread.add(unit.file, "", reason)
        if not usable:
            remove_folder(folder)
            raise UserError(
                f"nothing to scan: no record could be read and embedded: {unread.describe()}"
            )
        fitting = [s for s in summaries if s["images"] == width]
        text_widths = {s["texts"] for s in fitting if s["read"]}
        texts = text_widths.pop() if len(text_widths) == 1 else 0
        renamed = sum(s["doubles"] for s in summaries)
        new_ids = _rename_doubles(lambda: _read_ids(usable, folder))
        has_captions = _join(usable, folder, width, texts, new_ids, unread)
    if not skipped.stat().st_size:
        skipped.unlink()
    done = {
        "read": sum(s["read"] for s in fitting),
        "skipped": unread.report.skipped[:LISTED],
        "unread": unread.report.reasons.total(),
        "reasons": dict(unread.report.reasons.most_common()),
        "doubles": renamed + len(new_ids),
        "texts": bool(texts),
        "captions": has_captions,
        "names": units.file_names(todo),
        "states": [s["state"] for s in summaries],
    }
    write_whole(folder / DONE, json.dumps(done))
    remove_units(folder)


def remove_units(folder: Path) -> None:
    """Remove the files of single units, which are no longer needed once there are those of all."""
    for path in list(folder.iterdir()):
        number, _, ending = path.name.partition(".")
        if number.isdecimal() and ending in units.ENDINGS:
            path.unlink(missing_ok=True)


def _read_summary(unit: Unit, folder: Path, unread: UnreadLog) -> dict[str, Any]:
    """Return what a unit's last file says, without what could not be read, which is taken down."""
    summary = units.read_summary(folder, unit)
    assert summary is not None
    unnamed = Counter(summary.pop("reasons"))
    for file, member, reason in summary.pop("skipped"):
        unread.add(file, member, reason)
        unnamed[reason.partition(":")[0]] -= 1
    for entry in summary.pop("renamed"):
        unread.write_line(*entry)
    for reason, count in (+unnamed).items():
        unread.report.reasons[reason] += count
        unread.write_line(unit.file, "", f"{count} more: {reason}")
    return summary


def _join(
    usable: Sequence[Unit],
    folder: Path,
    width: int,
    texts: int,
    new_ids: dict[int, str],
    unread: UnreadLog,
) -> bool:
    """Write the files of all units together; return whether any record has a caption.

    width, texts: dimensions of the vectors of images and of captions; 0 without the latter.
    """
    widths = {"images": width} | ({"texts": texts} if texts else {})
    has_captions = False
    count = 0
    with ExitStack() as stack:
        text_writers = {
            name: stack.enter_context(columns.write_texts(folder, name)) for name in TEXT_COLUMNS
        }
        place_writer = stack.enter_context(columns.write_array(folder / "place.npy", PLACE, None))
        vector_writers = {
            name: stack.enter_context(
                columns.write_array(folder / f"{name}.npy", np.float32, width)
            )
            for name, width in widths.items()
        }
        for unit in usable:
            for name, writer in vector_writers.items():
                vectors = columns.map_array(units.unit_path(folder, unit, f"{name}.npy"))
                for rows in blocks(len(vectors), ROWS):
                    writer.append(vectors[rows])
            for batch in units.read_records(folder, unit):
                batch = _with_new_ids(batch, new_ids, count, unit.file, unread)
                captioned = pc.any(pc.not_equal(batch.column("caption"), ""))
                has_captions = has_captions or bool(captioned.as_py())
                for name, text_writer in text_writers.items():
                    text_writer.append(batch.column(name))
                place_writer.append(_places(batch))
                count += len(batch)
    return has_captions


def _places(batch: pa.RecordBatch) -> np.ndarray:
    """Return where the records of a batch lie: PLACE (n,)."""
    places = np.zeros(len(batch), PLACE)
    places["goal"] = -1
    for name in ("shard", "offset", "length"):
        places[name] = batch.column(name).to_numpy()
    return places


def _read_ids(usable: Sequence[Unit], folder: Path) -> Iterator[pa.Array]:
    """The ids of all records, a block at a time."""
    for unit in usable:
        for batch in units.read_records(folder, unit):
            yield batch.column("id")


def _rename_doubles(read_ids: Callable[[], Iterable[pa.Array]]) -> dict[int, str]:
    """Return row -> new id, for the records whose id another had before them; see `DistinctIds`.

    The ids are read twice, a block at a time, so that this costs 16 bytes a record and not its id.
    """
    hashes = np.concatenate([*map(_hash_ids, read_ids()), np.empty(0, np.int64)])
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(repeated):
        return {}
    new_ids: dict[int, str] = {}
    distinct = DistinctIds()
    start = 0
    for block in read_ids():
        is_suspect = np.isin(_hash_ids(block), repeated)
        numbered = pc.match_substring_regex(block, NUMBERED).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(is_suspect | numbered).tolist():
            key = block[row].as_py()
            if is_suspect[row] or _may_collide(key, repeated):
                new = distinct.claim(key)
                if new != key:
                    new_ids[start + row] = new
        start += len(block)
    return new_ids


def _may_collide(key: str, repeated: np.ndarray) -> bool:
    """Tell whether an id may be what a repeated one is renamed to: that, and `~` and a number."""
    while re.search(NUMBERED, key):
        key = key.rpartition("~")[0]
        at = int(np.searchsorted(repeated, hash(key)))
        if at < len(repeated) and int(repeated[at]) == hash(key):
            return True
    return False


def _hash_ids(ids: pa.Array) -> np.ndarray:
    """Hash ids to int64 (n,); the numbers mean nothing outside this process."""
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids))


def _with_new_ids(
    batch: pa.RecordBatch, new_ids: dict[int, str], start: int, file: str, unread: UnreadLog
) -> pa.RecordBatch:
    """Give the records of a batch, whose first is row `start`, their new ids, and log these."""
    rows = [i for i in range(len(batch)) if start + i in new_ids] if new_ids else []
    if not rows:
        return batch
    ids, members = batch.column("id").to_pylist(), batch.column("member").to_pylist()
    for i in rows:
        unread.write_line(file, members[i], describe_renaming(ids[i], new_ids[start + i]))
        ids[i] = new_ids[start + i]
    column = pa.array(ids, pa.large_string())
    return batch.set_column(batch.schema.get_field_index("id"), "id", column)
