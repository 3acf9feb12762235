"""What `torch.save` writes, loaded without executing anything in it.

Which functions a pickle asks for is read off its opcodes first, and named where they do more than
rebuild tensors; then `torch.load(weights_only=True)` refuses them again. Options, numbers and paths
that training keeps beside its weights (`LEFTOVERS`) are neither imported nor built: an empty object
takes their place. Shapes are looked at on the meta device before anything is allocated.
"""

import io
import itertools
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bezoar.data.files.paths import open_regular
from bezoar.data.files.zips import open_zip
from bezoar.errors import UserError, first_line

MAX_PICKLE_BYTES = 16 << 20  # of the part of a file that says what its tensors are
MAX_OPCODES = 4 << 20  # in it, which take a second a million; 10,000 tensors take 600,000
MAX_NAMES = 4  # of tied weights: the words of a T5 are shared, in both of its parts and in the head
PICKLES_BEFORE_1_6 = 5  # that a file of the format before torch 1.6 begins with
SAFE_GLOBALS = re.compile(
    r"torch\._utils _rebuild_(tensor|tensor_v2|parameter)|collections OrderedDict"
    r"|torch (\w+Storage|Size|device|b?float\d*|u?int\d*|bool|half|double|long)"
    # of the bytes of a leftover's array, and of options
    r"|_codecs encode|(builtins|__builtin__) set"
)
LEFTOVERS = re.compile(
    r"argparse Namespace|pathlib(\._local)? (Posix|Windows|PurePosix|PureWindows)Path"
    r"|numpy (dtype|ndarray)|numpy\._?core\.multiarray (scalar|_reconstruct)"
    r"|(pytorch_)?lightning[\w.]*\.utilities\.\w+ AttributeDict"
)
CALLS = ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID")
INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG")
STACK_NEUTRAL = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "FRAME")  # leave the stack as it is
Opcode = tuple[str, Any]  # name and argument


class Leftover:
    """An empty object in the place of one that is not loaded."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None:
        """Forget what the object held."""


def load_torch(
    file: Path | bytes,
    size: int,
    max_bytes: int,
    select: Callable[[Any], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Load the tensors of a file of torch.save, in the zip format or the one before torch 1.6.

    Args:
        file: the file, which is then mapped where the format allows it, or its content.
        size: of the file in bytes, which no storage may exceed.
        max_bytes: what a tensor may reach over and, MAX_NAMES times, what all may hold together.
        select: takes the named tensors out of what was loaded; it raises UserError for anything
            else.

    Raises:
        UserError: if the file asks for more than tensors, or for more bytes than it may.
    """
    zipped = _read(file, 2) == b"PK"
    if zipped:
        leftovers = check_opcodes(_read_zip_pickle(file), size, 1)
    else:
        leftovers = check_opcodes(_read(file, MAX_PICKLE_BYTES), size, PICKLES_BEFORE_1_6)
    stand_ins: list[Any] = [
        (OrderedDict if name.endswith("Dict") else Leftover, name) for name in sorted(leftovers)
    ]
    mapped = zipped and isinstance(file, Path)
    with torch.serialization.safe_globals(stand_ins):
        check_claims(
            select(torch.load(_source(file), map_location="meta", weights_only=True)), max_bytes
        )
        return select(torch.load(_source(file), map_location="cpu", weights_only=True, mmap=mapped))


def check_claims(tensors: dict[str, Tensor], max_bytes: int) -> None:
    """Raise UserError if tensors reach beyond `max_bytes`, all together MAX_NAMES times that."""
    total = 0
    for key, tensor in tensors.items():
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        elements = int(tensor.storage_offset()) + last + 1 if tensor.numel() else 0
        reach = elements * tensor.element_size()
        total += tensor.numel() * tensor.element_size()
        if max(reach, total // MAX_NAMES) > max_bytes:
            raise UserError(f"{key} claims {max(reach, total)} bytes of a file of {max_bytes}")


def format_keys(keys: Iterable[str], most: int = 3) -> str:
    """List the first few of many keys for a message, none of them longer than 60 characters."""
    short = [k if len(k) <= 60 else k[:57] + "..." for k in keys]
    rest = f" and {len(short) - most} more" if len(short) > most else ""
    return ", ".join(short[:most]) + rest


def check_opcodes(data: bytes, size: int, pickles: int) -> set[str]:
    """Look at the opcodes of the first few pickles in `data`; nothing is executed.

    Returns the names of `LEFTOVERS` that they hold.

    Args:
        data: where the pickles stand one after another.
        size: of the file in bytes. Storages of more elements are refused: files older than torch
            1.6 have them allocated before they are read.
        pickles: how many to look at.

    Raises:
        UserError: that names every function or class asked for that does more than rebuild tensors.
    """
    scanner = _OpcodeScanner(size)
    stream = io.BytesIO(data)
    try:
        opcodes = itertools.chain.from_iterable(pickletools.genops(stream) for _ in range(pickles))
        for number, (opcode, argument, _) in enumerate(opcodes):
            if number == MAX_OPCODES:
                raise UserError(f"its pickle holds more than {MAX_OPCODES} opcodes")
            scanner.visit(opcode.name, argument)
    except ValueError as error:
        # A plain pickle ends before five are read; what it asked for until then is named.
        if not scanner.requests:
            reason = first_line(error)[:80]
            raise UserError(
                f"not a checkpoint: expected what torch.save writes ({reason})"
            ) from error
    if scanner.requests:
        raise UserError(
            f"expected tensors alone; it asks for {format_keys(sorted(scanner.requests))}. "
            "Nothing was executed; ask for its state dict alone, as safetensors or by torch.save"
        )
    return scanner.leftovers


class _OpcodeScanner:
    """Collects what opcodes ask for beyond tensors, and how many elements their storages claim."""

    def __init__(self, max_elements: int) -> None:
        self.max_elements = max_elements
        self.elements = 0
        self.leftovers: set[str] = set()  # classes that are not loaded
        self.foreign: set[str] = set()  # other functions and classes
        self.calls: set[str] = set()  # of what was named before, as a rule
        self.texts = ["", ""]  # the last two, which STACK_GLOBAL takes for its module and name
        self.recent: deque[Opcode] = deque([("", None)] * 3, maxlen=3)

    @property
    def requests(self) -> set[str]:
        """What is asked for: functions and classes where there are any, else calls."""
        made_of_leftovers = {"NEWOBJ"} if self.leftovers else set()
        return self.foreign or self.calls - made_of_leftovers

    def visit(self, name: str, argument: Any) -> None:
        """Take in the next opcode. Raises UserError if the storages claim too many elements."""
        if name == "BINPERSID":
            self.elements += _count_elements(*self.recent)
        if self.elements > self.max_elements:
            raise UserError(
                f"its tensors claim {self.elements} elements of a file of {self.max_elements} bytes"
            )
        requested = {"GLOBAL": str(argument), "STACK_GLOBAL": " ".join(self.texts)}.get(name)
        if requested and LEFTOVERS.fullmatch(requested):
            self.leftovers.add(requested.replace(" ", "."))
        elif requested and not SAFE_GLOBALS.fullmatch(requested):
            self.foreign.add(requested.replace(" ", "."))
        elif name in CALLS:
            self.calls.add(str(argument or name).replace(" ", "."))
        if name not in STACK_NEUTRAL:
            self.recent.append((name, argument))
        if isinstance(argument, str):
            self.texts = [self.texts[1], argument]


def _count_elements(first: Opcode, second: Opcode, last: Opcode) -> int:
    """Count the elements that a storage claims, by the opcodes INTEGER, perhaps NONE, TUPLE."""
    number = first if second[0] == "NONE" else second
    if last[0] != "TUPLE" or number[0] not in INTEGERS:
        raise UserError("not a checkpoint: a tensor of unknown size")
    return int(number[1])


def _read_zip_pickle(file: Path | bytes) -> bytes:
    """Read the pickle of a zip file, whose members must be uncompressed, as torch's are."""
    with open_zip(_source(file)) as archive:
        members = archive.infolist()
        pickles = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise UserError("not a checkpoint: a zip, but not one that torch.save writes")
        if any("/code/" in m.filename for m in members):
            raise UserError(
                "expected tensors alone; it is a TorchScript program. Nothing was executed"
            )
        orders = [m for m in members if m.filename.rpartition("/")[2] == "byteorder"]
        if any(archive.open(m).read(10) != sys.byteorder.encode() for m in orders):
            # torch would swap the bytes in the mapped file, and end the process.
            raise UserError("its numbers have another order of bytes than this machine's")
        compressed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
        if compressed or pickles[0].file_size > MAX_PICKLE_BYTES:
            contents = format_keys(compressed) or f"{pickles[0].file_size >> 20} MiB of opcodes"
            raise UserError(
                "expected members stored without compression, the list of tensors small; it holds "
                f"{contents}"
            )
        return archive.read(pickles[0])


def _source(file: Path | bytes) -> Any:
    """Return what torch.load and zipfile open; no type satisfies the annotations of both."""
    return io.BytesIO(file) if isinstance(file, bytes) else file


def _read(file: Path | bytes, count: int) -> bytes:
    """The first bytes of a file."""
    if isinstance(file, bytes):
        return file[:count]
    with open_regular(file) as stream:
        return stream.read(count)
