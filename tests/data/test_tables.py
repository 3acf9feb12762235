"""Tables of any bytes are read, or refused in a line and within bounds."""

import time

import pytest

from bezoar.data.files.tables import cut_blocks, read_rows
from bezoar.errors import UserError


@pytest.mark.parametrize("read", [cut_blocks, lambda path: list(read_rows(path))])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bare.csv", b"filepath,title\ra.png,b\rc.png,d\r"),
        ("cell.csv", b'filepath,title\n"' + b"a" * (16 << 20)),
        ("line.tsv", b"filepath\ttitle\n" + b"a" * (16 << 20)),
        ("line.jsonl", b'{"a":"' + b"a" * (16 << 20)),
    ],
    ids=["bare", "cell", "line", "object"],  # pytest would spell out the contents
)
def test_a_table_that_cannot_be_cut_into_rows_is_refused_at_once(tmp_path, read, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    before = time.process_time()
    with pytest.raises(UserError, match="cannot be read as"):
        read(path)
    assert time.process_time() - before < 2


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_empty_lines_cost_next_to_nothing(tmp_path, end):
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,b" + end + end * 1_000_000 + b"1,2" + end + end + b"3,4")
    before = time.process_time()
    (block,) = cut_blocks(path)
    assert [row for _, row in read_rows(path, block)] == [
        {"a": "1", "b": "2"},
        {"a": "3", "b": "4"},
    ]
    assert time.process_time() - before < 3


def test_200_000_rows_that_do_not_fit_are_named_in_one_pass(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n" + "1,2,3\n" * 200_000 + '1,"2\n2",3\n1,2,3,4\n')
    before = time.process_time()
    rows = [row for _, row in read_rows(path)]
    assert time.process_time() - before < 5
    lines = [row.rpartition(" ")[2] for row in rows if isinstance(row, str)]
    assert lines == [str(n) for n in (*range(3, 200_004), 200_005)]


def test_a_header_of_many_columns_is_read_in_one_pass(tmp_path):
    path = tmp_path / "t.csv"
    names = [f"c{i}" for i in range(100_000)]
    path.write_text(",".join(names) + "\n")
    before = time.process_time()
    assert cut_blocks(path) == []
    path.write_text(",".join([*names, "c7"]) + "\n")
    with pytest.raises(UserError, match="two columns are called 'c7'"):
        cut_blocks(path)
    assert time.process_time() - before < 3


def test_a_line_of_the_largest_size_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("bezoar.data.files.tables.TEXT_BYTES", 12)
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"a":"12"} \n{"a":"3456"}')
    assert [row for _, row in read_rows(path)] == [{"a": "12"}, {"a": "3456"}]
    path.write_bytes(b'{"a":"12"} \n{"a":"34567"}')
    with pytest.raises(UserError, match="line at byte 12 is longer"):
        list(read_rows(path))
