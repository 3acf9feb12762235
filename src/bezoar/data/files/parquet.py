"""Foreign Parquet files, read a bounded number of rows and bytes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bezoar.data.files.parquet_pages import count_safe_rows
from bezoar.data.files.paths import printable
from bezoar.errors import UserError

GROUP_BYTES = 4 << 30  # the most that the columns of a row group may unpack to
BATCH_ROWS = 256  # rows that are Python objects at a time
MAX_HELD_BYTES = 128 << 20  # of rows that are kept at hand


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file.

    Raises UserError if it is none, has two columns of one name, or a row group would fill the
    memory.
    """
    try:
        file = pq.ParquetFile(path, memory_map=False)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        names = file.schema_arrow.names
    except (OSError, ValueError, pa.ArrowException) as error:
        # ValueError: a name that is not UTF-8
        raise _broken(path, error) from error
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
    """Read the rows start..stop of some columns, at most BATCH_ROWS at a time.

    Raises UserError if the file is broken.
    """
    with open_parquet(path) as file:
        groups, position = _find_groups(file, start, stop)
        if not groups:
            return
        try:
            most = count_safe_rows(file, path, groups, columns, BATCH_ROWS)
            for batch in file.iter_batches(most, groups, list(columns)):
                low = max(start - position, 0)
                high = len(batch) if stop is None else min(stop - position, len(batch))
                position += len(batch)
                if high > low:
                    yield batch.slice(low, high - low)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _broken(path, error) from error


def _find_groups(file: pq.ParquetFile, start: int, stop: int | None) -> tuple[list[int], int]:
    """Return the row groups that hold the rows start..stop, and the number of their first row."""
    groups: list[int] = []
    first_row = row = 0
    for i in range(file.metadata.num_row_groups):
        after = row + file.metadata.row_group(i).num_rows
        if after > start and (stop is None or row < stop):
            first_row = first_row if groups else row
            groups.append(i)
        row = after
    return groups, first_row


def _broken(path: Path, error: Exception) -> UserError:
    reason = printable(str(error).splitlines()[0][:200])
    return UserError(f"{path} cannot be read as parquet: {reason}")
