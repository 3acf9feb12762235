"""What a process of its own does with foreign Parquet files: Arrow ends its process on some of
them.

`parquet` starts the process and asks; nobody else imports this. A request is a line of JSON on the
standard input; the answer is on the standard output: a line of JSON about the file or, for rows, a
stream of Arrow's with a line of JSON behind it. A file that Arrow aborts on, or that takes more
memory or time than its size allows, ends this process alone.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from bezoar.data.files import arrow_stream
from bezoar.data.files.paths import printable
from bezoar.errors import UserError

GROUP_BYTES = 4 << 30  # the most that the columns of a row group may unpack to
BATCH_ROWS = 256  # rows that are Python objects at a time
UNPACKED_BYTES = 32 << 20  # of rows that Arrow unpacks at a time
LISTS_BYTES = 256 << 20  # that a batch with lists may unpack to
MESSAGE_BYTES = 2 << 20  # that are handed over at once, and the rows
MESSAGE_ROWS = 8192
FREE_ROWS = 1 << 16  # that a file may have however small it is; beyond them one a byte
FREE_BYTES = 1 << 30  # of memory for a file, however small it is
FREE_SECONDS = 10  # of work for a file, however small it is
BYTES_A_SECOND = 10 << 20  # that are read beyond that, at least
READING_ERRORS = (OSError, ValueError, pa.ArrowException)  # ValueError: a name that is not UTF-8


def serve() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the process that asks
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = sys.stdout.buffer
    for line in sys.stdin.buffer:
        request = json.loads(line)
        path = Path(request["path"])
        try:
            bound_use(path.stat().st_size)
            answer = answer_request(path, request, output)
        except UserError as error:
            answer = {"error": str(error)}
        except READING_ERRORS as error:
            answer = {"error": describe_error(path, error)}
        output.write(json.dumps(answer).encode() + b"\n")
        output.flush()


def describe_error(path: Path, error: Exception) -> str:
    """The line about a file on which Arrow raised an error."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return f"{path} cannot be read as {path.suffix[1:] or 'parquet'}: {printable(reason)}"


def answer_request(path: Path, request: dict[str, Any], output: IO[bytes]) -> dict[str, Any]:
    """Describe a file, or write rows; return what is said of that."""
    if "start" not in request:
        return describe_file(path)
    with contextlib.ExitStack() as stack:
        writer: Any = None
        try:
            rows = read_batches(path, request["columns"], request["start"], request["stop"])
            for batch in gather_batches(rows):
                if writer is None:
                    output.write(b"rows\n")
                    writer = stack.enter_context(
                        pa.ipc.new_stream(pa.PythonFile(output, "w"), batch.schema)
                    )
                writer.write_batch(batch)
                output.flush()
        except (UserError, *READING_ERRORS):
            if writer is not None:
                stack.close()  # the end of the stream, behind which the error is told
            raise
    return {}


def gather_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Put small batches together, so that handing them over costs little."""
    waiting: list[pa.RecordBatch] = []
    nbytes = rows = 0
    for batch in batches:
        waiting.append(batch)
        nbytes += batch.nbytes
        rows += len(batch)
        if nbytes >= MESSAGE_BYTES or rows >= MESSAGE_ROWS:
            yield from join_batches(waiting)
            waiting, nbytes, rows = [], 0, 0
    yield from join_batches(waiting)


def join_batches(batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """Put batches together into one, also by pyarrow 18, which has no `concat_batches`."""
    if len(batches) < 2:
        return batches
    joined: list[pa.RecordBatch] = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return joined


def bound_use(size: int) -> None:
    """Bound the memory and the time that this process may take for a file of `size` bytes."""
    with contextlib.suppress(OSError, ValueError):
        statm = Path("/proc/self/statm")
        held = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
        more = FREE_BYTES + min(GROUP_BYTES, 4 * size)
        if held:
            resource.setrlimit(resource.RLIMIT_AS, (held + more, resource.RLIM_INFINITY))
        use = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(use.ru_utime + use.ru_stime) + FREE_SECONDS + size // BYTES_A_SECOND
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file. Raises UserError for one that `parquet.read_header` refuses."""
    file = pq.ParquetFile(path, memory_map=False)
    facts = file.metadata
    groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
    rows = [group.num_rows for group in groups]
    size = os.path.getsize(path)
    if any(not 0 <= group.total_byte_size <= GROUP_BYTES for group in groups):
        raise UserError(
            f"{path}: a row group unpacks to more than {GROUP_BYTES >> 30} GiB; write it in "
            "smaller ones"
        )
    if min(rows, default=0) < 0 or sum(rows) != facts.num_rows:
        raise UserError(f"{path} claims {facts.num_rows} rows, its row groups {sum(rows)}")
    if facts.num_rows > max(FREE_ROWS, size):
        raise UserError(f"{path} claims {facts.num_rows} rows in {size} bytes")
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns are called {max(names, key=names.count)!r}")
    return file


def describe_file(path: Path) -> dict[str, Any]:
    """Return the number of rows, the names of the columns and those of the columns of text."""
    if path.suffix == arrow_stream.SUFFIX:
        return arrow_stream.describe_file(path)
    with open_parquet(path) as file:
        fields = list(file.schema_arrow)
        kinds = [f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in fields]
        return {
            "rows": file.metadata.num_rows,
            "names": [f.name for f in fields],
            "texts": [
                f.name for f, k in zip(fields, kinds, strict=True) if arrow_stream.is_text(k)
            ],
        }


def read_batches(
    path: Path, columns: Sequence[str], start: int, stop: int | None
) -> Iterator[pa.RecordBatch]:
    """Read the rows start..stop of some columns, at most BATCH_ROWS at a time.

    Raises UserError if there are fewer than the file promises.
    """
    if path.suffix == arrow_stream.SUFFIX:
        yield from arrow_stream.read_batches(path, columns, start, stop, BATCH_ROWS)
        return
    with open_parquet(path) as file:
        rows = file.metadata.num_rows
        end = rows if stop is None else min(stop, rows)
        groups, position = _find_groups(file, start, end)
        if not groups:
            return
        most = count_safe_rows(find_chunks(file, path, groups, columns))
        for batch in file.iter_batches(most, groups, list(columns)):
            if batch.nbytes > LISTS_BYTES and any(pa.types.is_list(f.type) for f in batch.schema):
                raise UserError(f"{path}: {len(batch)} rows unpack to {batch.nbytes} bytes")
            low, high = max(start - position, 0), min(end - position, len(batch))
            position += len(batch)
            if high > low:
                yield decode_dictionaries(batch.slice(low, high - low))
        if position < end:
            raise UserError(f"{path} promises {rows} rows and ends after {position}")


def find_chunks(
    file: pq.ParquetFile, path: Path, groups: Iterable[int], columns: Sequence[str]
) -> list[tuple[pq.ColumnChunkMetaData, int]]:
    """Return the column chunks of some row groups that are read, each with its number of rows.

    Raises UserError for columns of lists, but for those of lists of texts, and if a column does not
    fit its row group or lies outside of the file.
    """
    for leaf in map(file.schema.column, range(len(file.schema))):
        is_asked = any(leaf.path == c or leaf.path.startswith(f"{c}.") for c in columns)
        is_listed_text = leaf.max_repetition_level == 1 and leaf.converted_type == "UTF8"
        if is_asked and leaf.max_repetition_level and not is_listed_text:
            raise UserError(
                f"{path}: column {leaf.path} holds lists; expected a value a row, or a list of "
                "texts"
            )
    size = path.stat().st_size
    chunks = []
    for group in map(file.metadata.row_group, groups):
        for i in range(group.num_columns):
            chunk, name = group.column(i), group.column(i).path_in_schema
            if not name.startswith(tuple(columns)):
                continue
            start = chunk.data_page_offset - dictionary_bytes(chunk)
            if not 0 <= start <= start + chunk.total_compressed_size <= size:
                raise UserError(f"{path}: column {name} lies outside of the file")
            is_flat = not file.schema.column(i).max_repetition_level
            if is_flat and chunk.num_values != group.num_rows:
                raise UserError(
                    f"{path}: column {name} claims {chunk.num_values} values of {group.num_rows} "
                    "rows"
                )
            chunks.append((chunk, group.num_rows))
    return chunks


def dictionary_bytes(chunk: pq.ColumnChunkMetaData) -> int:
    """Bytes of a column chunk's dictionary in the file; 0 if it has none."""
    if not chunk.has_dictionary_page or not chunk.dictionary_page_offset:
        return 0
    return max(0, int(chunk.data_page_offset - chunk.dictionary_page_offset))


def count_safe_rows(chunks: Iterable[tuple[pq.ColumnChunkMetaData, int]]) -> int:
    """Return how many rows of some column chunks may be unpacked at a time.

    A value counts with the mean size in its chunk or, as all may be one entry of a dictionary, with
    the size of that. A file whose sizes are made up meets the bound on this process's memory.
    """
    largest = 1.0  # bytes of a row
    for chunk, rows in chunks:
        ratio = chunk.total_uncompressed_size / max(1, chunk.total_compressed_size)
        entry = dictionary_bytes(chunk) * ratio * chunk.num_values / max(1, rows)
        largest = max(largest, chunk.total_uncompressed_size / max(1, rows), entry)
    return max(1, min(BATCH_ROWS, int(UNPACKED_BYTES / largest)))


def decode_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Write out columns that name their values by numbers, as pandas writes categories."""
    columns = [
        c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def _find_groups(file: pq.ParquetFile, start: int, stop: int) -> tuple[list[int], int]:
    """Return the row groups that hold the rows start..stop, and the number of their first row."""
    groups: list[int] = []
    first_row = row = 0
    for i in range(file.metadata.num_row_groups):
        after = row + file.metadata.row_group(i).num_rows
        if after > start and row < stop:
            first_row = first_row if groups else row
            groups.append(i)
        row = after
    return groups, first_row
