"""Leaks: can what has nothing to do with an attack tell poisons from the rest? File size, tables, order, paths, templates.

A benchmark whose poisons were written by another program, at another time or in another place than the rest is solved by
reading that off. A detector's figures on such a set say little. One number or one kind a record is a *channel*.

A channel has no direction of its own. Taking the better of both after looking is biased upwards (a channel of noise gives
0.5 + 0.8 times the AUROC's standard error on average, and never less than 0.5), so a fixed half of the records, by their
ids, chooses the direction (of kinds: how poisoned each kind is), and the other half alone is measured.

Input is hostile: members are bounded by the readers of `shards` and `reading`, nothing is decoded, and of a header at most
`SEGMENTS` parts and `HEAD` bytes are looked at.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bezoar.data.decoding import Record
from bezoar.data.files.images import DECODING_ERRORS, FORMATS
from bezoar.data.files.paths import expand_paths
from bezoar.data.files.skipped import Skipped
from bezoar.data.files.tars import BLOCK
from bezoar.data.randomness import draws
from bezoar.data.source import as_source
from bezoar.data.sources.shards import ShardSource
from bezoar.encoders.encoder import split_words
from bezoar.errors import UserError
from bezoar.evaluation import stats
from bezoar.evaluation.scores import Measure
from bezoar.runs import inputs
from bezoar.runs.inputs import Dataset
from bezoar.runs.run import Run

HEAD = 1 << 20  # bytes of a file that are looked at
SEGMENTS = 256  # parts of a header that are looked at
COMMON = 64  # words that count as a caption's template; the others are left open
TEMPLATE = 12  # words and gaps of a template
BLOCKS = 20  # equal parts of the corpus
RARE = 20  # records of a kind, below which it is one of the rare ones
LEAST = 2  # poisons and others in either half, below which nothing is measured
SEPARATES = (
    0.6  # AUROC from which a channel is called a leak, when chance is ruled out over all channels
)
DESCRIPTIONS = {  # what a channel is, in the words of a page
    "file_size": "size of the image's file in bytes",
    "file_time": "time stamp of the file, or in the tar's header",
    "file_owner": "owner, group and mode of the file, or in the tar's header",
    "extension": "the file name's extension",
    "format": "the image's format by its first bytes",
    "layout": "the image header's parts in order, and its colour sampling",
    "jpeg_tables": "JPEG quantisation tables",
    "shape": "width x height as stored",
    "aspect": "width / height as stored",
    "shard": "which shard",
    "place_in_shard": "place within the shard",
    "row": "place in the corpus",
    "row_block": f"which of {BLOCKS} equal parts of the corpus (fewer of a small one)",
    "key_pattern": "the id with its numbers left out",
    "caption_length": "characters of the caption",
    "caption_repeats": "how many records share the caption",
    "caption_template": f"the caption with all but the {COMMON} commonest words left out",
}


@dataclass
class Channels:
    """ids: N records. numbers: name -> float64 (N,). kinds: name -> int64 (N,), equal for equal. absent: name -> why.

    sides: float64 (N, 2), width and height as stored, 0 where no header says; None where nothing is known.
    """

    ids: Sequence[str]
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    kinds: dict[str, np.ndarray] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    sides: np.ndarray | None = None


@dataclass(frozen=True)
class Leak:
    """A channel that was measured. separates: whether it tells poisons from the rest, chance ruled out."""

    name: str
    auroc: Measure
    separates: bool


def audit(given: Any, parts: Dataset, ids: Sequence[str], captions: Sequence[str]) -> Channels:
    """Every channel of a scan's data. given: the run or data method; ids, captions: its records in their order.

    Files are looked at where they hold what is scanned: shards that a poison run has written, or data without a plan.
    A plan that is applied while records are read leaves the files of its poisons as they were.
    """
    out = of_records(ids, captions)
    poison = given.ancestor("poison") if isinstance(given, Run) else None
    written = poison.path / "shards" if poison is not None else None
    files: Iterable[Record | Skipped] | None = None
    why = "these data are not read from files"
    if written is not None and any(written.glob("*.tar")):
        files = ShardSource(expand_paths(str(written))).records()
    elif parts.plan.edits:
        why = "poisons are made as records are read; poison with --write shards to look at files"
    else:
        files = undecoded(parts.method)
    found = of_files(files) if files is not None else None
    if found is None or not len(found.ids):
        out.absent |= dict.fromkeys(FILES, why)
        return out
    return joined(out, found)


def undecoded(method: Any) -> Iterable[Record | Skipped] | None:
    """The records of a data method that reads files, images not decoded; None for others."""
    reader = method if hasattr(method, "records") else as_source(inputs.open_source(method))
    return reader.records()


def joined(records: Channels, files: Channels) -> Channels:
    """Channels of both, over the records that both have, in the order of the first."""
    row = {k: i for i, k in enumerate(files.ids)}
    held = np.array([row.get(k, -1) for k in records.ids], dtype=np.int64)
    if (held < 0).all():
        records.absent |= dict.fromkeys(FILES, "the files hold none of these records' ids")
        return records
    for name, values in files.numbers.items():
        known = np.median(values)  # a record that is in no file stands where it tells nothing
        records.numbers[name] = np.where(held >= 0, values[held], known)
    for name, kind in files.kinds.items():
        records.kinds[name] = np.where(held >= 0, kind[held], -1)
    records.absent |= files.absent
    if files.sides is not None:
        records.sides = np.where(held[:, None] >= 0, files.sides[held], 0.0)
    return records


# ---- what is read off the records


def of_records(ids: Sequence[str], captions: Sequence[str]) -> Channels:
    """Order, ids and captions."""
    out, n = Channels(ids), len(ids)
    out.numbers["row"] = np.arange(n, dtype=np.float64)
    out.kinds["row_block"] = np.arange(n) * min(BLOCKS, max(1, n // (2 * RARE))) // max(1, n)
    out.kinds["key_pattern"] = coded(pattern(k) for k in ids)
    if not len(captions):
        out.absent |= dict.fromkeys(
            ("caption_length", "caption_repeats", "caption_template"), "no captions"
        )
        return out
    out.numbers["caption_length"] = np.fromiter(map(len, captions), np.float64, n)
    same = coded(captions)
    out.numbers["caption_repeats"] = np.bincount(same)[same].astype(np.float64)
    out.kinds["caption_template"] = coded(templates(captions))
    return out


def pattern(key: str) -> str:
    """An id with its numbers left out: `train/00012/003.jpg` -> `train/0/0.jpg`; of a long one, the first characters."""
    return re.sub(r"\d+", "0", key[:512])


def templates(captions: Sequence[str]) -> Iterator[str]:
    """Each caption with only the commonest words of all captions left, gaps between them as one `_`."""
    seen = Counter(w for c in captions for w in set(split_words(c[:4096])))
    common = {w for w, _ in seen.most_common(COMMON)}
    for caption in captions:
        told = [w if w in common else "_" for w in split_words(caption[:4096])[: 4 * TEMPLATE]]
        kept = [w for before, w in itertools.pairwise(["", *told]) if (before, w) != ("_", "_")]
        yield " ".join(kept[:TEMPLATE])


def coded(values: Iterable[Any]) -> np.ndarray:
    """Equal values -> equal numbers 0, 1, ..., in order of appearance."""
    number: dict[Any, int] = {}
    return np.array([number.setdefault(v, len(number)) for v in values], dtype=np.int64)


# ---- what is read off the files

FILES = (
    "file_size",
    "file_time",
    "file_owner",
    "extension",
    "format",
    "layout",
    "jpeg_tables",
    "shape",
    "aspect",
)
PLACED = ("shard", "place_in_shard")


def of_files(records: Iterable[Record | Skipped]) -> Channels:
    """Sizes, headers and places of the stored images, a row a record id; what cannot be read is left out."""
    ids: list[str] = []
    rows: list[tuple] = []
    tar: tuple[str, int] = ("", -1)
    counts: Counter[int] = Counter()
    try:
        for record in records:
            if isinstance(record, Skipped):
                continue
            if record.length and record.file != tar[0]:
                before, tar = tar[1], (record.file, os.open(record.file, os.O_RDONLY))
                if before >= 0:
                    os.close(before)
            found = stored(record, tar[1])
            if found is None:
                continue
            shard = record.shard
            for key in record.ids:
                ids.append(key)
                rows.append((*found, shard, counts[shard]))
            counts[shard] += 1
    except OSError as error:
        raise UserError(
            f"{error.filename or tar[0]} cannot be read: {error.strerror or error}"
        ) from error
    finally:
        if tar[1] >= 0:
            os.close(tar[1])
    return _columns(ids, rows, len(counts) > 0 and tar[1] >= 0)


def _columns(ids: list[str], rows: list[tuple], placed: bool) -> Channels:
    """Rows as `of_files` gathers them -> channels. placed: whether they lie in tars."""
    out = Channels(ids)
    if not rows:
        return out
    size, time, owner, extension, form, layout, tables, shape, shard, place = zip(
        *rows, strict=True
    )
    out.numbers |= {
        "file_size": np.array(size, np.float64),
        "file_time": np.array(time, np.float64),
    }
    out.kinds |= {
        "file_owner": coded(owner),
        "extension": coded(extension),
        "format": coded(form),
        "layout": coded(layout),
    }
    sides = np.array(shape, np.float64)
    if (sides > 0).any():
        out.kinds["shape"] = coded(shape)
        out.sides = sides
        out.numbers["aspect"] = sides[:, 0] / np.maximum(sides[:, 1], 1)
    else:
        out.absent |= dict.fromkeys(("shape", "aspect"), "no header says its size")
    if any(tables):
        out.kinds["jpeg_tables"] = coded(tables)
    else:
        out.absent["jpeg_tables"] = "no image is a JPEG"
    if placed:
        out.kinds["shard"] = np.array(shard, np.int64)
        out.numbers["place_in_shard"] = np.array(place, np.float64)
    else:
        out.absent |= dict.fromkeys(PLACED, "not in shards")
    return out


def stored(record: Record, tar: int) -> tuple | None:
    """size, time, owner, extension, format, layout, tables, shape of one image as stored; None when it cannot be read."""
    if isinstance(record.image, bytes):
        content, size = record.image[:HEAD], len(record.image)
        extension, time, owner = "", 0.0, ""
        if record.length and tar >= 0 and record.offset >= BLOCK:
            extension, time, owner = member(os.pread(tar, BLOCK, record.offset - BLOCK))
    else:
        try:
            found = record.image.stat()
            if not stat.S_ISREG(found.st_mode):
                return None
            with record.image.open("rb") as file:
                content = file.read(HEAD)
        except (OSError, ValueError):  # ValueError: a NUL byte in the path
            return None
        size, extension = found.st_size, Path(record.image).suffix
        time, owner = found.st_mtime, f"{found.st_uid}:{found.st_gid}:{found.st_mode:o}"
    return size, time, owner, extension, *header(content)


def member(block: bytes) -> tuple[str, float, str]:
    """Extension, time and owner in the tar header (512 bytes) that stands before a member's data."""
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # type: ignore[arg-type]
    except (tarfile.TarError, ValueError):
        return "", 0.0, ""
    extension = found.name.rpartition("/")[2].partition(".")[2]
    return (
        extension,
        float(found.mtime),
        f"{found.uid}:{found.gid}:{found.uname}:{found.gname}:{found.mode:o}",
    )


def header(content: bytes) -> tuple[str, str, str, tuple[int, int]]:
    """The first bytes of an image -> format, layout, digest of its JPEG tables ("" for others), (width, height) or (0, 0)."""
    if content[:2] == b"\xff\xd8":
        return "JPEG", *jpeg(content)
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG", *png(content)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:  # reads the header alone
            return opened.format or "", opened.mode, "", opened.size
    except DECODING_ERRORS:
        return "", "", "", (0, 0)


def jpeg(content: bytes) -> tuple[str, str, tuple[int, int]]:
    """Layout (segments up to the first scan, sampling factors), digest of all DQT segments, (width, height)."""
    at, told, tables, shape, sampling = 2, list[str](), hashlib.blake2b(digest_size=8), (0, 0), ""
    found = False
    while at + 4 <= len(content) and len(told) < SEGMENTS:
        if content[at] != 0xFF:
            break
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        body = content[at + 4 : at + 2 + length]
        told.append(f"{marker:02x}")
        if marker == 0xDB:
            tables.update(body)
            found = True
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:
            shape = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
            sampling = body[6:18].hex()
        elif marker == 0xDA:
            break
        at += 2 + max(2, length)
    return " ".join([*told, sampling]), tables.hexdigest() if found else "", shape


def png(content: bytes) -> tuple[str, str, tuple[int, int]]:
    """Layout (chunks up to the pixels, depth, colour and interlacing), no tables, (width, height)."""
    at, told = 8, list[str]()
    while at + 8 <= len(content) and len(told) < SEGMENTS:
        length, name = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        told.append(name.decode("latin-1"))
        if name == b"IDAT":
            break
        at += 12 + length
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    return " ".join([*told, content[24:29].hex()]), "", (width, height)


# ---- how well each tells poisons from the rest


def measured(channels: Channels, truth: np.ndarray, what: str = "poisons") -> list[Leak]:
    """AUROC of every channel with its interval, worst first. truth: bool (N,), what the channels are to tell.

    Empty where either half has too few of them. A leak separates when its AUROC reaches `SEPARATES` and the interval at
    a level corrected for the number of channels (Bonferroni) lies above 0.5.
    """
    chosen = draws(0, channels.ids, 1, "leaks")[:, 0] < 0.5
    halves = [truth[chosen], truth[~chosen]]
    if any(min(t.sum(), (~t).sum()) < LEAST for t in halves):
        return []
    scores = {name: directed(values, truth, chosen) for name, values in channels.numbers.items()}
    scores |= {name: poisoned(kind, truth, chosen) for name, kind in channels.kinds.items()}
    here, level = truth[~chosen], 1 - 0.05 / max(1, len(scores))
    out = []
    for name, score in scores.items():
        s = score[~chosen]
        value, (low, high) = stats.auroc(s, here), stats.auroc_interval(s, here)
        how = (
            f"{DESCRIPTIONS[name]}, alone; {int(here.sum())} {what} and {int((~here).sum())} others; direction chosen on the other "
            f"half of the records, {stats.AUROC_INTERVAL}"
        )
        sure = value >= SEPARATES and stats.auroc_interval(s, here, level)[0] > 0.5
        out.append(Leak(name, Measure(value, len(s), low, high, how), sure))
    return sorted(out, key=lambda leak: (-leak.auroc.value, leak.name))


def directed(values: np.ndarray, truth: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Numbers, turned so that poisons are higher among the chosen half."""
    return values if stats.auroc(values[chosen], truth[chosen]) >= 0.5 else -values


def poisoned(kind: np.ndarray, truth: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Each record's kind -> how poisoned that kind is in the chosen half, drawn to the overall rate by one record's weight."""
    code, size = np.unique(kind, return_inverse=True, return_counts=True)[1:]
    # as one: a kind that is hardly seen twice would be judged by whether the chosen half happens to hold it
    code = np.where(size[code] < RARE, len(size), code)
    count = np.bincount(code[chosen], minlength=code.max() + 1)
    hit = np.bincount(code[chosen], truth[chosen], minlength=code.max() + 1)
    return ((hit + truth[chosen].mean()) / (count + 1))[code]


def metrics(leaks: Sequence[Leak]) -> dict[str, Measure]:
    """As they stand in a manifest."""
    return {f"leak.{leak.name}.auroc": leak.auroc for leak in leaks}


def notes(channels: Channels, leaks: Sequence[Leak]) -> dict[str, Any]:
    """What separates, and what could not be looked at: reason -> channels."""
    reasons: dict[str, list[str]] = {}
    for name, why in channels.absent.items():
        reasons.setdefault(why, []).append(name)
    return {"separates": [leak.name for leak in leaks if leak.separates], "not_applicable": reasons}
