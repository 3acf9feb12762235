"""Equal questions leave equal files: every verb is asked twice, and what it wrote is compared byte
for byte.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile import kills

from bezoar.cli import main

# What says when a run was, how long it took and on which machine: the manifest, and the page that
# shows it.
TIMED = ("manifest.json", "report.html")
QUICK = tuple(
    case for case in kills.CASES if case.name not in ("show", "demo", "reproduce", "scan.workers")
)


def write_everything(world: kills.World) -> dict[str, bytes]:
    """Run every verb over the same data, with no run there yet -> the bytes of every file."""
    shutil.rmtree(world.base / "runs", ignore_errors=True)
    runs, names = world.base / "runs", dict[str, str]()
    for case in QUICK:
        if case.name == "shadows":
            for i in range(5):
                names[f"clean{i}"] = kills.copy_encoder(world, names["tower"], i)
                names[f"attacked{i}"] = kills.copy_encoder(world, names["inject"], 10 + i)
        before = set(runs.glob("*-*"))
        assert main([word.format(**names) for word in case.words]) in (0, 4), case.name
        new = [p.name for p in set(runs.glob("*-*")) - before if p.name.startswith(case.words[0])]
        names[case.name] = new[0] if new else ""
    return {
        str(path.relative_to(world.base)): path.read_bytes()
        for path in world.base.rglob("*")
        if path.is_file() and path.name not in TIMED
    }


@pytest.mark.long
def test_every_verb_that_is_asked_twice_writes_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    world = kills.make_base(tmp_path)
    monkeypatch.chdir(world.base)
    first, second = write_everything(world), write_everything(world)
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []
    verbs = {name.split("/")[1].split("-")[0] for name in first if name.startswith("runs/")}
    assert {case.words[0] for case in QUICK} - verbs == {"verify"}
    verdicts: list[Any] = [json.loads(v) for n, v in first.items() if n.endswith("verdict.json")]
    assert verdicts and all("seconds" not in audit for v in verdicts for audit in v["audits"])
