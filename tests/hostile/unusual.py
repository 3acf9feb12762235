"""Mutants that other readers take otherwise, and small files that repeat one large part: none may
be read in silence, or for long.
"""

import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from hostile.artefacts import caption, picture, small_resnet
from hostile.cases import LEFT_OUT, READ_ALL, REFUSED, Mutant
from made_files import tar_of
from PIL import Image
from safetensors.torch import save


def unusual(scan: tuple[str, ...]) -> Iterator[Mutant]:
    """All of them."""
    evaluate = ("evaluate", "classifier:path=@/n.pth", "scenes:count=40", "--probe", "own")
    for name, content in endless_pictures().items():
        words = ("scan", "folder:path=@/f,size=16,layout=flat", *scan)
        yield Mutant(f"picture: {name}", words, beside_pictures(content), (REFUSED, LEFT_OUT))
        poison = ("poison", "scenes:count=60", "--poison", "backdoor:count=6", "--target", "star")
        trigger = ("--trigger", "file:path=@/f/x.png,mode=paste,size=4")
        yield Mutant(f"trigger: {name}", (*poison, *trigger), beside_pictures(content), (REFUSED,))
    for name, text in tables().items():
        words = ("scan", f"table:path=@/f/{name},size=16", *scan)
        statuses = (REFUSED,) if "twice" in name else (READ_ALL, LEFT_OUT)
        yield Mutant(f"table: {name}", words, beside_pictures(b"", {name: text}), statuses)
    for name, make in endless_tars().items():
        words = ("scan", "shards:path=@/s.tar,size=16", *scan[:-1], "clip_score")
        yield Mutant(f"tar: {name}", words, make)
        poison = ("--poison", "backdoor:count=2", "--trigger", "patch:size=4", "--target", "star")
        yield Mutant(f"tar poisoned: {name}", ("poison", words[1], *poison), make)
    for name, content in lying_tars().items():
        words = ("scan", "shards:path=@/s.tar,size=16", *scan[:-1], "clip_score")
        yield Mutant(f"tar: {name}", words, write_bytes("s.tar", content))
    for name, change in lying_safetensors().items():
        content = spoil_safetensors(change)
        yield Mutant(f"safetensors: {name}", evaluate, write_bytes("n.pth", content), (REFUSED,))
    yield Mutant(
        "npz: a member twice", ("scan", "npz:path=@/d.npz", *scan), write_twice, (REFUSED,)
    )
    yield Mutant("checkpoint: numbers of a big-endian machine", evaluate, write_swapped, (REFUSED,))
    yield Mutant("checkpoint: 300,000 empty tensors", evaluate, write_empty_tensors, (REFUSED,))


def endless_tars() -> dict[str, Callable[[Path], None]]:
    """Tars whose headers or captions took a time that was the square of their length."""

    def write(members: list[tuple[str, bytes]], **records: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            path, kind = folder / "s.tar", tarfile.PAX_FORMAT if records else tarfile.GNU_FORMAT
            tar_of(path, members, format=kind, pax_headers=records)

        return make

    good = [(f"{i}.{e}", c) for i in range(4) for e, c in (("png", picture(i)), ("txt", b"a star"))]
    marks = ("a star" + "\u0301\u0316" * 400_000).encode()
    return {
        "PAX records of all members": write(
            [*good, *((f"{i}.foo", b"") for i in range(50_000))],
            **{f"a{i}": "" for i in range(1500)},
        ),
        "names of 8,000 parts": write(
            good + [("a." * 8000 + f"{i}.foo", b"") for i in range(3000)]
        ),
        "captions of marks": write([*good, ("5.png", picture(5)), ("5.txt", marks)]),
        "captions of a word": write([*good, ("5.png", picture(5)), ("5.txt", b"xyzw" * 1_000_000)]),
    }


def write_bytes(name: str, content: bytes) -> Callable[[Path], None]:
    """Write a file below the folder that is given."""

    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return make


def lying_tars() -> dict[str, bytes]:
    """Tars whose headers claim other sizes, places and kinds than there are."""

    def block(kind: bytes, body: bytes = b"", size: bytes = b"", link: bytes = b"") -> bytes:
        head = b"x.png".ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2
        head += (size or b"%011o\0" % len(body)).ljust(12, b"\0")[:12] + b"0" * 11 + b"\0"
        tail = kind + link.ljust(100, b"\0") + b"ustar\x0000"
        whole = (head + b" " * 8 + tail).ljust(512, b"\0")
        whole = head + b"%06o\0 " % sum(whole) + whole[156:]
        return whole + body.ljust(-(-len(body) // 512) * 512, b"\0")

    def pax(key: str, value: str, size: bytes = b"") -> bytes:
        record = f" {key}={value}\n"
        length = next(n for n in range(len(record), 999) if len(f"{n}{record}") == n)
        return block(b"x", f"{length}{record}".encode(), size)

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(4):
            for ending, content in (("png", picture(i)), ("txt", caption(i).encode())):
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data, end, shown = file.getvalue().rstrip(b"\0"), bytes(1024), picture(5)
    good = data.ljust(-(-len(data) // 512) * 512, b"\0")
    sparse = pax("GNU.sparse.major", "1") + pax("GNU.sparse.realsize", "9" * 14)
    return {
        "a size of 10^15 in PAX": good + pax("size", "9" * 15) + block(b"0", shown) + end,
        "a size below 0 in PAX": good + pax("size", "-1") + block(b"0", shown) + end,
        "8 GB of PAX": good + pax("path", "a.png", b"%011o\0" % (8 << 30)) + end,
        "a name with NUL in PAX": good + pax("path", "a\0b.png") + block(b"0", shown) + end,
        "sparse": good + sparse + block(b"0", b"1\n0\n99999999999\n") + end,
        "a sparse map of 4,000,000": good + sparse + block(b"0", b"4000000\n" + b"0\n" * 4_000_000),
        "a size below 0": good + block(b"0", shown, b"\xff" * 12) + end,
        "a hard link out": good + block(b"1", link=b"/etc/passwd") + end,
        "a name of 30 MB": good + block(b"L", b"a" * (30 << 20)) + block(b"0", shown) + end,
        "a kind that is none": good + block(b"Z", shown) + end,
    }


def lying_safetensors() -> dict[str, dict[str, object]]:
    """What the header of a file says of one of its weights."""
    return {
        "places beyond": {"data_offsets": [1 << 40, (1 << 40) + 4]},
        "places backwards": {"data_offsets": [8, 0]},
        "places of another": {"data_offsets": [0, 8]},
        "a shape of 2^66": {"shape": [1 << 33, 1 << 33]},
        "a type of 8 bits": {"dtype": "F8_E4M3"},
    }


def spoil_safetensors(change: dict[str, object]) -> bytes:
    """A small network whose header says another thing of its last weight."""
    content = save(small_resnet())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    last = max(header, key=lambda name: header[name]["data_offsets"])
    spoilt = json.dumps(header | {last: header[last] | change}).encode()
    return struct.pack("<Q", len(spoilt)) + spoilt + content[8 + length :]


def beside_pictures(content: bytes, others: dict[str, str] | None = None) -> Callable[[Path], None]:
    """Four good pictures, one with this content, and other files."""

    def make(folder: Path) -> None:
        (folder / "f").mkdir()
        for i in range(4):
            (folder / "f" / f"{i}.png").write_bytes(picture(i))
        if content:
            (folder / "f" / "x.png").write_bytes(content)
        for name, text in (others or {}).items():
            (folder / "f" / name).write_text(text)

    return make


def endless_pictures() -> dict[str, bytes]:
    """Pictures of parts without number, that hold no pixels."""

    def encode(kind: str) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (64, 64)).save(file, kind)
        return file.getvalue()

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    jpeg, png = encode("JPEG"), encode("PNG")
    exif = b"\xff\xe1" + struct.pack(">H", 9) + b"Exif\0\0a"
    return {
        "500,000 times EXIF": jpeg[:2] + 500_000 * exif + jpeg[2:],
        "5,000,000 empty segments": jpeg[:2] + 5_000_000 * b"\xff\xe5\0\2" + jpeg[2:],
        "30 MB of filling": jpeg[:2] + bytes([255]) * 30_000_000 + jpeg[2:],
        "3,000,000 comments": b"P3\n8 8\n255\n" + 3_000_000 * b"#\n" + 192 * b"7 ",
        "a header of 30 MB": b"P6\n" + 15_000_000 * b"#\n" + b"8 8\n255\n" + bytes(192),
        "2,000,000 empty chunks": png[:33] + 2_000_000 * chunk(b"vpAg", b"") + png[33:],
    }


def tables() -> dict[str, str]:
    """Tables whose columns other readers find elsewhere."""
    rows = [(f"{i}.png", caption(i)) for i in range(4)]
    objects = [{"image": name, "caption": text} for name, text in rows]
    lines = [json.dumps(line) + "\n" for line in [{"image": "0.png"}, *objects]]
    return {
        "caption-twice.csv": "filepath,title,title\n" + "".join(f"{n},{t},x\n" for n, t in rows),
        "later.jsonl": "".join(lines),
        "cells.csv": "filepath,title\n"
        + "a,b,c\n" * 200_000
        + "".join(f"{n},{t}\n" for n, t in rows),
        "empty.csv": "filepath,title\n" + "\n" * 2_000_000 + "".join(f"{n},{t}\n" for n, t in rows),
    }


def write_swapped(folder: Path) -> None:
    """A checkpoint whose bytes torch would swap in the mapped file, which ends the process."""
    file = io.BytesIO()
    torch.save(small_resnet(), file)
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(folder / "n.pth", "w") as swapped:
        for name in archive.namelist():
            swapped.writestr(name, b"big" if name.endswith("byteorder") else archive.read(name))


def write_empty_tensors(folder: Path) -> None:
    """A safetensors header without weights, whose tensors take a hundred times its bytes."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"layer{i}.weight": empty for i in range(300_000)}).encode()
    (folder / "n.pth").write_bytes(struct.pack("<Q", len(header)) + header)


def write_twice(folder: Path) -> None:
    """An archive in which NumPy finds other images than those that come first."""
    with zipfile.ZipFile(folder / "d.npz", "w") as archive:
        for name, shade in (("x", 0), ("x.npy", 255)):
            file = io.BytesIO()
            np.save(file, np.full((8, 16, 16, 3), shade, np.uint8))
            archive.writestr(name, file.getvalue())
