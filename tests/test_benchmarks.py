"""The benchmarks run: each once, at sizes that measure nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = {
    "augmentation": "--images 8 --sizes 32 --repeats 1",
    "badencoder_step": "--batch 4 --repeats 1",
    "clip_small": "--batch 8 --repeats 1",
    "density": "--n 600 --fewer 200 --pool 800 --d 16 --repeats 1 --at-scale 700",
    "heads": "--records 128 --test 64 --epochs 1 --repeats 1",
    "inversion": "--network clip_small --repeats 1",
    "open_clip_step": "--batch 4 --repeats 1",
    "scan": "--records 2000 --width 16 --pool 500",
    "simclr": "--batch 4 --repeats 1",
    "streaming": "--images 100 --sizes 32 --side 48 --batch 20 --repeats 1",
    "text_head": "--model ViT-B-32 --classes 2 --repeats 1",
    "threads": "--batch 8 --repeats 1 --steps 1 --busy 0 1",
    "triggers": "--images 4 --size 32 --plain 1 --repeats 2",
}


def test_every_benchmark_is_run():
    if FOLDER.is_dir():
        assert {path.stem for path in FOLDER.glob("*.py")} == SMALL.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_benchmark(name):
    command = [sys.executable, str(FOLDER / f"{name}.py"), *SMALL[name].split()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) > 2
