"""Mutants: files of every kind, spoilt in ways that have cost readers like ours something before.

Each is a folder with one spoilt thing in it, the words of a command that reads it, and the statuses
it may end with.
"""

import os
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from hostile.cases import LEFT_OUT, REFUSED, UNUSUAL, Mutant, spoilt_json
from hostile.strangers import strangers
from hostile.unusual import unusual


@dataclass(frozen=True)
class Kind:
    """A valid file of some kind, where it goes, and the command that reads it.

    source: the file or folder that is copied. spoilt: which file in the copy is spoilt ("" for the
    copy itself).
    """

    name: str
    source: Path
    spoilt: str
    words: tuple[str, ...]

    def copy(self, folder: Path) -> Path:
        """A fresh copy below `folder`; the path of the file to be spoilt."""
        target = folder / self.source.name
        if self.source.is_dir():
            shutil.copytree(self.source, target, symlinks=True)
        else:
            shutil.copy(self.source, target)
        return target / self.spoilt if self.spoilt else target


def kinds(base: Path, runs: dict[str, str]) -> list[Kind]:
    """Every kind of file there is, over the artefacts in `base`."""
    train = str(base / "runs" / runs["train"])
    scan = ("--encoder", train, "--detector", "duplicates")
    images, tables, arrays, weights = (base / n for n in ("images", "tables", "arrays", "weights"))
    poison = ("poison", "scenes:count=60", "--poison", "backdoor:count=6")
    data = f"npz:path={arrays}/data.npz"
    out = [
        Kind("png", images, "0000.png", ("scan", "folder:path=@/images,size=16", *scan)),
        Kind("jpg", images, "0001.jpg", ("scan", "folder:path=@/images,size=16", *scan)),
        Kind("webp", images, "0002.webp", ("scan", "folder:path=@/images,size=16", *scan)),
        Kind("bmp", images, "0003.bmp", ("scan", "folder:path=@/images,size=16", *scan)),
        Kind("caption", images, "0000.txt", ("scan", "folder:path=@/images,size=16", *scan)),
        Kind("facts", images, "0000.json", ("scan", "folder:path=@/images,size=16", *scan)),
        Kind("tar", base / "shard.tar", "", ("scan", "shards:path=@/shard.tar,size=16", *scan)),
        Kind("tgz", base / "shard.tar.gz", "", ("scan", "shards:path=@/shard.tar.gz", *scan)),
        Kind("csv", tables, "t.csv", ("scan", "table:path=@/tables/t.csv,size=16", *scan)),
        Kind("tsv", tables, "t.tsv", ("scan", "table:path=@/tables/t.tsv,size=16", *scan)),
        Kind("jsonl", tables, "t.jsonl", ("scan", "table:path=@/tables/t.jsonl,size=16", *scan)),
        Kind("parquet", tables, "t.parquet", ("scan", "table:path=@/tables/t.parquet", *scan)),
        Kind("npz", arrays / "data.npz", "", ("scan", "npz:path=@/data.npz", *scan)),
        Kind("npy", arrays / "vectors.npy", "", ("scan", "@/vectors.npy", "--detector", "lid:k=2")),
        Kind(
            "emb",
            arrays / "ready",
            "img_emb/img_emb_0.npy",
            ("scan", "@/ready", "--detector", "lid:k=2"),
        ),
        Kind(
            "meta",
            arrays / "ready",
            "metadata/metadata_0.parquet",
            ("scan", "@/ready", "--detector", "lid:k=2"),
        ),
        Kind(
            "trusted",
            arrays / "trusted.txt",
            "",
            (
                "scan",
                f"{arrays}/vectors.npy",
                "--detector",
                "lid:k=2",
                "--trusted",
                "@/trusted.txt",
            ),
        ),
        Kind(
            "classes",
            arrays / "classes.txt",
            "",
            (
                "evaluate",
                f"classifier:path={weights}/net.pth,classes=@/classes.txt",
                data,
                "--probe",
                "own",
            ),
        ),
        Kind(
            "pth",
            weights / "net.pth",
            "",
            ("evaluate", "classifier:path=@/net.pth", data, "--probe", "own"),
        ),
        Kind(
            "ddp",
            weights / "ddp.pth",
            "",
            ("evaluate", "classifier:path=@/ddp.pth", data, "--probe", "own"),
        ),
        Kind(
            "safetensors",
            weights / "net.safetensors",
            "",
            ("evaluate", "classifier:path=@/net.safetensors", data, "--probe", "own"),
        ),
    ]
    for suffix in ("npz", "npy", "pt", "png"):
        trigger = ("--trigger", f"file:path=@/trigger.{suffix}")
        out.append(
            Kind(
                f"trigger.{suffix}",
                arrays / f"trigger.{suffix}",
                "",
                (*poison, *trigger, "--target", "star"),
            )
        )
    folder = base / "runs"
    for verb, name in runs.items():
        path = folder / name
        show = ("show", f"@/{name}", "--page", "@/page.html")
        out += [
            Kind(f"{verb}/{file.name}", path, file.name, show)
            for file in sorted(path.iterdir())
            if file.is_file()
            and file.suffix in (".json", ".jsonl", ".safetensors", ".parquet", ".npz", ".txt")
        ]
    poisoned, trained, scanned = (runs[v] for v in ("poison", "train", "scan"))
    out += [
        Kind(
            "plan, trained on",
            folder / poisoned,
            "plan.jsonl",
            ("train", f"@/{poisoned}", "--objective", "clip:epochs=1,batch=64"),
        ),
        Kind(
            "encoder, evaluated",
            folder / trained,
            "encoder.json",
            ("evaluate", f"@/{trained}", "scenes:count=40,split=test"),
        ),
        Kind(
            "weights, evaluated",
            folder / trained,
            "encoder.safetensors",
            ("evaluate", f"@/{trained}", "scenes:count=40,split=test"),
        ),
        Kind(
            "manifest, evaluated",
            folder / trained,
            "manifest.json",
            ("evaluate", f"@/{trained}", "scenes:count=40,split=test"),
        ),
        Kind(
            "keep-list, trained on",
            folder / scanned,
            "keep.txt",
            (
                "train",
                "scenes:count=200",
                "--keep",
                f"@/{scanned}",
                "--objective",
                "clip:epochs=1,batch=64",
            ),
        ),
    ]
    return out


def spoilt_bytes(content: bytes, seed: int) -> Iterator[tuple[str, bytes]]:
    """Truncations, flips, insertions and repetitions of any file."""
    draw = random.Random(seed)
    n = len(content)
    yield "empty", b""
    for share in (0.1, 0.5, 0.97):
        yield f"cut at {share}", content[: int(n * share)]
    for i in range(3):
        flipped = bytearray(content)
        for at in (draw.randrange(n) for _ in range(max(1, n // 200))):
            flipped[at] ^= 1 << draw.randrange(8)
        yield f"flips {i}", bytes(flipped)
    at = draw.randrange(n)
    yield "zeros within", content[:at] + bytes(64) + content[at:]
    yield "twice", content + content
    yield "random", draw.randbytes(512)
    yield "0xff", content[: n // 2] + b"\xff" * 64 + content[n // 2 :]


def mutants(base: Path, runs: dict[str, str], json_cases: int = 9) -> Iterator[Mutant]:
    """All of them."""
    for number, kind in enumerate(kinds(base, runs)):

        def spoil(change: Callable[[Path], None], kind: Kind = kind) -> Callable[[Path], None]:
            return lambda folder: change(kind.copy(folder))

        path = kind.source / kind.spoilt if kind.spoilt else kind.source
        content = path.read_bytes()
        for name, changed in spoilt_bytes(content, number):
            yield Mutant(
                f"{kind.name}: {name}", kind.words, spoil(lambda p, b=changed: p.write_bytes(b))
            )
        for change in UNUSUAL:
            yield Mutant(f"{kind.name}: {change.__name__}", kind.words, spoil(change))
        lines = (
            content.decode(errors="replace").split("\n")
            if path.suffix in (".json", ".jsonl")
            else []
        )
        if path.suffix == ".json":
            for name, text in spoilt_json(content.decode(), number, json_cases):
                yield Mutant(
                    f"{kind.name}: {name}", kind.words, spoil(lambda p, t=text: p.write_text(t))
                )
        elif lines and lines[0].startswith("{"):
            for name, text in spoilt_json(lines[0], number, json_cases):
                whole = "\n".join([text, *lines[1:]])
                yield Mutant(
                    f"{kind.name}: {name}", kind.words, spoil(lambda p, t=whole: p.write_text(t))
                )
    yield from bombs(base, runs)
    yield from strangers(base, runs)
    train = str(base / "runs" / runs["train"])
    yield from unusual(("--encoder", train, "--detector", "duplicates"))


def bombs(base: Path, runs: dict[str, str]) -> Iterator[Mutant]:
    """Small files that claim much, and files whose names are the attack."""
    train = str(base / "runs" / runs["train"])
    scan = ("--encoder", train, "--detector", "duplicates")

    def png_of(width: int, height: int) -> bytes:
        import zlib

        def chunk(tag: bytes, body: bytes) -> bytes:
            crc = zlib.crc32(tag + body)
            return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", crc)

        head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        row = bytes(1 + (width + 7) // 8)
        body = zlib.compress(row * min(height, 4000), 9)
        return (
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
        )

    def images(contents: dict[str, bytes]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            (folder / "f").mkdir()
            for name, content in contents.items():
                (folder / "f" / name).write_bytes(content)

        return make

    for side in (8_000, 20_000, 65_535):
        yield Mutant(
            f"png bomb {side}",
            ("scan", "folder:path=@/f,size=16,layout=flat", *scan),
            images({f"{i}.png": png_of(side, side) for i in range(4)}),
        )
    for name in (
        "\x1b[31mred.png",
        "[bold]x.png",
        "a\nb.png",
        "x" * 250 + ".png",
        "a,b={c}.png",
        "-rf.png",
        "\u202egnp.png",
    ):
        yield Mutant(
            f"name {name[:12]!r}",
            ("scan", "folder:path=@/f,size=16,layout=flat", *scan),
            images({name: b"not an image", "good.png": png_of(8, 8)}),
        )

    def npy(shape: str, kind: str = "<f4") -> bytes:
        head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
        head += b" " * (-(10 + len(head) + 1) % 64) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(256)

    for shape in (
        "(1000000000000, 512)",
        "(4, -8)",
        "(1, 2, 3)",
        "()",
        "(0, 8)",
        "(2, 0)",
        "(True, 8)",
        "(8, 99999999)",
        "__import__('os').system('touch EXECUTED')",
    ):
        yield Mutant(
            f"npy of shape {shape}",
            ("scan", "@/v.npy", "--detector", "lid:k=2"),
            lambda f, s=shape: (f / "v.npy").write_bytes(npy(s)) and None,
        )
    for kind in ("|O", "<U4", "<M8[s]", "<c8", "[('a', '<f4')]", "<f2", "|V8"):
        yield Mutant(
            f"npy of kind {kind}",
            ("scan", "@/v.npy", "--detector", "lid:k=2"),
            lambda f, k=kind: (f / "v.npy").write_bytes(npy("(8, 8)", k)) and None,
        )

    def zip_with(entries: dict[str, bytes], claimed: int | None = None) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            path = folder / "data.npz"
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
                for name, content in entries.items():
                    file.writestr(name, content)
            if claimed is not None:
                raw = path.read_bytes()
                at = raw.rfind(b"PK\x01\x02")
                path.write_bytes(raw[: at + 24] + struct.pack("<I", claimed) + raw[at + 28 :])

        return make

    pixels = npy("(40000, 64, 64, 3)", "|u1")
    yield Mutant(
        "npz that inflates",
        ("scan", "npz:path=@/data.npz", *scan),
        zip_with({"x.npy": pixels + bytes(400 << 20)}),
    )
    yield Mutant(
        "npz that lies of its size",
        ("scan", "npz:path=@/data.npz", *scan),
        zip_with({"x.npy": pixels}, 1 << 31),
    )
    yield Mutant(
        "npz with a way out",
        ("scan", "npz:path=@/data.npz", *scan),
        zip_with({"../x.npy": pixels, "/x.npy": pixels}),
    )

    def tar_with(*members: tuple[tarfile.TarInfo, bytes]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            with tarfile.open(folder / "shard.tar", "w", format=tarfile.GNU_FORMAT) as tar:
                for info, content in members:
                    if info.isreg() and info.size == 0:
                        info.size = len(content)
                    tar.addfile(info, BytesIO(content) if content else None)

        return make

    def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        return info

    good = (member("g.png"), png_of(8, 8)), (member("g.txt"), b"a red star")
    for name, extra in {
        "symlink": (member("a.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
        "hard link": (member("a.png", tarfile.LNKTYPE, "g.png"), b""),
        "device": (member("a.png", tarfile.CHRTYPE), b""),
        "fifo": (member("a.png", tarfile.FIFOTYPE), b""),
        "way out": (member("../../../tmp/escaped.png"), png_of(8, 8)),
        "absolute": (member("/tmp/escaped.png"), png_of(8, 8)),
        "long name": (member("d/" * 3000 + "a.png"), png_of(8, 8)),
        "escapes": (member("\x1b[2Ja.png"), b"no image"),
        "same key": (member("g.png"), png_of(9, 9)),
        "dots": (member("a.b.c.png"), png_of(8, 8)),
    }.items():
        yield Mutant(
            f"tar with {name}",
            ("scan", "shards:path=@/shard.tar,size=16", *scan),
            tar_with(*good, extra),
        )

    for name, words in {
        "brace range": ("scan", "shards:path=@/{00000000000..99999999999}.tar", *scan),
        "scenes without end": ("scan", "scenes:count=1000000000000", *scan),
        "network of 1e8": ("train", "scenes:count=60", "--network", "clip_small:width=100000000"),
        "spec nested 20,000 deep": ("scan", "scenes:count=" + "(" * 20_000 + ")" * 20_000, *scan),
        "rate of nan": ("train", "scenes:count=60", "--objective", "clip:lr=nan"),
        "home of nobody": ("scan", "folder:path=~nosuchuser/x", *scan),
        "long runs folder": ("scan", "scenes:count=60", *scan, "--runs", "@/" + "r" * 300),
        "page in a folder that is not there": ("show", train, "--page", "@/no/where/page.html"),
        "surrogates": ("scan", "folder:path=@/\udcff", *scan),
        "text beyond unicode": (
            "poison",
            "scenes:count=60",
            "--poison",
            "backdoor:count=4",
            "--trigger",
            "patch",
            "--target",
            "\ud800",
        ),
    }.items():
        yield Mutant(name, words, lambda folder: None, (REFUSED, LEFT_OUT))
    yield Mutant(
        "csv of bare carriage returns",
        ("scan", "table:path=@/t.csv", *scan),
        lambda f: (f / "t.csv").write_bytes(b"filepath,title\ra.png,b\rc.png,d\r") and None,
    )
    yield Mutant(
        "csv with one endless cell",
        ("scan", "table:path=@/t.csv", *scan),
        lambda f: (f / "t.csv").write_bytes(b'filepath,title\n"' + b"a" * (64 << 20)) and None,
    )
    yield Mutant(
        "jsonl with one endless line",
        ("scan", "table:path=@/t.jsonl", *scan),
        lambda f: (f / "t.jsonl").write_bytes(b'{"a":"' + b"a" * (64 << 20)) and None,
    )
    yield Mutant(
        "pickle",
        ("evaluate", "classifier:path=@/n.pth", "scenes:count=40", "--probe", "own"),
        write_pickle,
    )


def write_pickle(folder: Path) -> None:
    """A checkpoint that touches a file when it is unpickled."""
    import pickle

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {folder / 'EXECUTED'}",)

    (folder / "n.pth").write_bytes(pickle.dumps({"state_dict": Payload()}))
