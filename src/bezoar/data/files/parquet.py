"""Foreign files of Parquet, and of Arrow's stream format, read a bounded number of rows and bytes
at a time.

They are parsed in a process of its own (`parquet_process`), because Arrow ends its process on some
files. The process stays for the next file; when a file ends it, that file cannot be read. Handing
rows over costs 2.5 ms a MiB, where photographs are decoded to 224 pixels one part in thirty of
that.
"""

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from bezoar.data.files import arrow_stream
from bezoar.data.files.parquet_process import BATCH_ROWS as BATCH_ROWS
from bezoar.data.files.paths import check_regular
from bezoar.errors import UserError

MAX_HELD_BYTES = 128 << 20  # of rows that are kept at hand
MAX_IDLE = 2  # processes that wait for the next file
PIPE_BYTES = 1 << 20
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from bezoar.data.files.parquet_process import serve; serve()"
)


class ParquetHeader(NamedTuple):
    """What a file says of itself."""

    rows: int  # how many it promises
    names: tuple[str, ...]  # of its columns, each once
    texts: tuple[str, ...]  # names of the columns of text


def read_header(path: Path) -> ParquetHeader:
    """Read what a file says of itself.

    Raises UserError if it is no Parquet file, has two columns of one name, claims rows that it
    cannot hold, or a row group would fill the memory.
    """
    path = check_regular(path).absolute()
    if path.suffix == arrow_stream.SUFFIX:
        arrow_stream.refuse_selection(path)
    status = path.stat()
    return _ask_header(path, (status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=256)
def _ask_header(path: Path, _: tuple[int, int]) -> ParquetHeader:
    """Ask for a header; the file's state is in the cache's key: a changed file is read again."""
    with _reader() as reader:
        facts = reader.ask({"path": str(path)}, path)
    return ParquetHeader(facts["rows"], tuple(facts["names"]), tuple(facts["texts"]))


def read_batches(
    path: Path, columns: Sequence[str], start: int = 0, stop: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Read the rows start..stop of some columns, at most BATCH_ROWS at a time.

    Raises UserError if the file is broken, or holds fewer rows than it promises.
    """
    path = check_regular(path).absolute()
    request = {"path": str(path), "columns": list(columns), "start": start, "stop": stop}
    with _reader() as reader:
        yield from reader.read_rows(request, path)


class _Reader:
    """A process that parses Parquet files, one after another."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pipesize=PIPE_BYTES,
            # The memory of a file is bounded by address space, which allocators otherwise reserve.
            env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"},
        )

    def ask(self, request: dict[str, Any], path: Path) -> dict[str, Any]:
        """Return the answer to a request. Raises UserError that it holds, or if there is none."""
        self._send(request)
        return self._check(self._output.readline(), path)

    def read_rows(self, request: dict[str, Any], path: Path) -> Iterator[pa.RecordBatch]:
        """Iterate over the rows that were asked for."""
        self._send(request)
        line = self._output.readline()
        if line == b"rows\n":
            try:
                with pa.ipc.open_stream(pa.PythonFile(self._output, "r")) as stream:
                    for batch in stream:
                        for row in range(0, len(batch), BATCH_ROWS):
                            yield batch.slice(row, BATCH_ROWS)
            except (OSError, pa.ArrowException) as error:
                raise self._death(path) from error
            line = self._output.readline()
        self._check(line, path)

    @property
    def _output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def _send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # that it died is seen when nothing comes back
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def _check(self, line: bytes, path: Path) -> dict[str, Any]:
        """Return what the last line of an answer says."""
        if not line.endswith(b"\n"):
            raise self._death(path)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _death(self, path: Path) -> UserError:
        """The error for a file that ended the process."""
        self.end()
        return UserError(
            f"{path} cannot be read as parquet: it ends the program that reads it, "
            f"or takes more memory or time than its size allows (status {self.process.returncode})"
        )

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self.process.wait()


_idle: list[_Reader] = []
_lock = threading.Lock()


@contextlib.contextmanager
def _reader() -> Iterator[_Reader]:
    """Lend a process, which comes back if it has answered in full."""
    with _lock:
        # One that another process started answers that process.
        mine = [r for r in _idle if r.owner == os.getpid()]
        reader = mine[-1] if mine else None
        _idle[:] = mine[:-1]
    reader = reader or _Reader()
    answered = True
    try:
        yield reader
    except UserError:
        raise
    except BaseException:  # whoever asked stopped reading in the middle
        answered = False
        raise
    finally:
        answered = answered and reader.process.returncode is None
        with _lock:
            keeps = answered and len(_idle) < MAX_IDLE
            if keeps:
                _idle.append(reader)
        if not keeps:
            reader.end()


@atexit.register
def _end_idle() -> None:
    with _lock:
        while _idle:
            reader = _idle.pop()
            if reader.owner == os.getpid():
                reader.end()
