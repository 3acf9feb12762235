"""Verbs that are killed, or find the disk full, and are asked again; `make hostile` runs a sample of `kills.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).with_name("kills.py")
PARTS = 2  # processes, one a core
SAMPLE = 8  # operations of each verb; `python tests/hostile/kills.py FOLDER` tries them all


@pytest.mark.hostile
def test_a_verb_that_was_cut_off_ends_as_if_it_had_not_been(tmp_path):
    words = ["--sample", str(SAMPLE), "--parts", str(PARTS)]
    processes = [
        subprocess.Popen(
            [sys.executable, KILLS, tmp_path, *words, "--part", str(part)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in range(PARTS)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    assert sum(int(output.splitlines()[-1].split()[0]) for output in outputs) >= 200
