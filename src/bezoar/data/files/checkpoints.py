"""Weights from foreign files: safetensors, .npz, and what `torch.save` writes.

Nothing in a file is executed, and no tensor may claim more than its file holds; see `torch_files`,
`npy` and `zips`.
"""

import functools
import os
from collections import deque
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bezoar.data.files import npy
from bezoar.data.files.arrays import DECODING_ERRORS
from bezoar.data.files.paths import open_regular
from bezoar.data.files.tensors import describe_long_header
from bezoar.data.files.torch_files import format_keys, load_torch
from bezoar.data.files.zips import check_unpacked_size, open_zip
from bezoar.errors import UserError, expand_home, first_line

__all__ = ["SUFFIXES", "format_keys", "load_tensors"]

MAX_BYTES = 8 << 30  # of a file, and of everything it unpacks to
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
# Keys under which checkpoints keep their weights.
WRAPPERS = ("state_dict", "model", "net", "netC", "network", "model_state_dict")
MAX_DEPTH = 4  # of dicts in one another
MAX_KEYS = 1 << 20  # of all of them together
TAR_MAGIC = slice(257, 262)
COUNTERS = ("total_ops", "total_params")  # that thop leaves in the modules it counted


def load_tensors(path: str, prefix: str = "") -> dict[str, Tensor]:
    """Load the named tensors of a weights file on the CPU. Its content says what it is.

    Weights are unwrapped, and the `module.` of DataParallel and the counters of thop are dropped.
    Where a file keeps dicts of weights by names (`teacher`, `student`), these stand before the
    names of the weights.

    Args:
        path: of the file.
        prefix: weights whose names begin with it alone, without it; "" for all.

    Raises:
        UserError: one line, if the file is missing, too large, broken, not a checkpoint, or asks
            for more than tensors.
    """
    file = expand_home(path)
    if not os.path.isfile(file):
        raise UserError(f"no weights file {path!r}")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{path}: {size >> 20} MiB; a weights file may have {MAX_BYTES >> 20} MiB")
    try:
        tensors = _load(file, size, prefix)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (*DECODING_ERRORS, SafetensorError, MemoryError) as error:
        reason = first_line(error)[:120]
        raise UserError(f"{path}: not a checkpoint that can be read ({reason})") from error
    tensors = _strip_module(tensors)
    return {k: tensor for k, tensor in tensors.items() if k.rpartition(".")[2] not in COUNTERS}


def _load(file: Path, size: int, prefix: str) -> dict[str, Tensor]:
    """Load a file by the format that its first bytes tell."""
    with open_regular(file) as stream:
        start = stream.read(TAR_MAGIC.stop)
    if start.startswith(b"PK\x03\x04") and _is_npz(file):
        return _check_types(_take_below(_load_npz(file, size), prefix))
    # The length of a safetensors header may begin with a pickle's first byte, so these come first.
    if start[8:9] == b"{" and not start.startswith(b"PK"):
        if problem := describe_long_header(file):
            raise UserError(f"not a checkpoint that can be read: {problem}")
        return _check_types(_take_below(load_file(file), prefix))
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return load_torch(file, size, size, functools.partial(_select_state, prefix=prefix))
    if start[TAR_MAGIC] == b"ustar":
        raise UserError(
            "it is a tar archive, not a checkpoint; take the weights out of it (files called "
            ".pth.tar are, as a rule, none)"
        )
    if start.startswith(b"version https://git-lfs"):
        raise UserError("a pointer of Git LFS, not the file itself; fetch it (git lfs pull)")
    raise UserError("not a checkpoint: expected safetensors, .npz, or what torch.save writes")


def _is_npz(file: Path) -> bool:
    try:
        with open_zip(file) as archive:
            names = archive.namelist()
    except UserError as error:
        raise UserError(f"not a checkpoint that can be read: {error}") from error
    return bool(names) and all(n.endswith(".npy") for n in names)


def _load_npz(file: Path, size: int) -> dict[str, Tensor]:
    """Load the arrays of an .npz file by name; the claims of archive and headers are checked."""
    tensors: dict[str, Tensor] = {}
    with open_zip(file) as archive:
        check_unpacked_size(archive.infolist(), size, MAX_BYTES)
        for member in archive.infolist():
            with archive.open(member) as stream:
                header = npy.read_header(stream)
                if header.nbytes > member.file_size:
                    raise UserError(
                        f"an array of shape {header.shape} claims {header.nbytes} bytes of the "
                        f"{member.file_size} that its member has"
                    )
                array = npy.read_data(stream, header)
            native = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
            tensors[member.filename.removesuffix(".npy")] = torch.from_numpy(native)
    return tensors


def _check_types(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors.

    Raises UserError for sparse, complex and quantised ones and those of 8 bits.
    """
    for key, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.dtype not in DTYPES:
            raise UserError(
                f"expected plain tensors of real numbers; {key[:60]} is {tensor.layout}, "
                f"{tensor.dtype}"
            )
    return tensors


def _select_state(loaded: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors by name in what a checkpoint holds, wrapped or not.

    prefix: as of `load_tensors`. It may name a dict beside the one that is taken without a prefix.

    Raises UserError if there are none.
    """
    wrapped = isinstance(loaded, dict) and next(
        (loaded[w] for w in WRAPPERS if isinstance(loaded.get(w), dict)), None
    )
    tensors = _named_tensors(wrapped or loaded)
    start = _with_dot(prefix)
    starts = (start, start.removeprefix("module."))
    if wrapped and prefix and not any(k.startswith(starts) for k in _strip_module(tensors)):
        tensors = _named_tensors({k: v for k, v in loaded.items() if isinstance(v, dict)})
    return _check_types(_take_below(tensors, prefix))


def _named_tensors(state: Any) -> dict[str, Tensor]:
    """Return the tensors of a dict, and of the dicts in it under their joint names.

    Raises UserError if there are none, or if a dict without dicts holds anything else.
    """
    if not isinstance(state, dict) or not state:
        raise UserError(
            f"expected tensors by name, or these under {' or '.join(WRAPPERS)}; "
            f"it holds {type(state).__name__}"
        )
    nested = any(map(_is_named, state.values()))
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    keys = 0
    pending = deque([("", state, 0)])
    while pending:
        path, values, depth = pending.popleft()
        keys += len(values)
        if keys > MAX_KEYS:  # a dict may hold itself
            raise UserError(f"expected at most {MAX_KEYS} tensors by name")
        for key, value in values.items():
            if isinstance(key, str) and isinstance(value, Tensor):
                tensors[path + key] = value
            elif _is_named(value) and depth < MAX_DEPTH:
                pending.append((f"{path}{key}.", value, depth + 1))
            else:
                others.append(f"{path}{key}")
    # Beside dicts of weights stand epochs, options and the state of the optimiser.
    if not tensors or (others and not nested):
        raise UserError(f"expected tensors by name; these are none: {format_keys(others)}")
    return tensors


def _is_named(value: Any) -> bool:
    """Tell whether a value is a dict by names that is not empty."""
    return isinstance(value, dict) and bool(value) and all(isinstance(k, str) for k in value)


def _strip_module(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the `module.` of DataParallel where all names begin with it."""
    if not all(key.startswith("module.") for key in tensors):
        return tensors
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}


def _with_dot(prefix: str) -> str:
    return prefix.rstrip(".") + "."


def _take_below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors below a prefix, by the rest of their names. Raises UserError for none."""
    if not prefix:
        return tensors
    named = _strip_module(tensors)
    start = _with_dot(prefix)
    if named is not tensors:
        start = start.removeprefix("module.")
    below = {k.removeprefix(start): tensor for k, tensor in named.items() if k.startswith(start)}
    if start and not below:
        raise UserError(f"no weights under prefix={prefix}; its keys are {format_keys(named)}")
    return below
