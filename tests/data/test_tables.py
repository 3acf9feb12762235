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
    before = time.monotonic()
    with pytest.raises(UserError, match="cannot be read as"):
        read(path)
    assert time.monotonic() - before < 2


def test_a_line_of_the_largest_size_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("bezoar.data.files.tables.TEXT_BYTES", 12)
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"a":"12"} \n{"a":"3456"}')
    assert [row for _, row in read_rows(path)] == [{"a": "12"}, {"a": "3456"}]
    path.write_bytes(b'{"a":"12"} \n{"a":"34567"}')
    with pytest.raises(UserError, match="line at byte 12 is longer"):
        list(read_rows(path))
