"""Verbs that are killed, or find the disk full, and are asked again; `make hostile` runs a sample
of `kills.py`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).with_name("kills.py")
PARTS = 2  # processes, one a core
# Operations of each verb; `python tests/hostile/kills.py FOLDER` tries them all.
SAMPLE = ("--sample", "4")
CHAINS = ("--mode", "", "--chains", "2")
STORIES = "demo,reproduce"  # verbs that run others, for ten seconds and more
QUICK = (
    "poison,poison.shards,train,tower,inject,evaluate,scan,scan.shards,scan.workers,scan.table,"
    "scan.export,scan.fresh,survive,audit,calibrate,shadows,repair,check,dose,show"
)


@pytest.mark.parametrize(
    ("cases", "how", "cuts"),
    [
        pytest.param(QUICK, SAMPLE, 130, marks=pytest.mark.hostile),
        pytest.param(STORIES, CHAINS, 20, marks=pytest.mark.hostile),
        pytest.param(STORIES, SAMPLE, 14, marks=pytest.mark.long),
    ],
    ids=["verbs", "stories, chained", "stories"],
)
def test_a_verb_that_was_cut_off_ends_as_if_it_had_not_been(tmp_path, cases, how, cuts):
    words = ["--only", cases, *how, "--parts", str(PARTS)]
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
    assert sum(int(output.splitlines()[-1].split()[0]) for output in outputs) >= cuts
