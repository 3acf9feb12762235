"""Files are opened by one guard: regular ones only, at once, and within bounds."""

import os
import socket
from pathlib import Path

import pytest

from bezoar.data.files.paths import (
    check_regular,
    expand_home,
    open_regular,
    read_file,
    read_regular,
    read_regular_text,
)
from bezoar.data.files.skipped import Unreadable
from bezoar.errors import UserError
from bezoar.runs.verb import fingerprint


def make_unusual(folder):
    """What is no regular file, by name."""
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    return ("pipe", "device", "folder", "loop", "socket", "missing", "nul\0")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    for name in make_unusual(tmp_path):
        with pytest.raises(UserError, match="cannot be read: "):
            open_regular(tmp_path / name)
        with pytest.raises(UserError, match="cannot be read: "):
            check_regular(tmp_path / name)
        with pytest.raises(Unreadable):
            read_file(tmp_path / name)


def test_what_a_method_names_is_hashed_only_if_it_is_a_regular_file(tmp_path):
    for name in make_unusual(tmp_path):
        with pytest.raises(UserError, match="cannot be read: "):
            fingerprint([tmp_path / name])


def test_a_regular_file_is_read_within_its_bound(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_regular(link, 5) == read_file(path, 5) == b"12345"
    assert read_regular_text(path, 5) == "12345"
    with pytest.raises(UserError, match="holds 5 bytes; expected at most 4"):
        read_regular(path, 4)
    with pytest.raises(Unreadable, match="too large: 5 bytes"):
        read_file(path, 4)
    path.write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="not text in UTF-8, at byte 2"):
        read_regular_text(path, 5)


def test_no_descriptor_is_left_open(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        with pytest.raises(UserError):
            open_regular(tmp_path / "pipe")
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_home_of_nobody_is_the_users_mistake():
    assert expand_home("~/x") == Path.home() / "x"
    with pytest.raises(UserError, match="no such home directory"):
        expand_home("~nosuchuserhere/x")
