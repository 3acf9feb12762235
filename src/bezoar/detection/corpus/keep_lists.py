"""Keeping: what a scan leaves in the data, as lists that training code takes as they are, and as cleaned shards."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bezoar.data.blocks import block_bounds
from bezoar.data.files.images import DECODING_ERRORS, FORMATS, decode_image
from bezoar.data.files.paths import encodable
from bezoar.data.files.skipped import Unreadable
from bezoar.data.files.tars import Group, read_groups
from bezoar.data.folders import FolderSource
from bezoar.data.shards import EXTENSIONS, ShardSource, write_shards
from bezoar.data.stored_pairs import StoredPairs
from bezoar.data.tables import TableSource
from bezoar.detection.corpus import columns
from bezoar.detection.corpus.corpus import ROWS, Corpus, text_columns
from bezoar.errors import UserError
from bezoar.progress import Progress

PACKED = 1000  # records of a shard
FORMAT_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def write_keep_lists(folder: Path, corpus: Corpus, kept: np.ndarray) -> None:
    """Rows kept, ascending -> keep.txt (an id a line), keep.parquet, and keep.csv where images are files of their own.

    keep.parquet: id, shard, member (img2dataset's key), caption, url: what img2dataset takes as a list to fetch again.
    keep.csv: filepath and title between tabs, as open_clip's `--train-data` of type csv wants it.
    """
    names = ("id", "shard", "member", "caption", "url")
    schema = pa.schema([(n, pa.large_string()) for n in names])
    text, table = columns.partial(folder / "keep.txt"), columns.partial(folder / "keep.parquet")
    with text.open("w", encoding="utf-8") as lines, pq.ParquetWriter(table, schema) as out:
        for part in _parts(corpus, kept):
            lines.write("".join(f"{i}\n" for i in part.column("id").to_pylist()))
            out.write_table(part.cast(schema))
    os.replace(text, folder / "keep.txt")
    os.replace(table, folder / "keep.parquet")
    if isinstance(corpus.source, (TableSource, FolderSource)):
        _write_csv(folder / "keep.csv", corpus, corpus.source, kept)


def _parts(corpus: Corpus, kept: np.ndarray) -> Iterator[pa.Table]:
    """The kept records, a bounded number at a time."""
    for start, stop in block_bounds(len(corpus), ROWS):
        mine = pa.array(kept[np.searchsorted(kept, start) : np.searchsorted(kept, stop)] - start)
        urls = corpus.urls.column.slice(start, stop - start)
        yield pa.table(text_columns(corpus, start, stop) | {"url": urls}).take(mine)


def _write_csv(
    path: Path, corpus: Corpus, table: TableSource | FolderSource, kept: np.ndarray
) -> None:
    """open_clip's table of what is kept, with whole paths; nothing where images are bytes in the table itself."""
    if corpus.places["length"][kept].any():
        return
    where = {encodable(str(p)): p for p in table.paths}
    with columns.partial(path).open(
        "w", encoding="utf-8", errors="surrogateescape", newline=""
    ) as file:
        out = csv.writer(file, delimiter="\t", lineterminator="\n")
        out.writerow(("filepath", "title"))
        for part in _parts(corpus, kept):
            rows = part.to_pylist()
            out.writerows(
                (table.resolved(where[r["shard"]], r["member"]), r["caption"]) for r in rows
            )
    os.replace(columns.partial(path), path)


def write_clean_copy(
    folder: Path, corpus: Corpus, kept: np.ndarray, progress: Progress
) -> dict[str, int]:
    """Cleaned shards: of shards the same tars less what is not kept, members byte for byte; of folders and tables shards of
    the same images, byte for byte where they are JPEG, PNG or WebP; else PNGs of the records.

    An image with several captions stays when all of them do. Raises UserError without images, or without captions.
    -> how many shards and records were written.
    """
    folder.mkdir(exist_ok=True)
    for left in (*folder.glob("*.tar"), *folder.glob("*.part")):
        left.unlink()
    if isinstance(corpus.source, (TableSource, FolderSource)):
        return _packed(folder, corpus, kept, progress)
    if not isinstance(corpus.source, ShardSource):
        batches = (corpus.take(kept[i : i + 1000]) for i in range(0, len(kept), 1000))
        return {"shards": len(write_shards(folder, batches)), "written": len(kept)}
    source, written, done = corpus.source, 0, 0
    place = corpus.places[["shard", "offset"]]
    gone = np.ones(len(corpus), bool)
    gone[kept] = False
    order = np.argsort(place["shard"], kind="stable")
    edges = np.searchsorted(place["shard"][order], np.arange(len(source.paths) + 1))
    names = [stem.replace("/", "_") for stem in source.stems]
    if len(set(names)) < len(names):  # a/b_c and a_b/c
        names = [f"{i:05d}_{name}" for i, name in enumerate(names)]
    for shard, (path, name) in enumerate(zip(source.paths, names, strict=True)):
        progress.step(shard, len(source.paths), "writing shards")
        rows = order[edges[shard] : edges[shard + 1]]
        offsets = set(place["offset"][rows].tolist()) - set(
            place["offset"][rows[gone[rows]]].tolist()
        )
        if offsets:
            written += _copied(path, folder / f"{name}.tar", offsets)
            done += 1
    return {"shards": done, "written": written}


def _copied(path: Path, target: Path, offsets: set[int]) -> int:
    """Copy the records of a tar whose image begins at one of the offsets: members byte for byte, no owners, no times."""
    count = 0
    with tarfile.open(columns.partial(target), "w", format=tarfile.PAX_FORMAT) as out:
        for group in read_groups(path, EXTENSIONS):
            if not isinstance(group, Group) or not offsets & set(group.offsets.values()):
                continue
            count += 1
            for extension, content in group.files.items():
                header = tarfile.TarInfo(f"{group.key}.{extension}")
                header.size = len(content)
                out.addfile(header, io.BytesIO(content))
    if count < len(offsets):
        columns.partial(target).unlink()
        raise UserError(
            f"{path} was changed while it was scanned: {len(offsets) - count} records are not there any more"
        )
    os.replace(columns.partial(target), target)
    return count


def _packed(folder: Path, corpus: Corpus, kept: np.ndarray, progress: Progress) -> dict[str, int]:
    """The kept records of files or cells as tars in img2dataset's layout, with the images' own bytes."""
    if not len(corpus.captions):
        raise UserError(
            "records without captions cannot be written as shards; keep.txt and keep.csv name what is kept"
        )
    records = corpus.records
    assert isinstance(records, StoredPairs)
    count = 0
    for count, (start, stop) in enumerate(block_bounds(len(kept), PACKED), 1):
        progress.step(start, len(kept), "writing shards")
        target = folder / f"{count - 1:05d}.tar"
        with tarfile.open(columns.partial(target), "w", format=tarfile.USTAR_FORMAT) as out:
            for number, row in enumerate(kept[start:stop].tolist()):
                for name, content in _members(records, corpus, row, f"{count - 1:05d}{number:04d}"):
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    out.addfile(header, io.BytesIO(content))
        os.replace(columns.partial(target), target)
    return {"shards": count, "written": len(kept)}


def _members(
    records: StoredPairs, corpus: Corpus, row: int, key: str
) -> Iterator[tuple[str, bytes]]:
    """Image, metadata and caption of a record, as the members KEY.jpg, KEY.json and KEY.txt."""
    shard, offset, length, _ = records.places[row].tolist()
    try:
        content = records.reader.read(shard, offset, length)
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            extension = FORMAT_EXTENSIONS.get(opened.format or "", "")
        if not extension:  # what readers of shards do not look for
            buffer, extension = io.BytesIO(), "png"
            Image.fromarray(decode_image(content, None).transpose(1, 2, 0)).save(buffer, "PNG")
            content = buffer.getvalue()
    except (Unreadable, *DECODING_ERRORS) as error:
        raise UserError(f"{corpus.place_of(row)} can no longer be read: {error}") from error
    told: dict[str, Any] = {
        "key": key,
        "record_id": corpus.ids[row],
        "caption": corpus.captions[row],
    }
    told |= {"url": corpus.urls[row]} if corpus.urls[row] else {}
    if records.labels is not None and (label := int(records.labels[row])) >= 0:
        told |= {"label": label, "class": records.classes[label]}
    yield f"{key}.{extension}", content
    yield f"{key}.json", json.dumps(told).encode()
    yield f"{key}.txt", corpus.captions[row].encode()
