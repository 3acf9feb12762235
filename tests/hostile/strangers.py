"""Mutants of what strangers hand over beside data: model folders, saved data sets, lists, banks,
plans, shared vectors.

As in `mutants`, each is a folder with one spoilt thing in it, the words of a command that reads it,
and the statuses that it may end with.
"""

import csv
import json
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hostile.artefacts import (
    COLOURS,
    SMALL_CLIP,
    arrow_stream,
    caption,
    picture,
    write_saved_dataset,
)
from hostile.cases import ESCAPES, Mutant, as_endless_device, as_fifo, as_loop, spoilt_json
from made_files import add_members
from PIL import Image

EVIL = "import os\nopen('EXECUTED', 'w')\nos.system('touch EXECUTED')\n"
HUGE = 10**400
Values = Mapping[str, Any]


def strangers(base: Path, runs: dict[str, str]) -> Iterator[Mutant]:
    """All of them."""
    train = str(base / "runs" / runs["train"])
    scan = ("--encoder", train, "--detector", "duplicates")
    yield from model_folders(base)
    yield from saved_datasets(scan)
    yield from source_tables(base, scan)
    yield from trigger_pictures()
    yield from trigger_fields(base, runs)
    yield from lists_of_strangers(base, runs)
    yield from banks_of_strangers(train)
    yield from shared_vectors(base, runs)
    yield from names_in_logs(scan)


def write_text(name: str, text: str) -> Callable[[Path], None]:
    """Write a file below the folder that is given."""

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return make


# Folders of pretrained models


def model_folders(base: Path) -> Iterator[Mutant]:
    """Configs of every form, links and code."""
    data = f"npz:path={base}/arrays/data.npz"

    def words(name: str) -> tuple[str, ...]:
        return ("evaluate", f"@/{name}", data, "--probe", "knn:k=2")

    def changed(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            shutil.copytree(base / name, folder / name)
            change(folder / name)

        return make

    spoilt = (
        ("vit", "config.json", 14),
        ("clip", "config.json", 10),
        ("vit", "preprocessor_config.json", 10),
        ("oc", "open_clip_config.json", 14),
    )
    for number, (name, file, most) in enumerate(spoilt):
        for what, text in spoilt_json((base / name / file).read_text(), number, most):
            change = write_text(file, text)
            yield Mutant(f"{name}/{file}: {what}", words(name), changed(name, change))
    for name, file, values in wrong_values():
        facts = json.loads((base / name / file).read_text()) | values
        change = write_text(file, json.dumps(facts))
        shown = str(values)[:60]
        yield Mutant(f"{name}/{file}: {shown}", words(name), changed(name, change))
    for what, change in unusual_folders().items():
        yield Mutant(f"vit folder: {what}", words("vit"), changed("vit", change))


def wrong_values() -> Iterator[tuple[str, str, Values]]:
    """Values of a type that fits, and of no sense."""
    vit: list[Values] = [
        {key: value} for key in ("hidden_size", "image_size") for value in (HUGE, 10**12, -1, 0)
    ]
    vit += [{"num_hidden_layers": 10**9}, {"patch_size": 0}, {"num_attention_heads": 7}]
    vit += [
        {"model_type": "../../evil"},
        {"model_type": ESCAPES},
        {"model_type": "dinov2", "mlp_ratio": 1e308},
    ]
    vit += [{"model_type": "dinov2", "mlp_ratio": "x"}, {"model_type": "dinov2", "mlp_ratio": [1]}]
    vit += [{"auto_map": {"AutoModel": "evil--evil.Model"}, "model_type": "evil"}]
    vit += [{"id2label": {str(i): ESCAPES for i in range(4)}}, {"id2label": {"x" * 99: []}}]
    yield from (("vit", "config.json", values) for values in vit)
    for values in (
        {"resample": []},
        {"resample": {}},
        {"resample": HUGE},
        {"size": [[[16]]]},
        {"size": HUGE},
        {"size": {"height": 10**9}},
        {"crop_size": True, "do_center_crop": 1},
        {"image_mean": [HUGE] * 3},
        {"image_std": [1e-320] * 3},
        {"image_mean": [0.5] * 10**6},
        {"rescale_factor": 1e-320},
        {"image_processor_type": "evil.Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}},
    ):
        yield "vit", "preprocessor_config.json", values
    for part in (
        {"embed_dim": HUGE},
        {"vision_cfg": {"timm_model_name": "../../evil", "image_size": 16}},
        *(
            {"vision_cfg": SMALL_CLIP["vision_cfg"] | {"layers": n}}
            for n in (10**9, "os", [], None)
        ),
        {"vision_cfg": SMALL_CLIP["vision_cfg"] | {"image_size": [10**6, 10**6]}},
        {"vision_cfg": SMALL_CLIP["vision_cfg"] | {"patch_size": 0}},
        {"text_cfg": SMALL_CLIP["text_cfg"] | {"vocab_size": 10**12}},
        {
            "text_cfg": SMALL_CLIP["text_cfg"]
            | {"hf_model_name": "evil/evil", "hf_model_pretrained": True}
        },
        {"text_cfg": SMALL_CLIP["text_cfg"] | {"hf_tokenizer_name": "evil/evil"}},
        {"custom_text": "evil"},
    ):
        yield "oc", "open_clip_config.json", {"model_cfg": SMALL_CLIP | part}


def unusual_folders() -> dict[str, Callable[[Path], object]]:
    """What may stand in the place of files of a model, and beside them."""

    def index(names: list[str]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            (folder / "model.safetensors").unlink()
            weight_map = {f"w{i}": name for i, name in enumerate(names)}
            text = json.dumps({"weight_map": weight_map})
            (folder / "model.safetensors.index.json").write_text(text)

        return make

    def remote_code(folder: Path) -> None:
        (folder / "modeling_evil.py").write_text(EVIL)
        (folder / "__init__.py").write_text(EVIL)
        config = json.loads((folder / "config.json").read_text())
        config |= {"auto_map": {"AutoModel": "modeling_evil.Evil"}, "trust_remote_code": True}
        (folder / "config.json").write_text(json.dumps(config))

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        payload = b"cposix\nsystem\n(S'touch EXECUTED'\ntR."
        (folder / "pytorch_model.bin").write_bytes(payload)

    def states(folder: Path) -> None:
        for i in range(2000):
            (folder / "snapshots" / f"{i}").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("../../../../etc")

    def giant(folder: Path) -> None:
        with (folder / "config.json").open("r+b") as file:
            file.truncate(200 << 30)

    return {
        "weights above it": index(["../../../../etc/passwd"]),
        "weights that are their own index": index(["model.safetensors.index.json"]),
        "weights of another type": index([[], {}, 1, None]),  # type: ignore[list-item]
        "weights in 100,000 files": index([f"{i}.safetensors" for i in range(100_000)]),
        "remote code": remote_code,
        "pickle": pickled,
        "states of a cache": states,
        "config of 200 GiB": giant,
        "config that never ends": lambda f: as_endless_device(f / "config.json"),
        "config that blocks": lambda f: as_fifo(f / "config.json"),
        "preprocessor that blocks": lambda f: as_fifo(f / "preprocessor_config.json"),
        "weights that lead round": lambda f: as_loop(f / "model.safetensors"),
        "tokenizer that never ends": lambda f: as_endless_device(f / "tokenizer.json"),
    }


# Data sets as `datasets` saves them


def saved_datasets(scan: tuple[str, ...]) -> Iterator[Mutant]:
    """Spoilt Arrow streams, and facts beside them that lie."""
    words = ("scan", "@/d", *scan)
    stream = arrow_stream()

    def changed(content: bytes | None, **files: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            write_saved_dataset(folder / "d")
            if content is not None:
                (folder / "d" / "data-00000-of-00001.arrow").write_bytes(content)
            for name, text in files.items():
                (folder / "d" / f"{name}.json").write_text(text)

        return make

    for share in (0.02, 0.2, 0.5, 0.9, 0.999):
        yield Mutant(f"arrow cut at {share}", words, changed(stream[: int(share * len(stream))]))
    for at in (0, 4, 8, 16, 64, 256, 700, len(stream) // 2):
        flipped = bytearray(stream)
        flipped[at : at + 4] = b"\xff\xff\xff\x7f"
        yield Mutant(f"arrow with 2^31 at {at}", words, changed(bytes(flipped)))
    for rows in (10**12, -1, 2**63 - 1):
        patched = stream.replace(struct.pack("<q", 8), struct.pack("<q", rows))
        yield Mutant(f"arrow of {rows} rows", words, changed(patched))
    nulls = BytesIO()
    schema = pa.schema([("image", pa.null()), ("caption", pa.null())])
    with pa.ipc.new_stream(nulls, schema) as writer:
        few = pa.nulls(8)
        writer.write_batch(pa.record_batch([few, few], schema=schema))
    many = nulls.getvalue().replace(struct.pack("<q", 8), struct.pack("<q", 1 << 40))
    yield Mutant("arrow of 2^40 nulls", words, changed(many))
    file = BytesIO()
    table = pa.table({"image": [picture(0)], "caption": ["a"]})
    with pa.ipc.new_file(file, table.schema) as random_access:
        random_access.write_table(table)
    yield Mutant("arrow as a file, no stream", words, changed(file.getvalue()))
    for name in ("state", "dataset_info", "dataset_dict"):
        for text in (
            "[" * 200_000,
            "null",
            json.dumps({"_data_files": [{"filename": "/etc/passwd"}]}),
        ):
            yield Mutant(f"{name}.json {text[:30]}", words, changed(None, **{name: text}))
    yield Mutant("arrow that blocks", words, _as_other(as_fifo))
    yield Mutant("arrow that never ends", words, _as_other(as_endless_device))


def _as_other(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        write_saved_dataset(folder / "d")
        change(folder / "d" / "data-00000-of-00001.arrow")

    return make


# Where records come from


def source_tables(base: Path, scan: tuple[str, ...]) -> Iterator[Mutant]:
    """Tables of `--sources`, and columns and keys that name a source."""
    words = ("scan", f"shards:path={base}/shard.tar,size=16", *scan, "--sources", "@/s.csv")
    many = "id,source\n" + "".join(f"shard/{i:04d},{i}\n" for i in range(300_000))
    tables = {
        "escapes": "id,source\n" + "".join(f'shard/{i:04d},"{ESCAPES}{i}"\n' for i in range(8)),
        "formulas": "id,source\n"
        + "".join(f"shard/{i:04d},=cmd|' /C calc'!A{i}\n" for i in range(8)),
        "one endless name": "id,source\nshard/0000," + "a" * (8 << 20) + "\n",
        "no ids of these": "id,source\nx,y\n",
        "a column twice": "id,source,source\nshard/0000,a,b\n",
        "no column": "a,b\n1,2\n",
        "nothing": "",
        "nulls": "id,source\nshard/0000,\0\n",
        "many": many,
        "not UTF-8": "id,source\nshard/0000,\udcff\udcfe\n",
        "open quote": 'id,source\nshard/0000,"a\n' + "x\n" * 100_000,
    }
    for name, text in tables.items():

        def make(folder: Path, text: str = text) -> None:
            (folder / "s.csv").write_bytes(text.encode(errors="surrogateescape"))

        yield Mutant(f"sources: {name}", words, make)
    for name, change in (("blocks", as_fifo), ("never ends", as_endless_device), ("loop", as_loop)):

        def replaced(folder: Path, change: Callable[[Path], None] = change) -> None:
            (folder / "s.csv").write_text("id,source\n")
            change(folder / "s.csv")

        yield Mutant(f"sources: {name}", words, replaced)
    for key, value in {
        "list": [1],
        "object": {"a": 1},
        "escapes": ESCAPES,
        "long": "a" * 100_000,
        "number": HUGE,
        "host of escapes": "http://\x1b[31m\u202e/x",
        "bracketed host": "http://[::1",
        "port": "http://a:99999999/",
    }.items():
        facts = {"source": value, "url": value}
        tar = ("scan", "shards:path=@/s.tar,size=16,source=source", *scan, "--sources", "auto")
        yield Mutant(f"source of a record: {key}", tar, _tar_of_facts(facts))


def _tar_of_facts(facts: Values) -> Callable[[Path], None]:
    """A shard whose JSON members say the same of every record."""

    def make(folder: Path) -> None:
        with tarfile.open(folder / "s.tar", "w") as tar:
            for i in range(8):
                parts = {"png": picture(i), "txt": caption(i).encode()}
                parts["json"] = json.dumps(facts).encode()
                add_members(tar, {f"{i:04d}.{suffix}": part for suffix, part in parts.items()})

    return make


# Pictures and fields of triggers


def png_header(width: int, height: int, depth: int, kind: int, body: bytes) -> bytes:
    """A PNG that claims a size, with some compressed content. kind: 6 is RGBA, 4 grey with
    alpha.
    """

    def chunk(tag: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + tag
            + content
            + struct.pack(">I", zlib.crc32(tag + content))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(body, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def animated(kind: str) -> bytes:
    """Two hundred frames."""
    frames = [Image.new("RGBA", (16, 16), (i, 0, 0, i)) for i in range(200)]
    file = BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def trigger_pictures() -> Iterator[Mutant]:
    """Pictures as stickers, patterns, patches and masks."""
    deep = BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200).save(deep, "PNG")
    palette = BytesIO()
    Image.new("P", (16, 16)).save(palette, "PNG", transparency=b"\x00" * 200)
    pictures = {
        "64 megapixels with alpha": png_header(8000, 8000, 8, 6, bytes(32_001 * 8000)),
        "4 gigapixels with alpha": png_header(65_535, 65_535, 8, 6, bytes(1000)),
        "16 bits with alpha": png_header(16, 16, 16, 6, bytes(129 * 16)),
        "grey with alpha": png_header(16, 16, 8, 4, bytes(33 * 16)),
        "16 bits": deep.getvalue(),
        "palette with alpha": palette.getvalue(),
        "animated PNG": animated("PNG"),
        "animated GIF": animated("GIF"),
        "1 by 10,000": png_header(1, 10_000, 8, 6, bytes(5 * 10_000)),
        "nothing": b"",
    }
    poison = ("poison", "scenes:count=60", "--poison", "backdoor:count=6", "--target", "star")
    for name, content in pictures.items():
        for trigger in (
            "sticker:image=@/t.png",
            "blend:pattern=@/t.png",
            "file:path=@/t.png,mode=paste,size=4",
        ):

            def make(folder: Path, content: bytes = content) -> None:
                (folder / "t.png").write_bytes(content)

            yield Mutant(f"{trigger[:7]}: {name}", (*poison, "--trigger", trigger), make)


FIELDS = (
    "sticker:size=nan",
    "sticker:size=(nan,nan)",
    "sticker:turn=1e308",
    "sticker:light=(-1,inf)",
    "sticker:alpha=nan",
    "sticker:place=nan/nan",
    "sticker:seed=-99999999999999999999",
    "tint:strength=nan",
    "tint:colour=(1e308,0,0)",
    "tint:colour=(-1,0,0)",
    "gradient:strength=1e308",
    "gradient:direction=nan",
    "noise:strength=nan",
    "noise:strength=-1e308",
    "blur:sigma=1e308",
    "blur:sigma=nan",
    "blur:relative=-1",
    "jpeg:quality=-1",
    "jpeg:quality=99999999999",
    "resample:factor=nan",
    "resample:factor=1e308",
    "spectrum:magnitude=nan",
    "spectrum:rows=(-1)",
    "spectrum:rows=(99999),columns=(99999),block=100000",
    "spectrum:block=-5",
    "line:width=99999999999",
    "line:angle=nan",
    "line:offset=(-1e308,1e308)",
    "ring:width=-1",
    "ring:margin=99999999999",
    "shape:count=1e9",
    "shape:count=999999999",
    "shape:size=nan",
    "text:size=nan",
    "text:word=\u202e\x1b[31m",
    "text:word=" + "a" * 100_000,
    "filter:strength=nan",
    "several:triggers=(patch+patch+" + "+".join(["patch"] * 1000) + ")",
    "sinusoid:delta=nan",
    "sinusoid:frequency=1e308",
    "warp:strength=1e308",
    "warp:k=999999999",
    "augment:noise=nan",
)


def trigger_fields(base: Path, runs: dict[str, str]) -> Iterator[Mutant]:
    """Fields of the newer triggers, on the command line and in the plan of a stranger's run."""
    poison = ("poison", "scenes:count=60", "--poison", "backdoor:count=6", "--target", "star")
    for spec in FIELDS:
        words = (*poison, "--trigger", spec)
        yield Mutant(f"field {spec[:40]!r}", words, lambda folder: None)
    source = base / "runs" / runs["poison"]
    train = ("train", f"@/{source.name}", "--objective", "clip:epochs=1,batch=64")
    for spec in (
        *FIELDS[::3],
        "./evil.py:k=1",
        "sticker:image=/etc/passwd",
        "blend:pattern=/dev/zero",
    ):

        def make(folder: Path, spec: str = spec) -> None:
            shutil.copytree(source, folder / source.name)
            (folder / "evil.py").write_text(EVIL)
            for name in ("plan.jsonl", "manifest.json"):
                path = folder / source.name / name
                text = path.read_text().replace("patch:size=6", json.dumps(spec)[1:-1])
                path.write_text(text)

        yield Mutant(f"plan with {spec[:40]!r}", train, make)


# Lists, banks and shared vectors


def lists_of_strangers(base: Path, runs: dict[str, str]) -> Iterator[Mutant]:
    """keep.txt, removed.csv and scores.csv of a scan that somebody else wrote."""
    scanned = base / "runs" / runs["scan"]
    keep = (
        "train",
        "scenes:count=200",
        "--keep",
        f"@/{scanned.name}",
        "--objective",
        "clip:epochs=1,batch=64",
    )
    show = ("show", f"@/{scanned.name}", "--page", "@/page.html")
    texts = {
        "escapes": ESCAPES * 50,
        "one endless line": "a" * (64 << 20),
        "a line a million times": "scene-0\n" * 1_000_000,
        "nulls": "\0\n" * 1000,
        "markup": "<script>alert(1)</script>\n" * 50,
        "formulas": "=cmd|' /C calc'!A0,1,2\n" * 50,
        "no newline": "\r".join(map(str, range(1000))),
    }
    for file, words in (("keep.txt", keep), ("removed.csv", show), ("scores.csv", show)):
        for name, text in texts.items():

            def make(folder: Path, file: str = file, text: str = text) -> None:
                shutil.copytree(scanned, folder / scanned.name)
                (folder / scanned.name / file).write_text(text)

            yield Mutant(f"{file}: {name}", words, make)


def banks_of_strangers(train: str) -> Iterator[Mutant]:
    """Bank files with every field spoilt."""
    from bezoar.auditing import banks

    shipped = sorted(Path(banks.__path__[0]).glob("*.json"))[0]
    raw = json.loads(shipped.read_text())
    small = raw | {
        "audits": [
            a | {"clean": a["clean"][:3], "attacked": a["attacked"][:2]} for a in raw["audits"][:1]
        ]
    }
    words = ("audit", train, "--audit", "whitening", "--images", "64", "--bank", "@/b.json")
    for name, text in spoilt_json(json.dumps(small), 7, 24):
        yield Mutant(f"bank: {name}", words, write_text("b.json", text))
    for name, value in (("1e308", 1e308), ("many digits", HUGE), ("text", "1"), ("true", True)):
        entries = [e | {"value": value} for e in small["audits"][0]["clean"]]
        text = json.dumps(small | {"audits": [small["audits"][0] | {"clean": entries}]})
        yield Mutant(f"bank: value of {name}", words, write_text("b.json", text))


def shared_vectors(base: Path, runs: dict[str, str]) -> Iterator[Mutant]:
    """Shared vectors in a received folder of runs: they must not be read, whatever they are."""
    words = ("scan", f"@/r/{runs['train']}", "--detector", "lid:k=2", "--runs", "@/r")

    def copy_runs(folder: Path) -> None:
        for verb in ("poison", "train"):
            shutil.copytree(base / "runs" / runs[verb], folder / "r" / runs[verb])

    def change_files(change: Callable[[Path], None], name: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            copy_runs(folder)
            shutil.copytree(base / "runs" / ".embeddings", folder / "r" / ".embeddings")
            for path in (folder / "r" / ".embeddings").rglob(name):
                if path.is_file():
                    change(path)

        return make

    def replace(content: bytes) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            path.unlink()
            path.write_bytes(content)

        return change

    for name in ("done.json", "images.npy", "*.utf8", "place.npy", ".lock"):
        for what, change in {
            "empty": replace(b""),
            "random": replace(bytes(range(256)) * 40),
            "blocks": as_fifo,
            "never ends": as_endless_device,
        }.items():
            yield Mutant(f".embeddings {name}: {what}", words, change_files(change, name))

    def linked(folder: Path) -> None:
        copy_runs(folder)
        (folder / "elsewhere").mkdir()
        (folder / "elsewhere" / "mine").write_text("mine")
        (folder / "r" / ".embeddings").symlink_to(folder / "elsewhere")

    def untouched(folder: Path) -> str:
        left = sorted(os.listdir(folder / "elsewhere"))
        return "" if left == ["mine"] else f"written through a link: {left}"

    yield Mutant(".embeddings that lead elsewhere", words, linked, check=untouched)


# What names do in logs for machines


def names_in_logs(scan: tuple[str, ...]) -> Iterator[Mutant]:
    """Files whose names hold control characters, in scan.sarif, removed.csv and the lists of
    exports.
    """
    names = (
        "a\x1b[31m",
        "b\nc",
        "d\r",
        "e\u202e",
        "f\x00g".replace("\x00", "\x7f"),
        "h\u2028i",
        "%2e%2e",
        "j k#?&",
    )

    def make(folder: Path) -> None:
        (folder / "f").mkdir()
        for i, name in enumerate(names):
            for copy in range(4):
                (folder / "f" / f"{name}{copy}.png").write_bytes(picture(i))
                (folder / "f" / f"{name}{copy}.txt").write_text(f"a {COLOURS[copy]} thing {copy}")

    def check(folder: Path) -> str:
        for path in folder.rglob("scan.sarif"):
            json.loads(path.read_text())
            if any(ord(c) < 32 and c not in "\n\t " for c in path.read_text()):
                return "control characters in scan.sarif"
        for path in folder.rglob("removed.csv"):
            with path.open(newline="") as file:
                rows = list(csv.reader(file))
            if any(len(row) != len(rows[0]) for row in rows):
                return "removed.csv has rows of several lengths"
        return ""

    for export in ("none", "label-studio", "fiftyone"):
        words = ("scan", "folder:path=@/f,size=16", *scan, "--export", export)
        yield Mutant(f"names in logs, exported: {export}", words, make, check=check)
