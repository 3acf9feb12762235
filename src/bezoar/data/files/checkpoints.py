"""Weights out of foreign files that may be hostile: safetensors, .npz, and what `torch.save` writes (zip, or before 1.6).

Nothing in a file is executed: which functions a pickle asks for is read off its opcodes first and named where they are
not those that rebuild tensors, then `torch.load(weights_only=True)` refuses them again. Shapes are looked at on the meta
device before anything is allocated, and no tensor may claim more than its file holds.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
import zipfile
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bezoar.data.files.arrays import DECODING_ERRORS
from bezoar.errors import UserError

MAX_BYTES = 8 << 30  # of a file, and so of every member of it
MAX_PICKLE = 16 << 20  # of the part of a checkpoint that says what its tensors are
MAX_MEMBERS = 100_000
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
WRAPPERS = (
    "state_dict",
    "model",
    "net",
    "netC",
    "network",
    "model_state_dict",
)  # keys under which weights are kept
COUNTERS = ("total_ops", "total_params")  # that thop leaves in the modules it counted
FREE, RATIO = 64 << 20, 100  # an archive may unpack to FREE bytes, or to RATIO times its own
SAFE = re.compile(
    r"torch\._utils _rebuild_(tensor|tensor_v2|parameter)|collections OrderedDict"
    r"|torch (\w+Storage|Size|device|b?float\d*|u?int\d*|bool|half|double|long)"
)
CALLS = ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID")
NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG")
NOTES = (
    "PUT",
    "BINPUT",
    "LONG_BINPUT",
    "MEMOIZE",
    "FRAME",
)  # opcodes that leave the stack as it is


def load_tensors(path: str) -> dict[str, Tensor]:
    """The named tensors of a weights file, on the CPU, unwrapped, without the `module.` of DataParallel and thop's counters.

    Raises UserError, one line, for whatever is missing, too large, broken, not a checkpoint, or more than tensors.
    """
    file = Path(path).expanduser()
    if not os.path.isfile(file):
        raise UserError(f"no weights file {path!r}")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{path}: {size >> 20} MiB; a weights file may have {MAX_BYTES >> 20} MiB")
    with file.open("rb") as stream:
        start = stream.read(9)
    try:
        if start.startswith(b"PK\x03\x04"):
            found = (
                _plain(_arrays(file, size)) if _is_npz(file) else _torch(file, size, zipped=True)
            )
        elif (
            start[8:] == b"{"
        ):  # before pickles: the length of its header may begin with their first byte
            found = _plain(load_file(file))
        elif start.startswith(b"\x80"):
            found = _torch(file, size, zipped=False)
        else:
            raise UserError(
                "not a checkpoint: expected safetensors, .npz, or what torch.save writes"
            )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (*DECODING_ERRORS, SafetensorError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: not a checkpoint that can be read ({reason})") from error
    parallel = all(key.startswith("module.") for key in found)
    named = {
        key.removeprefix("module.") if parallel else key: tensor for key, tensor in found.items()
    }
    return {key: tensor for key, tensor in named.items() if key.rpartition(".")[2] not in COUNTERS}


def format_keys(keys: Iterable[str], most: int = 3) -> str:
    """The first few of many keys, for a message; none of them longer than 60 characters."""
    shown = [k if len(k) <= 60 else k[:57] + "..." for k in keys]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _torch(file: Path, size: int, zipped: bool) -> dict[str, Tensor]:
    """What torch.save wrote. `mmap` reads a zip in place, so no claim reaches beyond the file."""
    with file.open("rb") as stream:
        scan(_zip_pickle(file) if zipped else stream.read(MAX_PICKLE), size, 1 if zipped else 5)
    claims = _plain(_state(torch.load(file, map_location="meta", weights_only=True)))
    total = 0
    for key, tensor in claims.items():
        reach = 1 + sum(
            (side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        reach = (
            (reach + int(tensor.storage_offset())) * tensor.element_size() if tensor.numel() else 0
        )
        total += tensor.numel() * tensor.element_size()
        if max(reach, total // 2) > size:  # tied weights may be named twice
            raise UserError(f"{key} claims {max(reach, total)} bytes of a file of {size}")
    return _state(torch.load(file, map_location="cpu", weights_only=True, mmap=zipped))


def _is_npz(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    return bool(names) and all(n.endswith(".npy") for n in names)


def _arrays(file: Path, size: int) -> dict[str, Tensor]:
    """The arrays of an .npz file by name. What the archive and each header claim is compared before it is unpacked."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        total = sum(m.file_size for m in members)
        if len(members) > MAX_MEMBERS or total > min(MAX_BYTES, max(FREE, RATIO * size)):
            raise UserError(
                f"{len(members)} arrays of {total >> 20} MiB together, packed in {size >> 10} KiB, are too many"
            )
        found = {}
        for member in members:
            with archive.open(member) as stream:
                found[member.filename.removesuffix(".npy")] = torch.from_numpy(
                    _array(stream, member.file_size)
                )
    return found


def _array(stream: IO[bytes], size: int) -> np.ndarray:
    headers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in headers:
        raise UserError(f"npy version {version} is not supported; 1.0 and 2.0 are")
    shape, fortran, dtype = headers[version](stream)
    if dtype.hasobject:
        raise UserError(
            "expected arrays of numbers; one holds pickled objects, which are never read"
        )
    claimed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or claimed > size:
        raise UserError(
            f"an array of shape {shape} claims {claimed} bytes of the {size} that its member has"
        )
    data = np.frombuffer(bytearray(stream.read(claimed)), dtype).reshape(
        shape, order="F" if fortran else "C"
    )
    return data.astype(dtype.newbyteorder("="), order="C", copy=False)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors. Raises UserError for sparse, complex, quantized ones and those of 8 bits."""
    for key, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.dtype not in DTYPES:
            raise UserError(
                f"expected plain tensors of real numbers; {key[:60]} is {tensor.layout}, {tensor.dtype}"
            )
    return tensors


def _zip_pickle(file: Path) -> bytes:
    """The pickle of a zip checkpoint, whose members must be stored as they are, as torch stores them."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        pickles = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
        if len(members) > MAX_MEMBERS or len(pickles) != 1:
            raise UserError("not a checkpoint: a zip, but not one that torch.save writes")
        if any("/code/" in m.filename for m in members):
            raise UserError(
                "expected tensors alone; it is a TorchScript program. Nothing was executed"
            )
        packed = [
            m.filename
            for m in members
            if m.compress_type != zipfile.ZIP_STORED or m.file_size > MAX_BYTES
        ]
        if packed or pickles[0].file_size > MAX_PICKLE:
            what = format_keys(packed) or f"a list of tensors of {pickles[0].file_size >> 20} MiB"
            raise UserError(
                f"expected members stored without compression, the list of tensors small; it holds {what}"
            )
        return archive.read(pickles[0])


def scan(data: bytes, size: int, pickles: int) -> None:
    """Look at the opcodes of the first few pickles in `data`. Raises UserError for what is more than tensors.

    Names every function or class asked for that does not rebuild tensors, and refuses storages of more elements than
    the file of `size` bytes can hold: files older than torch 1.6 have them allocated before they are read.
    """
    stream, texts, claimed = io.BytesIO(data), ["", ""], 0
    foreign: set[str] = set()
    calls: set[str] = set()  # of what was named before, as a rule
    recent: deque[tuple[str, Any]] = deque([("", None)] * 3, maxlen=3)
    try:
        for _ in range(pickles):
            for opcode, argument, _ in pickletools.genops(stream):
                name = opcode.name
                claimed += _elements(*recent) if name == "BINPERSID" else 0
                if claimed > size:
                    raise UserError(
                        f"its tensors claim {claimed} elements of a file of {size} bytes"
                    )
                asked = (
                    str(argument)
                    if name == "GLOBAL"
                    else " ".join(texts)
                    if name == "STACK_GLOBAL"
                    else ""
                )
                if asked and not SAFE.fullmatch(asked):
                    foreign.add(asked.replace(" ", "."))
                elif name in CALLS:
                    calls.add(str(argument or name).replace(" ", "."))
                if name not in NOTES:
                    recent.append((name, argument))
                if isinstance(argument, str):
                    texts = [texts[1], argument]
    except ValueError as error:
        # a plain pickle ends before five are read: what it asked for until then is still worth a name
        if not foreign | calls:
            raise UserError(
                f"not a checkpoint: expected what torch.save writes ({str(error).splitlines()[0][:80]})"
            ) from error
    if foreign or calls:
        raise UserError(
            f"expected tensors alone; it asks for {format_keys(sorted(foreign or calls))}. Nothing was executed"
        )


def _elements(first: tuple[str, Any], second: tuple[str, Any], last: tuple[str, Any]) -> int:
    """How many elements a storage claims, by the opcodes before it is named: a number, perhaps NONE, TUPLE."""
    number = first if second[0] == "NONE" else second
    if last[0] != "TUPLE" or number[0] not in NUMBERS:
        raise UserError("not a checkpoint: a tensor of unknown size")
    return int(number[1])


def _state(loaded: Any) -> dict[str, Tensor]:
    """The dict of tensors in what a checkpoint holds, wrapped or not."""
    wrapper = next(
        (w for w in WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(w), dict)), None
    )
    state = loaded[wrapper] if wrapper else loaded
    if not isinstance(state, dict) or not state:
        raise UserError(
            f"expected tensors by name, or these under {' or '.join(WRAPPERS)}; it holds {type(state).__name__}"
        )
    others = [
        str(k) for k, v in state.items() if not isinstance(k, str) or not isinstance(v, Tensor)
    ]
    if others:
        raise UserError(f"expected tensors by name; these are none: {format_keys(others)}")
    return state
