"""Lists of the records that a scan keeps, for training code, and cleaned shards."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bezoar.data.blocks import blocks
from bezoar.data.files.writing import TEMPORARY, make_folder, whole_file
from bezoar.detection.corpus.corpus import ROWS, Corpus
from bezoar.evaluation.scores import Scores
from bezoar.progress import Progress

COLUMNS = pa.schema(
    [(name, pa.large_string()) for name in ("id", "shard", "member", "caption", "url")]
)


def write_keep_lists(folder: Path, corpus: Corpus, kept_rows: np.ndarray) -> None:
    """Write keep.txt, keep.parquet, and keep.csv where images are files of their own.

    keep.txt holds an id a line. keep.parquet holds id, shard, member (img2dataset's key), caption
    and url: what img2dataset takes as a list to fetch again. keep.csv holds filepath and title
    between tabs, as open_clip's `--train-data` of type csv wants it.

    Args:
        kept_rows: rows of the records that stay, ascending.
    """
    with (
        whole_file(folder / "keep.txt") as text,
        whole_file(folder / "keep.parquet", "wb") as file,
        pq.ParquetWriter(file, COLUMNS) as table,
    ):
        for rows in _kept_blocks(corpus, kept_rows):
            part = _take(corpus, rows)
            text.write("".join(f"{key}\n" for key in part.column("id").to_pylist()))
            table.write_table(part)
    if corpus.source.has_image_files and not corpus.places["length"][kept_rows].any():
        _write_csv(folder / "keep.csv", corpus, kept_rows)


def find_copy(row: int, captions: Sequence[str], scores: Iterable[Scores]) -> int | None:
    """Find another record of a record's picture, with another caption if there is one.

    Args:
        row: of the record.
        captions: of all records; empty where there are none.
        scores: of detectors, of which some find groups; see `Scores.groups`.

    Returns:
        The row of the copy; None where no detector counts the record among copies.
    """
    for groups in (s.groups.cpu().numpy() for s in scores if s.groups is not None):
        if groups[row] < 0:
            continue
        copies = np.flatnonzero(groups == groups[row])
        others: list[int] = [copy for copy in copies.tolist() if copy != row]
        unlike = (c for c in others if len(captions) and captions[c] != captions[row])
        return next(unlike, others[0] if others else None)
    return None


def find_surplus(scores: Iterable[Scores], kept_rows: np.ndarray, most: int) -> np.ndarray:
    """Find the records beyond `most` of each group of copies whose captions diverge.

    Args:
        scores: of detectors, of which some find groups; see `Scores.groups`.
        kept_rows: rows of the records that stay, those that stay first at first.
        most: records of a group that stay.

    Returns:
        Rows of the others, int64.
    """
    surplus = np.zeros(0, np.int64)
    for groups in (s.groups.cpu().numpy() for s in scores if s.groups is not None):
        of_kept = groups[kept_rows]
        order = np.argsort(of_kept, kind="stable")  # groups, each in the order of the rows
        _, start, count = np.unique(of_kept[order], return_index=True, return_counts=True)
        place = np.arange(len(order)) - np.repeat(start, count)  # in its group
        surplus = np.union1d(surplus, kept_rows[order[(place >= most) & (of_kept[order] >= 0)]])
    return surplus.astype(np.int64)


def _kept_blocks(corpus: Corpus, kept_rows: np.ndarray) -> Iterator[np.ndarray]:
    """Cut the kept rows where the corpus is cut into blocks."""
    for block in blocks(len(corpus), ROWS):
        yield kept_rows[
            np.searchsorted(kept_rows, block.start) : np.searchsorted(kept_rows, block.stop)
        ]


def _take(corpus: Corpus, rows: np.ndarray) -> pa.Table:
    """The columns of the keep-list for some rows of one block."""
    if not len(rows):
        return COLUMNS.empty_table()
    span = slice(int(rows[0]), int(rows[-1]) + 1)
    urls = corpus.urls.column.slice(span.start, span.stop - span.start)
    table = pa.table(corpus.text_columns(span) | {"url": urls})
    return table.take(pa.array(rows - span.start)).cast(COLUMNS)


def _write_csv(path: Path, corpus: Corpus, kept_rows: np.ndarray) -> None:
    """Write open_clip's table of what is kept, with whole paths."""
    # A path that is not UTF-8 is written as its bytes are.
    with whole_file(path, "w", errors="surrogateescape", newline="") as file:
        out = csv.writer(file, delimiter="\t", lineterminator="\n")
        out.writerow(("filepath", "title"))
        for rows in _kept_blocks(corpus, kept_rows):
            shards = corpus.places["shard"][rows].tolist()
            for shard, record in zip(shards, _take(corpus, rows).to_pylist(), strict=True):
                path_of_image = corpus.source.image_path(shard, record["member"])
                out.writerow((path_of_image, record["caption"]))


def write_clean_copy(
    folder: Path, corpus: Corpus, kept_rows: np.ndarray, progress: Progress
) -> dict[str, int]:
    """Write cleaned shards, in the way of the source; see `Source.clean_copy`.

    Args:
        folder: takes the shards; those that an earlier attempt left there are deleted.
        kept_rows: rows of the records that stay, ascending.

    Returns:
        How many shards and records were written, for the manifest.

    Raises:
        UserError: without images, or without captions.
    """
    make_folder(folder)
    for leftover in (*folder.glob("*.tar"), *folder.glob(f"*{TEMPORARY}")):
        leftover.unlink()
    copy = corpus.source.clean_copy(folder, corpus, kept_rows, progress)
    return {"shards": copy.shards, "written": copy.records}
