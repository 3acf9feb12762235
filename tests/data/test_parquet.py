"""Foreign Parquet files end no process but the one that parses them, and ask for nothing beyond."""

import os
import random
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bezoar.data.files import parquet, parquet_process
from bezoar.data.files.tables import read_rows
from bezoar.errors import UserError


def write(path, count=20, **options):
    pq.write_table(
        pa.table({"image": [bytes([i % 256]) * 9 for i in range(count)], "caption": ["é"] * count}),
        path,
        **options,
    )
    return path


def test_rows_come_as_they_are_stored(tmp_path):
    path = write(tmp_path / "t.parquet", 1000, row_group_size=300)
    header = parquet.read_header(path)
    assert header == (1000, ("image", "caption"), ("caption",))
    for start, stop in ((0, None), (299, 602), (5, 5), (990, 4000), (2000, None)):
        batches = list(parquet.read_batches(path, ["image", "caption"], start, stop))
        rows = [row for batch in batches for row in batch.to_pylist()]
        expected = range(start, min(1000, stop or 1000) if stop != start else start)
        assert [row["image"] for row in rows] == [bytes([i % 256]) * 9 for i in expected]
        assert all(len(batch) <= parquet.BATCH_ROWS for batch in batches)


def test_who_stops_in_the_middle_or_reads_two_at_once_gets_his_own_rows(tmp_path):
    path = write(tmp_path / "t.parquet", 1000)
    first, second = (parquet.read_batches(path, [c]) for c in ("image", "caption"))
    assert next(first).column_names == ["image"] and next(second).column_names == ["caption"]
    first.close()
    assert sum(map(len, second)) == 1000 - 256
    assert sum(map(len, parquet.read_batches(path, ["image"]))) == 1000


def test_a_file_that_ends_its_reader_is_named_and_the_next_one_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "t.parquet")
    list(parquet.read_batches(path, ["image"]))  # so that a reader waits
    os.kill(parquet._idle[-1].process.pid, 9)
    with pytest.raises(UserError, match="cannot be read as parquet: it ends the program"):
        list(parquet.read_batches(path, ["image"]))
    assert sum(map(len, parquet.read_batches(path, ["image"]))) == 20


def test_spoilt_files_raise_nothing_but_a_users_mistake(tmp_path):
    good = write(tmp_path / "t.parquet").read_bytes()
    (length,) = struct.unpack("<I", good[-8:-4])
    draw = random.Random(0)
    for number in range(150):
        spoilt = bytearray(good)
        for _ in range(draw.choice((1, 2, 6))):  # in the footer
            spoilt[-9 - draw.randrange(length)] = draw.randrange(256)
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(spoilt)
        try:
            for _ in read_rows(path):
                pass
        except UserError as error:
            assert "\n" not in str(error)


def test_more_rows_than_a_file_can_hold_are_refused(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"caption": pa.nulls(2_000_000, pa.string())}), path)
    assert path.stat().st_size < 20_000
    with pytest.raises(UserError, match=r"claims 2000000 rows in \d+ bytes"):
        list(read_rows(path))


def test_fewer_rows_than_promised_are_told(tmp_path, monkeypatch):
    path = write(tmp_path / "t.parquet")
    monkeypatch.setattr(
        parquet_process.pq.ParquetFile,
        "iter_batches",
        lambda *_: iter([pa.record_batch({"image": [b"a"] * 3})]),
    )
    with pytest.raises(UserError, match="promises 20 rows and ends after 3"):
        list(parquet_process.read_batches(path, ["image"], 0, None))


def test_a_page_that_ends_its_reader_ends_nobody_else_however_large_the_file_is(tmp_path):
    """Rows of large files are read in the other process too; here it dies over the second batch."""
    path = tmp_path / "t.parquet"
    images = [os.urandom(1 << 20) for _ in range(40)]
    pq.write_table(pa.table({"image": images}), path, row_group_size=4)
    batches = parquet.read_batches(path, ["image"])
    rows = [cell for batch in [next(batches)] for cell in batch.column(0).to_pylist()]
    (reader,) = [
        int(child)
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if "parquet_process" in Path(f"/proc/{child}/cmdline").read_text()
        and int(child) not in [r.process.pid for r in parquet._idle]
    ]
    os.kill(reader, 9)
    with pytest.raises(UserError, match="it ends the program that reads it"):
        for batch in batches:
            rows += batch.column(0).to_pylist()
    assert rows == images[: len(rows)]


def test_lists_of_texts_are_read_within_the_bounds_of_texts(tmp_path):
    path = tmp_path / "t.parquet"
    lists = [["a", "b"], [], None, ["é", None, ""], ["c"] * 3] * 100
    pq.write_table(pa.table({"text": lists, "n": range(500)}), path)
    rows = [row for _, row in read_rows(path, columns=["text", "n"])]
    assert rows == [{"text": cell, "n": i} for i, cell in enumerate(lists)]
    many = [["x" * 100] * 60_000, ["y"], [""] * 300_000]
    pq.write_table(pa.table({"text": many}), path)
    rows = [row for _, row in read_rows(path, columns=["text"])]
    assert [row["text"] if isinstance(row, dict) else row for row in rows] == [
        "text too large: 6960000 bytes",
        ["y"],
        "text too large: 4800000 bytes",
    ]
    pq.write_table(pa.table({"text": [["z" * 4000] * 200_000, ["y"]]}), path)
    with pytest.raises(UserError, match=r"unpack to \d+ bytes|more memory|malloc of size"):
        list(read_rows(path, columns=["text"]))


def test_a_text_is_bounded_as_in_tars_and_so_are_all_texts_of_a_block(tmp_path):
    path = tmp_path / "t.parquet"
    texts = ["a" * (8 << 20), "b"]
    pq.write_table(pa.table({"text": [texts[i % 50 > 0] for i in range(200)]}), path)
    rows = [row for _, row in read_rows(path)]
    assert rows.count({"text": "b"}) == 196
    assert rows.count(f"text too large: {8 << 20} bytes") == 4
    pq.write_table(pa.table({"text": ["a" * (1 << 20)] * 200}), path)
    with pytest.raises(UserError, match="unpacks to more than 67108864 bytes"):
        list(read_rows(path))


@pytest.mark.parametrize("kind", [pa.string(), pa.binary()])
def test_columns_that_name_their_values_by_numbers_are_written_out_within_the_same_bounds(
    tmp_path, kind
):
    path = tmp_path / "t.parquet"
    words = pa.array(["red", "café"], kind)
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 1, 0], pa.int8()), words)
    pq.write_table(pa.table({"text": column, "n": range(5)}), path)
    rows = [row["text"] for _, row in read_rows(path, columns=["text", "n"])]
    assert rows == [words[0].as_py(), words[1].as_py(), None, words[1].as_py(), words[0].as_py()]
    many = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(4000, np.int32)), pa.array(["a" * 300_000], kind)
    )
    pq.write_table(pa.table({"text": many}), path)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="unpacks to more than 67108864 bytes"):
        list(read_rows(path, columns=["text"]))
