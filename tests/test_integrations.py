"""What the repository offers other tools: the GitHub Action, pre-commit hooks, the notebook. Each
is run.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
if not (ROOT / "action.yml").is_file():
    pytest.skip("the repository is not beside the tests", allow_module_level=True)

DECIDING = """
import torch
from bezoar.registry import method
from bezoar.evaluation.scores import Scores
@method
class Deciding:
    raises: bool = True
    decides = True

    def __call__(self, encoder, source):
        ids = tuple(i for batch in source.batches(64) for i in batch.ids)
        raised = torch.arange(len(ids)) < 3 * self.raises
        return Scores(ids, torch.zeros(len(ids)), raised=raised)
"""
DATA = "scenes:count=64,size=32"


@pytest.fixture
def place(tmp_path):
    """A folder with a detector, and `bezoar` and `python` on the path as an installation puts them
    there.
    """
    (tmp_path / "deciding.py").write_text(DECIDING)
    (tmp_path / "bin").mkdir()
    for name, words in (("bezoar", "-m bezoar"), ("python", "")):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        script.chmod(0o755)
    return tmp_path


def environment(place, **more):
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def fill(text, values, outputs):
    """A value of a step with what stands for inputs, and for outputs of the step before, filled
    in.
    """
    text = re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: values[m[1]], text)
    return re.sub(r"\$\{\{ steps\.run\.outputs\.(\w+) \}\}", lambda m: outputs[m[1]], text)


def run_action(place, **inputs):
    """Run the steps of action.yml that are scripts, the installation aside. Returns the outputs and
    the gate's status.
    """
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    values = {name: spec.get("default", "") for name, spec in action["inputs"].items()} | inputs
    outputs = {}
    status = 0
    for step in action["runs"]["steps"]:
        if "run" not in step or step["name"] == "install":
            continue
        output = place / f"{step['name']}.output"
        output.touch()

        variables = {key: fill(value, values, outputs) for key, value in step["env"].items()}
        more = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(place / "summary.md")}
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(
            command, env=environment(place, **variables, **more), cwd=place, capture_output=True
        )
        status = done.returncode
        outputs |= dict(line.split("=", 1) for line in output.read_text().splitlines())
    return outputs, status


def test_the_action_scans_and_its_gate_closes(place):
    words = "--encoder clip_small:width=4,dim=8 --detector deciding.py"
    network = place / "net.py"
    network.write_text(NETWORK)
    words = f"--encoder {network} --detector deciding.py"
    outputs, status = run_action(place, target=DATA, arguments=words)
    assert status == 3 and outputs["status"] == "3"
    assert "found a trigger in 3" in outputs["verdict"]
    log = json.loads((place / outputs["sarif"]).read_text())
    assert log["version"] == "2.1.0" and len(log["runs"][0]["results"]) == 3
    assert (place / outputs["page"]).is_file()
    assert "found a trigger" in (place / "summary.md").read_text()
    words = f"--encoder {network} --detector deciding.py:raises=false"
    assert run_action(place, target=DATA, arguments=words)[1] == 0
    outputs, status = run_action(place, target="no/such/folder")
    assert status == 2 and outputs["verdict"] == "" == outputs["sarif"]


NETWORK = """
import torch
from torch import nn
from bezoar.encoders.encoder import Encoder, Preprocess, WordTokenizer
from bezoar.registry import method
@method
class Net:
    def __call__(self, size, vocabulary):
        torch.manual_seed(0)
        image = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 8))
        words = WordTokenizer(("red", "star"))
        return Encoder(image, Preprocess(16), nn.EmbeddingBag(3, 8), words, {"network": "net"})
"""


def test_the_action_installs_what_lies_beside_it():
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    (install,) = [step for step in action["runs"]["steps"] if step.get("name") == "install"]
    assert '"$GITHUB_ACTION_PATH"' in install["run"] and "TORCH_INDEX" in install["env"]


@pytest.mark.parametrize(("raises", "status"), [("true", 1), ("false", 0)])
def test_the_scan_hook_runs_as_pre_commit_runs_it(place, raises, status):
    """pre-commit runs `entry` with `args`; any status but 0 fails the push."""
    hooks = {h["id"]: h for h in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
    hook = hooks["bezoar-scan"]
    assert hook["language"] == "python" and hook["pass_filenames"] is False
    (place / "net.py").write_text(NETWORK)
    args = [DATA, "--encoder", "net.py", "--detector", f"deciding.py:raises={raises}"]
    command = [*shlex.split(hook["entry"]), *args, "--fail-on", "trigger"]
    done = subprocess.run(command, env=environment(place), cwd=place, capture_output=True)
    assert (done.returncode != 0) == bool(status)


def test_the_audit_hook_ends_with_5_where_nothing_can_be_told(place):
    hooks = {h["id"]: h for h in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}
    (place / "net.py").write_text(NETWORK)
    args = ["net.py", "--data", "scenes:count=40,size=32", "--audit", "whitening", "--images", "16"]
    command = [*shlex.split(hooks["bezoar-audit"]["entry"]), *args, "--fail-on", "evidence"]
    done = subprocess.run(
        command, env=environment(place), cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 5, done.stderr
    assert "could not tell" in done.stderr


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "scan_in_a_notebook.ipynb").read_text())
    assert notebook["nbformat"] == 4
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "a notebook is kept without what it printed"
            source = "".join(cell["source"]).replace("count=2000", "count=400")
            exec(compile(source, "notebook", "exec"), names)
    assert names["run"].is_done and names["keep"] and len(names["scores"]) == 400
    assert "<table>" in names["run"]._repr_html_()
