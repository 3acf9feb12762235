"""Files that are benign and unusual are read as other readers read them, or refused; none is read
otherwise in silence.
"""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bezoar import registry
from bezoar.data.files.skipped import ReadReport
from bezoar.data.pairs import Pairs, load_pairs
from bezoar.data.source import as_source
from bezoar.errors import UserError


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (shade,) * 3).save(file, "PNG")
    return file.getvalue()


def read(spec: str) -> Pairs:
    return load_pairs(as_source(registry.make("data", spec)()))


def write_images(folder: Path, count: int = 3) -> list[str]:
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png(i))
    return [f"{i}.png" for i in range(count)]


def test_two_columns_of_one_name_are_refused_in_every_table(tmp_path: Path) -> None:
    write_images(tmp_path)
    path = tmp_path / "t.csv"
    path.write_text("filepath,title,title\n0.png,a dog,a cat\n")
    with pytest.raises(UserError, match="two columns are called 'title'"):
        read(f"table:{path},size=16")
    # Columns without a name: of an index, and behind the last one.
    path.write_text(",filepath,title,,\n7,0.png,a dog,,\n")
    pairs = read(f"table:{path},size=16")
    assert pairs.captions == ("a dog",) and pairs.ids == ("0.png#1",)


def test_columns_of_json_lines_are_those_of_all_first_rows(tmp_path: Path) -> None:
    names = write_images(tmp_path)
    rows = [{"image": names[0]}, *({"image": n, "caption": f"a {n}", "id": n} for n in names[1:])]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = read(f"table:{path},size=16")
    assert pairs.captions == ("a 1.png", "a 2.png") and pairs.ids == ("1.png", "2.png")
    assert [s.reason for s in pairs.report.skipped] == ["no caption"]
    path.write_text("".join(json.dumps({"image": name}) + "\n" for name in names))
    assert read(f"table:{path},size=16").ids == ("0.png#1", "1.png#2", "2.png#3")


def test_ids_and_captions_of_bytes_are_text(tmp_path: Path) -> None:
    images = pa.array([png(i) for i in range(3)])
    columns = {"image": images, "caption": pa.array(["a dog", "a cat", "a café"])}
    ids = pa.array([b"k1", b"k2", b"\xff3"])
    pq.write_table(pa.table({**columns, "id": ids}), tmp_path / "t.parquet")
    pairs = read(f"table:{tmp_path}/t.parquet,size=16")
    assert pairs.ids == ("k1", "k2")
    assert [s.reason for s in pairs.report.skipped] == ["caption is not UTF-8"]
    categories = {**columns, "caption": columns["caption"].dictionary_encode()}
    pq.write_table(pa.table(categories), tmp_path / "t.parquet")
    assert read(f"table:{tmp_path}/t.parquet,size=16").captions == ("a dog", "a cat", "a café")


LABELS = (
    pa.array([0, 1, 0, None]),
    pa.array(["0", "1", "0", None]),
    pa.array([False, True, False, None]),
    pa.array(["0", "1", "0", None]).dictionary_encode(),
)


@pytest.mark.parametrize("labels", LABELS, ids=lambda labels: str(labels.type)[:6])
@pytest.mark.parametrize("name", ["label", "y"])
def test_classes_of_texts_are_of_any_type(tmp_path: Path, labels: pa.Array, name: str) -> None:
    texts = pa.array(["a", "b", "c", "d"]).dictionary_encode()
    pq.write_table(pa.table({"text": texts, name: labels}), tmp_path / "t.parquet")
    pairs = read(f"texts:{tmp_path}/t.parquet" + (",label=y" if name == "y" else ""))
    assert pairs.labels is not None and pairs.labels.tolist() == [0, 1, 0, -1]
    assert len(pairs.classes) == 2 and pairs.captions == ("a", "b", "c", "d")


def test_classes_of_texts_may_come_after_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "label": 1}\n{"text": "c", "label": 0}\n')
    pairs = read(f"texts:{path}")
    assert pairs.labels is not None and pairs.labels.tolist() == [-1, 1, 0]


def test_a_mark_before_a_caption_is_none_of_it_and_nuls_are_another_encoding(
    tmp_path: Path,
) -> None:
    write_images(tmp_path)
    (tmp_path / "0.txt").write_bytes(b"\xef\xbb\xbfa dog\r\n")
    (tmp_path / "1.txt").write_bytes("a dog".encode("utf-16-le"))
    (tmp_path / "2.json").write_bytes(b'\xef\xbb\xbf{"caption": "a\\u0000dog"}')
    pairs = read(f"folder:{tmp_path},size=16")
    assert pairs.captions == ("a dog",)
    reasons = [s.reason for s in pairs.report.skipped]
    assert reasons == ["caption is not UTF-8", "metadata is not Unicode"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("x.npy", "x.npy"), ("x", "x.npy")])
def test_an_archive_with_two_members_of_one_name_is_refused(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    """NumPy reads the last of them, others the first: what is scanned must be what is trained
    on.
    """
    path = tmp_path / "d.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for shade, name in enumerate(names):
            file = io.BytesIO()
            np.save(file, np.full((2, 16, 16, 3), shade, np.uint8))
            archive.writestr(name, file.getvalue())
    with pytest.raises(UserError, match="two members of one name"):
        read(f"npz:{path}")
    images = read("scenes:count=2").images
    with pytest.raises(UserError, match="two members of one name"):
        registry.make("trigger", f"file:{path}")(images, ("a", "b"))


def test_metadata_of_embeddings_are_found_in_any_case_of_letters(tmp_path: Path) -> None:
    for part in ("img_emb", "metadata"):
        (tmp_path / part).mkdir()
    np.save(tmp_path / "img_emb/img_emb_0.npy", np.eye(3, 8, dtype=np.float32))
    facts = pa.table({"KEY": ["a", "b", "c"], "Caption": ["x", "y", "z"]})
    pq.write_table(facts, tmp_path / "metadata/metadata_0.parquet")
    source = as_source(registry.make("data", f"embeddings:{tmp_path}")())
    (block,) = source.read(source.units()[0], ReadReport())
    assert block.columns["id"].to_pylist() == ["a", "b", "c"]
    assert block.columns["caption"].to_pylist() == ["x", "y", "z"]
