"""A disk that ends the process, or fills up, at one operation on a file: what a power cut and a
full disk leave behind.

`Disk(folder, at, mode)` counts what this process and those that it forks do to files below a
folder: files opened for writing, writes, renames, removals, new folders. At operation `at` it kills
the whole group of processes (`kill`), refuses everything that takes room from there on (`full`), or
refuses this operation alone (`once`).
"""

import builtins
import errno
import fcntl
import io
import mmap
import os
import re
import signal
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SECTOR = 512  # bytes of which a disk writes all or none
GROWING = ("open", "write", "mkdir")  # what a full disk refuses
# Audit events -> the kind of operation, and which of the arguments are a path and the folder that
# it starts from.
EVENTS: dict[str, tuple[str, int, int | None]] = {
    "open": ("open", 0, None),
    "os.rename": ("rename", 1, 3),
    "os.remove": ("remove", 0, 1),
    "os.rmdir": ("rmdir", 0, 1),
    "os.mkdir": ("mkdir", 0, 2),
    "os.truncate": ("write", 0, None),
    "os.link": ("rename", 1, 3),
    "os.symlink": ("rename", 1, 2),
}


class Disk:
    """Counts operations below a folder, in this process and in those that it forks.

    Args:
        folder: what is counted lies below it.
        log: takes a line an operation, `KIND PATH`.
        at: the number of the operation at which it happens, from 1; 0 for never.
        mode: `kill`, `full` or `once`.
    """

    def __init__(self, folder: Path, log: Path, at: int = 0, mode: str = "kill") -> None:
        self.folder = f"{folder}{os.sep}"
        self.at, self.mode = at, mode
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self.shared = mmap.mmap(-1, 8)  # the count
        self.threads = threading.RLock()

    def install(self) -> None:
        """Have every operation of this process counted, for as long as it lives."""
        sys.addaudithook(self.hear)
        builtins.open = io.open = self.open  # type: ignore[assignment]
        serialize_file = safetensors.torch.serialize_file

        def serialize(tensors: Any, path: Any, *rest: Any, **options: Any) -> Any:
            # Rust opens and writes this one.
            def spoil() -> None:
                serialize_file(tensors, path, *rest, **options)
                os.truncate(path, os.path.getsize(path) // 2)

            try:
                self.operate("write", os.fsdecode(path), spoil)
            except OSError as error:
                raise SafetensorError(f"Error while serializing: I/O error: {error}") from error
            return serialize_file(tensors, path, *rest, **options)

        safetensors.torch.serialize_file = serialize

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: called before the operation."""
        if event not in EVENTS or (event == "open" and not arguments[2] & WRITING):
            return
        kind, place, start = EVENTS[event]
        path = arguments[place]
        if isinstance(path, int):  # opened before
            return
        path = os.fsdecode(path)
        if start is not None and isinstance(arguments[start], int) and arguments[start] >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[start]}"), path)
        self.operate(kind, path)

    def open(self, file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        """`open`, with every write of the file counted."""
        if isinstance(file, int) or not set(mode) & set("wxa+") or not self.holds(file):
            return io_open(file, mode, *rest, **options)
        raw = CountedFile(file, mode.replace("b", "").replace("t", ""), self)
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        names = ("buffering", "encoding", "errors", "newline")
        options = {**dict(zip(names, rest, strict=False)), **options}
        options.pop("buffering", None)
        return io.TextIOWrapper(buffered, **options)

    def holds(self, path: Any) -> bool:
        """Whether a path lies below the folder."""
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder)

    def operate(self, kind: str, path: str, spoil: Callable[[], object] | None = None) -> None:
        """Count an operation, and let happen what happens at it.

        spoil: leaves behind what the operation leaves that is cut off in its middle.
        """
        path = os.path.abspath(path)
        if not path.startswith(self.folder):
            return
        with self.threads:
            number = self.count()
        name = re.sub(r"\.[0-9a-f]{12}\.tmp$", ".tmp", path.removeprefix(self.folder))
        os.write(self.log, f"{kind} {name}\n".encode(errors="replace"))
        if self.mode == "kill" and number == self.at:
            if spoil is not None:
                spoil()
            os.killpg(0, signal.SIGKILL)
            signal.pause()
        is_full = number == self.at if self.mode == "once" else 0 < self.at <= number
        if self.mode != "kill" and is_full and kind in GROWING:
            if spoil is not None:
                spoil()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def count(self) -> int:
        """One more, over all processes."""
        fcntl.lockf(self.log, fcntl.LOCK_EX)
        (number,) = struct.unpack("q", self.shared[:])
        self.shared[:] = struct.pack("q", number + 1)
        fcntl.lockf(self.log, fcntl.LOCK_UN)
        return int(number) + 1


class CountedFile(io.FileIO):
    """A file whose writes a Disk counts. One that is cut off leaves the first half behind."""

    def __init__(self, path: Any, mode: str, disk: Disk) -> None:
        super().__init__(path, mode)
        self.disk = disk

    def write(self, content: Any) -> int:
        """Write bytes."""
        data = memoryview(content).cast("B")
        half = data[: len(data) // 2] if len(data) > SECTOR else data[:0]
        self.disk.operate(
            "write", os.fsdecode(self.name), lambda: super(CountedFile, self).write(half)
        )
        return super().write(data)


io_open = io.open
