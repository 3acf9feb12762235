"""Valid files and runs of every kind that bezoar reads, small and made from nothing: what the
mutants are made of.
"""

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from made_files import add_members
from PIL import Image
from safetensors.torch import save_file

from bezoar.cli import main

MODELS = Path(__file__).parents[1] / "encoders" / "transformers.json"
SMALL_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
COLOURS = ("red", "green", "blue", "white")


def picture(i: int, suffix: str = "png", side: int = 24) -> bytes:
    """An encoded image that differs from number to number."""
    draw = np.random.default_rng(i)
    pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "jpeg"}.get(suffix, suffix))
    return file.getvalue()


def caption(i: int) -> str:
    return f"a {COLOURS[i % 4]} star number {i}"


def write_folder(folder: Path, count: int = 8) -> None:
    """Images with captions in .txt and facts in .json beside them."""
    folder.mkdir(parents=True)
    for i in range(count):
        suffix = ("png", "jpg", "webp", "bmp")[i % 4]
        (folder / f"{i:04d}.{suffix}").write_bytes(picture(i, suffix))
        (folder / f"{i:04d}.txt").write_text(caption(i))
        (folder / f"{i:04d}.json").write_text(
            json.dumps({"key": f"{i:04d}", "url": f"http://a.b/{i}"})
        )


def write_tar(path: Path, count: int = 8, mode: str = "w") -> None:
    """A webdataset shard as img2dataset writes it."""
    with tarfile.open(path, mode) as tar:
        for i in range(count):
            facts = json.dumps({"key": f"{i:04d}", "caption": caption(i), "status": "success"})
            parts = {"png": picture(i), "txt": caption(i).encode(), "json": facts.encode()}
            add_members(tar, {f"{i:04d}.{suffix}": part for suffix, part in parts.items()})


def write_tables(folder: Path, count: int = 8) -> None:
    """The same records as CSV, TSV, JSON Lines and Parquet; images lie beside the tables, in
    Parquet in a column.
    """
    folder.mkdir(parents=True)
    rows = [{"filepath": f"img/{i}.png", "title": caption(i), "id": f"r{i}"} for i in range(count)]
    (folder / "img").mkdir()
    for i in range(count):
        (folder / f"img/{i}.png").write_bytes(picture(i))
    for name, separator in (("t.csv", ","), ("t.tsv", "\t")):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = [picture(i) for i in range(count)]
    pq.write_table(
        pa.table({"image": images, "caption": [r["title"] for r in rows]}), folder / "t.parquet"
    )


def write_arrays(folder: Path, count: int = 16) -> None:
    """An npz data set, npy vectors, ready embeddings with metadata, trigger files, lists of words
    and of ids.
    """
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(count) % 4
    names = np.array(COLOURS)
    np.savez(folder / "data.npz", x=x, y=labels, classes=names)
    vectors = draw.normal(size=(count, 8)).astype(np.float32)
    np.save(folder / "vectors.npy", vectors)
    for part in ("img_emb", "text_emb", "metadata"):
        (folder / "ready" / part).mkdir(parents=True)
    np.save(folder / "ready/img_emb/img_emb_0.npy", vectors)
    np.save(folder / "ready/text_emb/text_emb_0.npy", vectors)
    facts = pa.table(
        {"caption": [caption(i) for i in range(count)], "key": [str(i) for i in range(count)]}
    )
    pq.write_table(facts, folder / "ready/metadata/metadata_0.parquet")
    patch = draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    np.savez(folder / "trigger.npz", t=patch, tm=np.ones((6, 6), np.uint8))
    np.save(folder / "trigger.npy", patch)
    torch.save(torch.from_numpy(patch), folder / "trigger.pt")
    Image.fromarray(patch).save(folder / "trigger.png")
    (folder / "classes.txt").write_text("red\ngreen\nblue\nwhite\n")
    (folder / "trusted.txt").write_text("".join(f"{i}\n" for i in range(4)))


def small_resnet() -> dict[str, torch.Tensor]:
    """A CIFAR ResNet-20's tensors with seeded weights, named as published checkpoints name them."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def conv(name: str, out: int, channels: int, side: int = 3) -> None:
        state[f"{name}.weight"] = torch.randn(out, channels, side, side, generator=generator) / 10

    def norm(name: str, width: int) -> None:
        for part in ("weight", "running_var"):
            state[f"{name}.{part}"] = torch.ones(width)
        for part in ("bias", "running_mean"):
            state[f"{name}.{part}"] = torch.zeros(width)
        state[f"{name}.num_batches_tracked"] = torch.tensor(0)

    conv("conv1", 16, 3)
    norm("bn1", 16)
    channels = 16
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(3):
            name = f"layer{stage}.{block}"
            conv(f"{name}.conv1", width, channels if block == 0 else width)
            norm(f"{name}.bn1", width)
            conv(f"{name}.conv2", width, width)
            norm(f"{name}.bn2", width)
            channels = width
    state["linear.weight"] = torch.randn(4, 64, generator=generator)
    state["linear.bias"] = torch.zeros(4)
    return state


def write_weights(folder: Path) -> None:
    """A classifier as a state dict that weights_only loads, wrapped as trainers wrap it, and as
    safetensors.
    """
    folder.mkdir(parents=True)
    state = small_resnet()
    torch.save(state, folder / "net.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "ddp.pth")
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "net.safetensors")


def write_transformers(folder: Path, name: str = "vit") -> None:
    """A small model as transformers' save_pretrained writes it, its weights drawn."""
    model = json.loads(MODELS.read_text())[name]
    chance = torch.Generator().manual_seed(0)
    weights = {k: torch.randn(s, generator=chance) / 4 for k, s in model["shapes"].items()}
    side = {"height": model["side"], "width": model["side"]}
    facts = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": side}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model["config"]))
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"vocab": {}}}))


def write_open_clip(folder: Path) -> None:
    """A small model as open_clip pushes it to the hub."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [0.4] * 3, "std": [0.3] * 3, "interpolation": "bicubic"}
    facts = {"model_cfg": SMALL_CLIP, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(facts))
    save_file(open_clip.CLIP(**SMALL_CLIP).state_dict(), folder / "open_clip_model.safetensors")


def arrow_stream(count: int = 8) -> bytes:
    """A data set as `datasets` saves it: an image, a caption and a source a row."""
    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(count)]
    captions, origins = (
        [caption(i) for i in range(count)],
        ["a.example", "b.example"] * (count // 2),
    )
    table = pa.table({"image": images, "caption": captions, "source": origins})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def write_saved_dataset(folder: Path) -> None:
    """What `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data-00000-of-00001.arrow").write_bytes(arrow_stream())
    files = [{"filename": "data-00000-of-00001.arrow"}]
    state = {"_data_files": files, "_fingerprint": "0", "_format_type": None, "_split": "train"}
    info = {"features": {"image": {"_type": "Image"}, "caption": {"dtype": "string"}}}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps(info))


def write_runs(runs: Path) -> dict[str, str]:
    """One run of every verb that others are made from; verb -> its name."""
    common = ["--runs", str(runs)]

    def run(*words: str) -> str:
        before = set(os.listdir(runs)) if runs.is_dir() else set()
        status = main([*words, *common])
        assert status in (0, 4), words
        new = [n for n in set(os.listdir(runs)) - before if n.startswith(words[0])]
        return new[0]

    backdoor = ["--poison", "backdoor:count=20", "--trigger", "patch:size=6"]
    names = {"poison": run("poison", "scenes:count=200", *backdoor, "--target", "striped star")}
    names["train"] = run("train", names["poison"], "--objective", "clip:epochs=1,batch=64")
    names["evaluate"] = run("evaluate", names["train"], "scenes:count=80,split=test")
    names["scan"] = run("scan", names["train"], "--detector", "duplicates", "clip_score")
    names["audit"] = run("audit", names["train"], "--audit", "whitening")
    names["repair"] = run(
        "repair", names["train"], "--data", "scenes:count=400,seed=3", "--repair", "prune"
    )
    clean = ["--check", "strip", "--clean", "scenes:count=300,seed=4"]
    names["check"] = run("check", names["train"], "scenes:count=60,split=test", *clean)
    names["survive"] = run("survive", "scenes:count=40", "--trigger", "patch:size=6")
    return names


def write_all(folder: Path) -> dict[str, str]:
    """Everything; the names of the runs."""
    write_folder(folder / "images")
    write_tar(folder / "shard.tar")
    write_tar(folder / "shard.tar.gz", mode="w:gz")
    write_tables(folder / "tables")
    write_arrays(folder / "arrays")
    write_weights(folder / "weights")
    write_transformers(folder / "vit")
    write_transformers(folder / "clip", "clip")
    write_open_clip(folder / "oc")
    return write_runs(folder / "runs")
