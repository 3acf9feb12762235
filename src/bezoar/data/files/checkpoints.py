"""Weights from foreign files: safetensors, .npz, and what `torch.save` writes.

Nothing in a file is executed, and no tensor may claim more than its file holds; see `torch_files`,
`npy` and `zips`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bezoar.data.files import npy
from bezoar.data.files.arrays import DECODING_ERRORS
from bezoar.data.files.paths import expand_home, open_regular
from bezoar.data.files.torch_files import format_keys, load_torch
from bezoar.data.files.zips import check_unpacked_size, open_zip
from bezoar.errors import UserError

__all__ = ["SUFFIXES", "format_keys", "load_tensors"]

MAX_BYTES = 8 << 30  # of a file, and of everything it unpacks to
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
# Keys under which checkpoints keep their weights.
WRAPPERS = ("state_dict", "model", "net", "netC", "network", "model_state_dict")
COUNTERS = ("total_ops", "total_params")  # that thop leaves in the modules it counted


def load_tensors(path: str) -> dict[str, Tensor]:
    """Load the named tensors of a weights file on the CPU.

    Weights are unwrapped, and the `module.` of DataParallel and the counters of thop are dropped.

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
        tensors = _load(file, size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (*DECODING_ERRORS, SafetensorError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: not a checkpoint that can be read ({reason})") from error
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    return {k: tensor for k, tensor in tensors.items() if k.rpartition(".")[2] not in COUNTERS}


def _load(file: Path, size: int) -> dict[str, Tensor]:
    """Load a file by the format that its first bytes tell."""
    with open_regular(file) as stream:
        start = stream.read(9)
    if start.startswith(b"PK\x03\x04") and _is_npz(file):
        return _check_types(_load_npz(file, size))
    # The length of a safetensors header may begin with a pickle's first byte, so these come first.
    if start[8:] == b"{" and not start.startswith(b"PK"):
        return _check_types(load_file(file))
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return load_torch(file, size, size, _select_state)
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
                f"expected plain tensors of real numbers; {key[:60]} is {tensor.layout}, {tensor.dtype}"
            )
    return tensors


def _select_state(loaded: Any) -> dict[str, Tensor]:
    """Return the dict of tensors in what a checkpoint holds, wrapped or not.

    Raises UserError if there is none.
    """
    state = loaded
    if isinstance(loaded, dict):
        state = next((loaded[w] for w in WRAPPERS if isinstance(loaded.get(w), dict)), loaded)
    if not isinstance(state, dict) or not state:
        raise UserError(
            f"expected tensors by name, or these under {' or '.join(WRAPPERS)}; "
            f"it holds {type(state).__name__}"
        )
    others = [
        str(k) for k, v in state.items() if not isinstance(k, str) or not isinstance(v, Tensor)
    ]
    if others:
        raise UserError(f"expected tensors by name; these are none: {format_keys(others)}")
    return _check_types(state)
