"""Files are whole or not there, and never written through a link."""

import pytest

from bezoar.data.files.writing import (
    refuse_unwritable,
    remove_debris_of,
    whole_file,
    write_whole,
)
from bezoar.errors import UnwritableError


def test_a_text_and_bytes_are_written_as_they_are(tmp_path):
    write_whole(tmp_path / "a.txt", "é\n")
    write_whole(tmp_path / "a.bin", b"\x00\xff")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.txt"]


def test_a_block_that_fails_leaves_the_older_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "a.txt", "before")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.txt") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_link_is_replaced_and_what_it_points_to_is_left(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "page.html").symlink_to(tmp_path / "mine")
    write_whole(tmp_path / "page.html", "page")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "page.html").is_symlink()


def test_names_that_are_not_utf8_are_spelled_out(tmp_path):
    write_whole(tmp_path / "a.txt", "\udcff")
    assert (tmp_path / "a.txt").read_text() == "\\udcff"


def test_a_file_that_cannot_be_written_is_told_from_other_mistakes(tmp_path):
    with pytest.raises(UnwritableError, match="x: Is a directory"), refuse_unwritable(tmp_path):
        (tmp_path / "x").mkdir()
        (tmp_path / "x").write_text("")


def test_what_a_killed_attempt_left_of_one_file_is_removed_and_nothing_else(tmp_path):
    for name in ("p[1].html.0123456789ab.tmp", "p[1].html.mine.tmp", "p1.html.0123456789ab.tmp"):
        (tmp_path / name).write_text("")
    remove_debris_of(tmp_path / "p[1].html")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["p1.html.0123456789ab.tmp", "p[1].html.mine.tmp"]
