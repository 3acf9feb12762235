"""Folders that Hugging Face's `datasets` saves, and folders of Parquet files; hostile streams are
refused in a line.
"""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_files import random_picture
from PIL import Image

from bezoar import registry
from bezoar.data.pairs import load_pairs
from bezoar.errors import UserError
from bezoar.runs.verb import join_inputs, spec_of_path


def rows(start, stop, captions=None):
    images = [{"bytes": random_picture(i), "path": f"{i}.png"} for i in range(start, stop)]
    texts = captions or [f"a red star {i}" for i in range(start, stop)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(images, kind), "caption": pa.array(texts)}
    return pa.table(columns)


def write_stream(path, table, rows_a_batch=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows_a_batch)


@pytest.fixture
def saved(tmp_path):
    """A folder as `Dataset.save_to_disk` leaves it."""
    folder = tmp_path / "saved"
    write_stream(folder / "data-00000-of-00002.arrow", rows(0, 20))
    write_stream(folder / "data-00001-of-00002.arrow", rows(20, 30))
    (folder / "state.json").write_text(json.dumps({"_fingerprint": "0"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def load(path):
    return load_pairs(registry.make("data", spec_of_path("data", f"{path}") + ",size=16")())


def test_a_saved_data_set_is_read_in_order_pixel_for_pixel(saved):
    pairs = load(saved)
    assert pairs.captions == tuple(f"a red star {i}" for i in range(30))
    first = np.asarray(Image.open(io.BytesIO(random_picture(0))))
    assert (pairs.images[0].permute(1, 2, 0).numpy() == first).all()


@pytest.mark.parametrize("key", ["_indices_files", "_indices_data_files"])
def test_a_selection_that_was_saved_beside_its_rows_is_refused(saved, key):
    state = {"_data_files": [{"filename": "data-00000-of-00002.arrow"}]}
    (saved / "state.json").write_text(json.dumps(state | {key: []}))
    assert len(load(saved)) == 30
    (saved / "state.json").write_text(json.dumps(state | {key: [{"filename": "indices.arrow"}]}))
    with pytest.raises(UserError, match="a selection of its rows"):
        load(saved)
    with pytest.raises(UserError, match="a selection of its rows"):
        load(saved / "data-00000-of-00002.arrow")


def test_splits_that_were_saved_together_are_one_set(tmp_path):
    write_stream(tmp_path / "d" / "train" / "data-00000-of-00001.arrow", rows(0, 12))
    write_stream(tmp_path / "d" / "test" / "data-00000-of-00001.arrow", rows(12, 20))
    (tmp_path / "d" / "dataset_dict.json").write_text("{}")
    assert len(load(tmp_path / "d")) == 20


@pytest.mark.parametrize("below", ["", "data"])
def test_a_folder_of_parquet_files_is_a_table(tmp_path, below):
    folder = tmp_path / "hub" / below
    folder.mkdir(parents=True)
    for i in range(2):
        pq.write_table(rows(10 * i, 10 * i + 10), folder / f"train-{i:05d}-of-00002.parquet")
    (tmp_path / "hub" / "README.md").write_text("a card")
    assert len(load(tmp_path / "hub")) == 20


def test_parquet_files_beside_images_are_not_what_is_meant(tmp_path):
    pq.write_table(rows(0, 2), tmp_path / "00000.parquet")
    (tmp_path / "00000").mkdir()
    assert spec_of_path("data", str(tmp_path)) == f"folder:path={tmp_path}"


def test_several_files_of_one_kind_are_one_input(saved, tmp_path):
    files = sorted(str(path) for path in saved.glob("*.arrow"))
    joined = registry.make("data", join_inputs(files, "data") + ",size=16")
    assert load_pairs(joined()).captions == load(saved).captions
    write_stream(tmp_path / "else" / "more.arrow", rows(30, 33))
    joined = join_inputs([*files, str(tmp_path / "else" / "more.arrow")], "data")
    assert len(load_pairs(registry.make("data", joined + ",size=16")())) == 33
    assert join_inputs(["scenes:count=5"], "data") == "scenes:count=5"
    for wrong, says in (
        ([], "name a data set"),
        (["a.tar", "b.csv"], "give one"),
        (["scenes", "scenes"], "give one"),
        (["a,b.tar", "c.tar"], "signs in its name"),
    ):
        with pytest.raises(UserError, match=says):
            join_inputs(wrong, "data")


def test_hostile_streams_are_refused_in_a_line(tmp_path):
    good = tmp_path / "data-0.arrow"
    write_stream(good, rows(0, 20))
    content = good.read_bytes()
    (tmp_path / "cut" / "x").parent.mkdir()
    cases = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "zeros": bytes(500),
        "text": b"hello",
    }
    for name, spoilt in cases.items():
        path = tmp_path / f"{name}.arrow"
        path.write_bytes(spoilt)
        try:
            assert len(load(path)) < 20
        except UserError as error:
            assert "\n" not in str(error) and name in str(error)
    rng = np.random.default_rng(0)
    for i in range(30):
        spoilt = bytearray(content)
        for place in rng.integers(0, len(spoilt), 12):
            spoilt[place] = rng.integers(256)
        path = tmp_path / f"spoilt{i}.arrow"
        path.write_bytes(bytes(spoilt))
        try:
            load(path)
        except UserError as error:
            assert "\n" not in str(error)


def test_columns_whose_values_may_overlap_are_refused(tmp_path):
    table = rows(0, 5)
    shared = table.set_column(1, "caption", table.column("caption").dictionary_encode())
    write_stream(tmp_path / "shared.arrow", shared)
    with pytest.raises(UserError, match="of type dictionary"):
        load(tmp_path / "shared.arrow")
