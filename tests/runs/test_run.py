"""Runs are found by their directories and by the start of their names."""

import pytest

from bezoar.errors import UserError
from bezoar.runs.run import MANIFEST, find_run


def test_the_start_of_a_name_is_no_run_where_a_folder_has_that_name(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    for name in ("train-0a", "train-0a1b", "poison-77"):
        (runs / name).mkdir(parents=True)
        (runs / name / MANIFEST).write_text("{}")
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_run(runs, "train") is None  # the user's folder, whatever runs begin so
    assert find_run(runs, "poison").name == "poison-77"
    assert find_run(runs, "train-0a").name == "train-0a"  # a whole name
    with pytest.raises(UserError, match="'train-' begins the names of 2 runs"):
        find_run(runs, "train-")
