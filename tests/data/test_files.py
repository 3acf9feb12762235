"""Bounds on what foreign files can ask for, apart from the sources that read them."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from bezoar.data.files import checkpoints, npy, tables, tensors, zips
from bezoar.data.sources.embeddings import numbered_files
from bezoar.errors import UserError


def npy_stream(header: dict) -> io.BytesIO:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    stream.seek(0)
    return stream


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"descr": "<U0", "shape": (1 << 40,)}, "no size"),
        ({"descr": "|O"}, "pickle"),
        ({"shape": (-1, 2)}, "negative side"),
    ],
)
def test_headers_that_are_refused_before_anything_is_read(change, match):
    header = {"descr": "<f4", "fortran_order": False, "shape": (2, 2)}
    with pytest.raises(UserError, match=match):
        npy.read_header(npy_stream(header | change))


@pytest.mark.parametrize("fortran_order", [False, True])
def test_arrays_come_back_in_either_order(fortran_order):
    array = np.arange(6, dtype="<i2").reshape(2, 3)
    stream = io.BytesIO()
    np.save(stream, np.asfortranarray(array) if fortran_order else array)
    stream.seek(0)
    header = npy.read_header(stream)
    assert header.fortran_order == fortran_order and header.nbytes == 12
    assert np.array_equal(npy.read_data(stream, header), array)
    stream.seek(0)
    header = npy.read_header(stream)
    with pytest.raises(UserError, match="ends after 11 of 12 bytes"):
        npy.read_data(io.BytesIO(stream.read()[:-1]), header)


def test_a_zip_is_bounded_by_its_members_and_by_what_they_unpack_to(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", **{str(i): np.zeros(9) for i in range(5)})
    with pytest.raises(UserError, match="5 members are too many"):
        zips.open_zip(tmp_path / "a.npz", max_members=4)
    with zips.open_zip(tmp_path / "a.npz") as archive:
        members = archive.infolist()
        zips.check_unpacked_size(members, 1, 1 << 30)
        with pytest.raises(UserError, match="refused as a zip bomb"):
            zips.check_unpacked_size(members, 1 << 20, 100)


def test_a_line_without_an_end_does_not_take_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TEXT_BYTES", 64)
    row = json.dumps({"image": "a.png"}).encode() + b"\n"
    path = tmp_path / "t.jsonl"
    path.write_bytes(row + b" " * 60 + b"\n" + row)
    assert [r for _, r in tables.read_rows(path) if isinstance(r, dict)] == [{"image": "a.png"}] * 2
    path.write_bytes(row + b" " * 1000 + b"\n" + row)
    with pytest.raises(UserError, match="is longer than 64 bytes"):
        list(tables.read_rows(path))
    with pytest.raises(UserError, match="is longer than 64 bytes"):
        tables.cut_blocks(path)


def test_names_of_columns_are_printed_without_control_characters(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"pic\x1b[2Jture,caption\na.png,x\n")
    with pytest.raises(UserError) as error:
        tables.find_column("t.csv", tables.column_names(tmp_path / "t.csv"), None, ("image",))
    assert str(error.value).isprintable()


def test_a_safetensors_header_of_too_many_tensors_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    for length, reason in ((tensors.MAX_HEADER + 1, "header of"), (tensors.MAX_HEADER, "read")):
        path.write_bytes(length.to_bytes(8, "little") + b"{" * 600)
        for read in (tensors.read_tensors, tensors.read_metadata, checkpoints.load_tensors):
            with pytest.raises(UserError, match=reason):
                read(path if read is not checkpoints.load_tensors else str(path))


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_vectors_are_read_from_regular_files_alone(tmp_path, make):
    make(tmp_path / "img_emb_0.npy")
    with pytest.raises(UserError, match="not a regular file"):
        numbered_files(tmp_path, ".npy")
