"""Every mutant of every kind of file ends in a clear refusal or a right result; `make hostile` runs
this.
"""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")
PARTS = 2  # processes, one a core


@pytest.mark.hostile
def test_no_mutant_breaks_a_promise(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, RUN, tmp_path, "--part", str(part), "--parts", str(PARTS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for part in range(PARTS)
    ]
    outputs = [process.communicate()[0] for process in processes]
    totals = [output.splitlines()[-1] for output in outputs]
    mutants = sum(int(total.split()[0]) for total in totals)
    assert mutants >= 400, totals
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
