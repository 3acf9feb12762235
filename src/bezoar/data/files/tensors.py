"""Tensors in safetensors files: the bound of their headers, and those of runs, read and written."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bezoar.data.files.paths import open_regular
from bezoar.data.files.writing import whole_file
from bezoar.errors import UnwritableError, UserError, first_line

MAX_BYTES = 1 << 40
MAX_HEADER = 8 << 20  # bytes that name the tensors; each of them takes kilobytes of memory


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises UserError for any other file."""
    tensors: dict[str, Tensor] = _read(path, load_file)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file. Raises UserError as `read_tensors` does."""
    with _read(path, lambda path: safe_open(path, "pt")) as file:
        metadata: dict[str, str] = file.metadata() or {}
    return metadata


def describe_long_header(path: Path, links: bool = True) -> str:
    """What is wrong with a file that names too many tensors, or "". links: see `open_regular`."""
    with open_regular(path, MAX_BYTES, links) as file:
        length = int.from_bytes(file.read(8), "little")
    return f"a header of {length} bytes, of {MAX_HEADER} at most" if length > MAX_HEADER else ""


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    if problem := describe_long_header(path, links=False):
        raise UserError(f"{path} cannot be read as safetensors: {problem}")
    try:
        return read(path)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {first_line(error)}") from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all. Raises UnwritableError, on a full disk say."""
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        with whole_file(path, "wb") as file:
            # By name rather than as bytes: the weights are then not held in memory a second time.
            save_file(plain, file.name, metadata)
    except SafetensorError as error:
        raise UnwritableError(f"{path} cannot be written: {first_line(error)}") from error
