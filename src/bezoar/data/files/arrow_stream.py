"""Foreign files of Arrow's stream format, as Hugging Face's `datasets` saves data: what the process
of `parquet` does with them.

Every batch is validated in full before anything is made of it. Columns of types whose values may
overlap, so that a small file could unpack to any size, are refused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from bezoar.data.files.artefacts import read_facts
from bezoar.errors import UserError

SUFFIX = ".arrow"
FREE_ROWS = 1 << 16  # that a file may have however small it is; beyond them one a byte


def refuse_selection(path: Path) -> None:
    """Raise UserError where `datasets`, before 1.6, saved the rows of a set beside a list of those
    that belong to it.
    """
    state = path.parent / "state.json"
    if state.exists():
        facts = read_facts(state, links=True)
        if facts.get("_indices_files") or facts.get("_indices_data_files"):
            raise UserError(
                f"{path.parent} is a selection of its rows (_indices_files in state.json), which "
                "is not read; save it again with `datasets`: flatten_indices().save_to_disk(...)"
            )


@contextmanager
def open_stream(path: Path) -> Iterator[pa.RecordBatchStreamReader]:
    """Open a file. It is mapped: a column that is not asked for is not read."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        names = stream.schema.names
        if len(set(names)) < len(names):
            raise UserError(f"{path}: two columns are called {max(names, key=names.count)!r}")
        yield stream


def describe_file(path: Path) -> dict[str, Any]:
    """Return the number of rows, and the names of all columns and of those of text. Raises
    UserError.
    """
    with open_stream(path) as stream:
        rows, most = 0, max(FREE_ROWS, path.stat().st_size)
        for batch in stream:
            rows += len(batch)
            if rows > most:
                raise UserError(f"{path} claims more than {most} rows")
        texts = [f.name for f in stream.schema if is_text(f.type)]
        return {"rows": rows, "names": stream.schema.names, "texts": texts}


def read_batches(
    path: Path, columns: Sequence[str], start: int, stop: int | None, most: int
) -> Iterator[pa.RecordBatch]:
    """Read the rows start..stop of some columns, at most `most` at a time. Raises UserError."""
    with open_stream(path) as stream:
        check_columns(stream.schema, path, columns)
        position = 0
        for batch in stream:
            low, high = max(start - position, 0), len(batch)
            if stop is not None:
                high = min(high, stop - position)
            position += len(batch)
            if low >= high:
                if stop is not None and position >= stop:
                    return
                continue
            part = batch.select(list(columns))
            part.validate(full=True)
            for row in range(low, high, most):
                yield part.slice(row, min(most, high - row))


def check_columns(schema: pa.Schema, path: Path, columns: Sequence[str]) -> None:
    """Raise UserError for a column whose values may lie over one another."""
    for name in columns:
        kind = schema.field(name).type
        if not is_plain(kind):
            raise UserError(
                f"{path}: column {name} is of type {kind}; expected text, bytes or numbers"
            )


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is a text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_plain(kind: pa.DataType) -> bool:
    """Return whether each value of a type has bytes of its own: text, bytes, a number, a list of
    texts, or fields of these.
    """
    if pa.types.is_struct(kind):
        return all(is_plain(kind.field(i).type) for i in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return is_text(kind.value_type)
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    is_number = pa.types.is_primitive(kind) or pa.types.is_boolean(kind)
    return bool(is_text(kind) or is_bytes or is_number or pa.types.is_null(kind))
