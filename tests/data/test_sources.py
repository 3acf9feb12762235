"""Data methods: tables, folders, archives and the published label sets, hostile input among
them.
"""

import csv
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bezoar.data.pairs import Pairs, distinct_image_rows, load_pairs
from bezoar.errors import UserError
from bezoar.registry import make, spec

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
RANDOM = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, side: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(side, side, 3)).save(path)
    return path


def read(text: str) -> Pairs:
    method = make("data", text)
    assert make("data", spec(method)) == method
    pairs: Pairs = load_pairs(method())
    assert pairs.report is not None and pairs.report.read == len(pairs) == len(set(pairs.ids))
    return pairs


def skipped(pairs: Pairs) -> list[tuple[str, str]]:
    assert pairs.report is not None
    return [(s.member, s.reason.partition(":")[0]) for s in pairs.report.skipped]


def refused(text: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_pairs(make("data", text)())
    assert "\n" not in str(error.value)


# npz


@needs_data
def test_cifar10_npz_against_the_recipe_of_its_readme() -> None:
    pairs = read(f"npz:path={DATA}/cifar10.npz,split=test,limit=50")
    z = np.load(DATA / "cifar10.npz", allow_pickle=False)
    jpeg, offsets = z["test_jpeg"], z["test_offsets"]
    for i in (0, 7, 49):
        plain = Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")
        assert np.array_equal(pairs.images[i].permute(1, 2, 0).numpy(), np.asarray(plain))
    assert pairs.labels is not None and pairs.labels.tolist() == z["test_labels"][:50].tolist()
    assert pairs.ids == tuple(z["test_ids"][:50]) and pairs.classes[0] == "airplane"
    assert pairs.captions[0] == f"a photo of a {pairs.classes[int(pairs.labels[0])]}"


@needs_data
def test_gtsrb_npz_whole_test_split_and_class_names() -> None:
    from bezoar.data.sources.gtsrb import CLASSES

    pairs = read(f"npz:path={DATA}/gtsrb.npz,split=test")
    assert (
        len(pairs) == 12_630
        and pairs.size == 32
        and pairs.classes == CLASSES
        and CLASSES[14] == "stop"
    )
    assert not skipped(pairs)


@needs_data
def test_mnist_and_badencoder_arrays() -> None:
    pairs = read(f"npz:path={DATA}/mnist_t10k.npz,split=test,size=32")
    assert pairs.images.shape == (3000, 3, 32, 32) and pairs.ids[1] == "mnist_t10k/test/000001"
    assert torch.equal(pairs.images[:, 0], pairs.images[:, 2])
    truck = read(f"npz:path={DATA}/triggers/BadEncoder/reference/cifar10/truck.npz")
    assert (
        truck.images.shape == (1, 3, 32, 32)
        and truck.labels is not None
        and truck.labels.tolist() == [9]
    )
    assert truck.captions == () and truck.ids == ("truck/000000",)


def jpegs(count: int, side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """(bytes end to end, offsets) of random JPEG files."""
    files = []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(pixels(side, side, 3)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"train_offsets": np.array([0, 5, 3, 9])}, "train_offsets must rise"),
        ({"train_offsets": np.array([-1, 5, 9, 10])}, "train_offsets must rise"),
        ({"train_offsets": np.array([0, 5, 9, 1 << 60])}, "train_offsets must rise"),
        ({"train_offsets": np.array([], dtype=int)}, "train_offsets must rise"),
        ({"train_offsets": np.zeros(4)}, "train_offsets must be integers"),
        ({"train_labels": np.array([0, 1, 2])}, r"train_labels must lie in 0\.\.1"),
        ({"train_labels": np.array([0, 1])}, "3 images but 2 train_labels"),
        ({"train_ids": np.array(["a", "b"])}, "3 images but 2 train_ids"),
        ({"train_ids": np.array(["a", "b\n", "c"])}, "cannot be printed"),
        ({"classes": np.array(["a", None], dtype=object)}, "pickle"),
        (
            {"train_jpeg": np.zeros(9, np.uint8), "train_offsets": np.array([0, 3, 6, 9])},
            "no image-caption record",
        ),
    ],
)
def test_hostile_packed_npz(tmp_path: Path, change: dict[str, np.ndarray], match: str) -> None:
    blob, offsets = jpegs(3)
    held: dict[str, Any] = {
        "train_jpeg": blob,
        "train_offsets": offsets,
        "train_labels": np.array([0, 1, 1]),
    }
    held |= {"classes": np.array(["cat", "big_dog"]), "train_ids": np.array(["a", "b", "c"])}
    np.savez(tmp_path / "good.npz", **held)
    assert read(f"npz:path={tmp_path}/good.npz").captions[1] == "a photo of a big dog"
    np.savez(tmp_path / "bad.npz", **held | change)
    refused(f"npz:path={tmp_path}/bad.npz", match)


def test_broken_jpeg_and_repeated_id_in_npz_are_named(tmp_path: Path) -> None:
    blob, offsets = jpegs(4)
    blob = blob.copy()
    blob[offsets[1] : offsets[1] + 4] = 0
    held: dict[str, Any] = {
        "train_jpeg": blob,
        "train_offsets": offsets,
        "train_labels": np.zeros(4, int),
    }
    np.savez(tmp_path / "a.npz", **held, train_ids=np.array(["a", "b", "c", "a"]))
    pairs = read(f"npz:path={tmp_path}/a.npz")
    assert pairs.ids == ("a", "c", "a~2") and skipped(pairs) == [("b", "not decodable")]
    assert pairs.report is not None and pairs.report.renamed[0].member == "a"


def member(
    path: Path, name: str, header: bytes, content: bytes, method: int = zipfile.ZIP_DEFLATED
) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, header + content)


def npy_header(shape: str, descr: str = "'|u1'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("header", "content", "match"),
    [
        (
            npy_header("(100000, 1000, 1000, 3)"),
            b"",
            "asks for 300000000000 bytes, but 0 are stored",
        ),
        (npy_header("(-1, 2, 2, 3)"), bytes(12), "negative side"),
        (npy_header("(2, 2, 2, 3)"), bytes(23), "asks for 24 bytes, but 23"),
        # pytest would spell the bytes out as the name of the test.
        pytest.param(
            npy_header("(7, 4096, 4096, 3)"), bytes(7 * 3 << 24), "zip bomb", id="zip bomb"
        ),
        (npy_header("(1, 8, 8, 3)", "'|O'"), pickle.dumps([1]), "pickle"),
        (npy_header("(1, 8, 8, 3)", "'<f4'"), bytes(768), "must be uint8"),
        (npy_header("(8,)"), bytes(8), r"must be \(N, H, W\)"),
        (npy_header("__import__('os')"), b"", "no NumPy header"),
        (b"\x93NUMPY\x09\x00", b"", "no NumPy header"),
        (b"nonsense", b"", "no NumPy header"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: bytes, content: bytes, match: str) -> None:
    member(tmp_path / "a.npz", "x.npy", header, content)
    refused(f"npz:path={tmp_path}/a.npz", match)


def test_npz_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(pickle.dumps({"x": 1}))
    refused(f"npz:path={tmp_path}/a.npz", "cannot be read as .npz")
    refused(f"npz:path={tmp_path}/b.npz", "no .npz file")
    np.savez(tmp_path / "c.npz", z=np.zeros(1))
    refused(
        f"npz:path={tmp_path}/c.npz,split=val",
        "holds no array val_jpeg, val_images or x; it holds: z",
    )
    np.savez(tmp_path / "v.npz", x=pixels(4, 8, 8, 3))
    good = (tmp_path / "v.npz").read_bytes()
    directory = good.rindex(b"PK\x01\x02")
    for at, value in (
        (6, 99),
        (9, 8),
        (42, 255),
    ):  # version needed, Unicode names, where the member lies
        broken = bytearray(good)
        broken[directory + at] = value
        if at == 9:
            broken[directory + 46] = 255
        (tmp_path / "v.npz").write_bytes(broken)
        refused(f"npz:path={tmp_path}/v.npz", "v.npz")
    np.savez_compressed(tmp_path / "d.npz", x=pixels(4, 8, 8, 3))
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[300:320] = bytes(20)
    (tmp_path / "d.npz").write_bytes(content)
    refused(f"npz:path={tmp_path}/d.npz", "cannot be unpacked")


# table


@needs_data
def test_the_two_csv_layouts_and_json_lines_and_parquet_agree(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    shards = read(f"shards:path={DATA}/flickr8k/val-00000.tar,size=32,limit=6")
    for i, image in enumerate(
        load_pairs(
            make("data", f"shards:path={DATA}/flickr8k/val-00000.tar,size=128,limit=6")()
        ).images
    ):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{i}.png")
    rows = [(f"images/{i}.png", caption) for i, caption in enumerate(shards.captions)]
    with (tmp_path / "open_clip.csv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("filepath", "title"), *rows])
    with (tmp_path / "cleanclip.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    lines = [json.dumps({"path": p, "text": c}) for p, c in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    table = pa.table(
        {"image": [p for p, _ in rows], "n": list(range(6)), "caption": [c for _, c in rows]}
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("open_clip.csv", "cleanclip.csv", "a.jsonl", "a.parquet"):
        pairs = read(f"table:path={tmp_path}/{name},size=32")
        assert (
            pairs.captions == shards.captions
            and pairs.ids == tuple(f"{p}#{i}" for i, (p, _) in enumerate(rows, 1))
            and pairs.labels is None
        )
        # the shard's JPEG is halved while it is decoded, the PNG by bicubic resizing: nearly the
        # same
        assert (pairs.images.float() - shards.images.float()).abs().mean() < 4


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    save(folder / "a.png")
    save(folder / "dot.png", 1)
    save(tmp_path / "outside.png")
    (folder / "text.png").write_text("text")
    os.mkfifo(folder / "pipe.png")
    rows: list[tuple[str, bytes]] = [
        ("a.png", b"good"),
        ("a.png", b"good again"),
        ("sub/../a.png", b"inside"),
        (str(tmp_path / "outside.png"), b"x"),
        ("../outside.png", b"x"),
        ("sub/../../outside.png", b"x"),
        ("gone.png", b"x"),
        ("dot.png", b"x"),
        ("text.png", b"x"),
        ("pipe.png", b"x"),
        ("a.png", b"caf\xe9"),
        ("a.png", b" "),
        ("", b"x"),
        ("/dev/zero", b"x"),
        ("https://example.org/a.png", b"x"),
    ]
    (folder / "t.csv").write_bytes(
        b"image,caption\n" + b"\n".join(p.encode() + b"," + c for p, c in rows) + b"\nshort"
    )
    (folder / "sub").mkdir()
    pairs = read(f"table:path={folder}/t.csv,size=16")
    assert pairs.ids == ("a.png#1", "a.png#2", "sub/../a.png#3")
    why = dict(skipped(pairs))
    assert why == {
        "row 4": "path leaves the root",
        "row 5": "path leaves the root",
        "row 6": "path leaves the root",
        "gone.png": "no such file",
        "dot.png": "smaller than 8 pixels a side",
        "text.png": "not decodable",
        "pipe.png": "not a regular file",
        "row 11": "caption is not UTF-8",
        "row 12": "no caption",
        "row 13": "no image",
        "row 14": "path leaves the root",
        "row 15": "not a local path",
        "row 16": "no caption",
    }


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("picture,words\na.png,hello\n")
    refused(f"table:{tmp_path}/a.csv", "no column filepath or image.*it has: picture, words")
    assert read(f"table:{tmp_path}/a.csv,image=picture,caption=words,size=16").captions == (
        "hello",
    )
    refused(f"table:{tmp_path}/a.csv,image=x,caption=words", "no column x")
    refused(f"table:{tmp_path}/b.csv", "1 of 1 are missing")
    refused(f"table:{tmp_path}/a.png", "must be .csv")
    (tmp_path / "q.csv").write_text('image,caption\na.png,"never closed\na.png,swallowed\n')
    assert read(f"table:{tmp_path}/q.csv,size=16").captions == ('"never closed', "swallowed")
    (tmp_path / "e.csv").write_text("")
    refused(f"table:{tmp_path}/e.csv", "no column filepath")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really PAR1")
    refused(f"table:{tmp_path}/p.parquet", "cannot be read as parquet")
    (tmp_path / "j.jsonl").write_bytes(
        b'{"image": "a.png", "caption": "ok"}\n{"image": "\xff"}\n[1]\n'
        + b"[" * 99999
        + b'\n{"image": 3, "caption": []}\n'
        b'{"image": "a.png", "caption": "\\ud800"}\n'
    )
    pairs = read(f"table:{tmp_path}/j.jsonl,size=16")
    assert [reason for _, reason in skipped(pairs)] == [
        "not JSON in UTF-8",
        "not a JSON object",
        "not JSON in UTF-8",
        "no image",
        "caption is not UTF-8",
    ]


# folder


def test_folder(tmp_path: Path) -> None:
    for name in ("dog/1.png", "dog/deeper/2.jpg", "cat_fish/3.ppm"):
        save(tmp_path / "train" / name)
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "dog" / "notes.txt").write_text("notes")
    (tmp_path / "train" / "stray.png").write_text("stray")
    (tmp_path / "train" / "dog" / "broken.png").write_text("broken")
    pairs = read(f"folder:path={tmp_path},split=train,size=16,template=one {{c}}")
    assert pairs.ids == ("cat_fish/3.ppm", "dog/1.png", "dog/deeper/2.jpg")
    assert pairs.classes == ("cat_fish", "dog", "empty") and pairs.captions[0] == "one cat fish"
    assert pairs.labels is not None and pairs.labels.tolist() == [0, 1, 1]
    assert sorted(skipped(pairs)) == [
        ("dog/broken.png", "not decodable"),
        ("dog/notes.txt", "not an image by its name"),
        ("empty", "no file in the class folder"),
        ("stray.png", "not in a class folder"),
    ]
    held = dict(make("data", f"folder:path={tmp_path},split=train").files())
    assert list(held) == ["cat_fish/3.ppm", "dog/1.png", "dog/broken.png", "dog/deeper/2.jpg"]
    refused(f"folder:{tmp_path}/none", "no folder of images")
    refused(f"folder:{tmp_path}/train/empty", "no image-caption record could be read")
    refused(f"folder:{tmp_path}/train/empty,layout=classes", "no class folders")
    with pytest.raises(UserError, match="split"):
        make("data", f"folder:{tmp_path}/train,split=../..")
    with pytest.raises(UserError, match="template"):
        make("data", f"folder:{tmp_path}/train,template=a photo")


# published label sets, in the layouts they are given out in


def test_cifar10_binary_version(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    images, labels = pixels(6, 3, 32, 32), np.array([3, 0, 9, 1, 2, 5], np.uint8)
    for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        (folder / name).write_bytes(labels[i : i + 1].tobytes() + images[i].tobytes())
    train, test = (
        read(f"cifar10:root={tmp_path}"),
        read(f"cifar10:root={tmp_path},split=test,size=16"),
    )
    assert torch.equal(train.images, torch.from_numpy(images[:5])) and train.labels is not None
    assert train.labels.tolist() == [3, 0, 9, 1, 2] and train.captions[0] == "a photo of a cat"
    assert test.ids == ("cifar10/test/00000",) and test.size == 16
    (folder / "test_batch.bin").write_bytes(bytes([10]) + bytes(3072))
    refused(f"cifar10:root={tmp_path},split=test", "a label is 10")
    (folder / "test_batch.bin").write_bytes(bytes(3000))
    refused(f"cifar10:root={tmp_path},split=test", "records of 3073 bytes")
    refused(f"cifar10:root={tmp_path}/none", "download=true")


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scipy.io
    import torchvision

    images = pixels(32, 32, 3, 4)
    scipy.io.savemat(
        tmp_path / "test_32x32.mat", {"X": images, "y": np.array([[10], [1], [9], [3]], np.uint8)}
    )
    refused(f"svhn:root={tmp_path},split=test", "download=true")  # the md5 is not the published one
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    pairs = read(f"svhn:root={tmp_path},split=test")
    assert torch.equal(pairs.images, torch.from_numpy(images.transpose(3, 2, 0, 1).copy()))
    assert pairs.labels is not None and pairs.labels.tolist() == [0, 1, 9, 3]
    assert (
        pairs.captions[2] == "a photo of a nine"
        and len(make("data", f"svhn:root={tmp_path},split=test").files()) == 1
    )


def test_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = pixels(3, 3, 96, 96)
    images.transpose(0, 1, 3, 2).tofile(
        folder / "train_X.bin"
    )  # planes are stored column by column
    images.transpose(0, 1, 3, 2).tofile(folder / "unlabeled_X.bin")
    np.array([1, 10, 0], np.uint8).tofile(folder / "train_y.bin")
    refused(f"stl10:root={tmp_path}", "download=true")
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    pairs = read(f"stl10:root={tmp_path},limit=2")
    assert (
        torch.equal(pairs.images, torch.from_numpy(images[:2]))
        and pairs.captions[1] == "a photo of a truck"
    )
    assert pairs.labels is not None and pairs.labels.tolist() == [0, 9]
    everything = read(f"stl10:root={tmp_path},size=32")
    assert (
        everything.labels is not None
        and everything.labels.tolist() == [0, 9, -1]
        and everything.captions == ()
    )
    unlabelled = read(f"stl10:root={tmp_path},split=unlabeled")
    assert (
        unlabelled.labels is not None
        and unlabelled.labels.tolist() == [-1, -1, -1]
        and unlabelled.captions == ()
    )


def test_gtsrb(tmp_path: Path) -> None:
    base = tmp_path / "gtsrb" / "GTSRB"
    for label in (0, 14):
        save(base / "Training" / f"{label:05d}" / "00000_00001.ppm", 20 + label)
    for label in set(range(43)) - {
        0,
        14,
    }:  # torchvision numbers the class folders, so all of them must be there
        save(base / "Training" / f"{label:05d}" / "00000_00000.ppm")
    train = read(f"gtsrb:root={tmp_path}")
    row = train.ids.index("GTSRB/Training/00014/00000_00001.ppm")
    assert len(train) == 43 and train.captions[row] == "a photo of a stop" and train.size == 32
    save(base / "Final_Test" / "Images" / "00000.ppm")
    save(tmp_path / "outside.ppm")
    table = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    rows = ["00000.ppm", "gone.ppm", "../../../../outside.ppm"]
    table += "".join(f"{name};16;16;0;0;0;0;12\n" for name in rows) + "00000.ppm;16;16;0;0;0;0;77\n"
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text(table)
    test = read(f"gtsrb:root={tmp_path},split=test")
    assert test.captions == ("a photo of a priority road",) and test.ids == (
        "GTSRB/Final_Test/Images/00000.ppm",
    )
    assert [reason for _, reason in skipped(test)] == [
        "no such file",
        "path leaves the data set's folder",
        "label is not a number from 0 to 42",
    ]
    refused(f"gtsrb:root={tmp_path}/none", "download=true")


@pytest.mark.parametrize(
    "text", ["shards:path=a", "table:path=a", "folder:path=a", "npz:path=a", "cifar10", "svhn"]
)
def test_fields_are_checked(text: str) -> None:
    comma = "," if ":" in text else ":"
    for bad, match in (
        ("size=4", "size must lie"),
        ("size=100000", "size must lie"),
        ("limit=0", "limit must be"),
    ):
        with pytest.raises(UserError, match=match):
            make("data", text + comma + bad)


def test_a_flat_folder_of_images_is_read_without_classes_and_captions(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("notes")
    pairs = read(f"folder:path={tmp_path},size=16")
    assert (
        pairs.ids == ("a.jpg", "b.png")
        and pairs.classes == ()
        and pairs.captions == ()
        and pairs.labels is None
    )
    assert list(dict(make("data", f"folder:path={tmp_path}").files())) == ["a.jpg", "b.png"]


def test_each_image_once_however_many_captions() -> None:
    assert distinct_image_rows(["a#0", "a#1", "b", "c#0", "b#1"]) == [0, 2, 3]
