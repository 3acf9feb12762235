"""data.files.parquet"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bezoar.data.files import parquet_pages
from bezoar.errors import UserError

GROUP_BYTES = 4 << 30  # a row group's columns unpacked, at most
BATCH_ROWS = 256  # rows of a Parquet file that are Python objects at a time
MAX_HELD_BYTES = 128 << 20  # bytes of them, at most, that are kept at hand


def open_parquet(path: Path) -> pq.ParquetFile:
    """A foreign Parquet file, opened. Raises UserError when it is none, or one of its row groups would fill the memory."""
    try:
        file = pq.ParquetFile(path, memory_map=False)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        names = file.schema_arrow.names
    except (
        OSError,
        ValueError,
        pa.ArrowException,
    ) as error:  # ValueError: a name that is not UTF-8
        raise UserError(
            f"{path} cannot be read as parquet: {str(error).splitlines()[0][:200]}"
        ) from error
    if any(not 0 <= g.total_byte_size <= GROUP_BYTES or g.num_rows < 0 for g in groups):
        raise UserError(
            f"{path}: a row group unpacks to more than {GROUP_BYTES >> 30} GiB; write it in smaller ones"
        )
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns are called {max(names, key=names.count)!r}")
    return file


def read_batches(
    path: Path, columns: Sequence[str], start: int = 0, stop: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Rows start..stop of some columns, a bounded number at a time. Raises UserError where the file is broken."""
    with open_parquet(path) as file:
        first, groups = 0, []
        for i in range(file.metadata.num_row_groups):
            after = first + file.metadata.row_group(i).num_rows
            if after > start and (stop is None or first < stop):
                groups.append((i, first))
            first = after
        place, numbers = groups[0][1] if groups else 0, [i for i, _ in groups]
        try:
            most = parquet_pages.rows(file, path, numbers, columns, BATCH_ROWS)
            for batch in file.iter_batches(most, numbers, list(columns)) if groups else ():
                low, high = (
                    max(start - place, 0),
                    len(batch) if stop is None else min(stop - place, len(batch)),
                )
                place += len(batch)
                if high > low:
                    yield batch.slice(low, high - low)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{path} cannot be read as parquet: {str(error).splitlines()[0][:200]}"
            ) from error
