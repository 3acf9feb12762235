"""What the documents say is there, is there, and the other way round."""

import re
from pathlib import Path

import pytest
from test_architecture import LEVEL

import bezoar
from bezoar import registry
from bezoar.runs.verb import verb_names

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"^\| (\w+) \|", re.MULTILINE)


def document(name: str) -> str:
    path = ROOT / name
    return path.read_text() if path.exists() else pytest.skip(f"{name} is not beside the tests")


def test_the_architecture_names_every_module_at_its_level():
    said, level = {}, 0
    for line in document("ARCHITECTURE.md").split("```")[1].splitlines():
        if found := re.match(r"(?:level (\d)| {7}) {3}((?:[\w/]+ )*[\w/]+)(?: {2,}|$)", line):
            level = int(found[1] or level)
            said |= dict.fromkeys(found[2].replace("/", "").split(), level)
    assert said == {name: at for name, at in LEVEL.items() if not name.startswith("__")}


def test_the_documents_name_every_kind_and_every_verb():
    for name in ("ARCHITECTURE.md", "CONTRIBUTING.md"):
        assert set(TABLE.findall(document(name))) - {"kind"} == set(registry.KINDS), name
    for verb in verb_names():
        assert f"bezoar {verb}" in document("README.md") and verb in document("ARCHITECTURE.md"), (
            verb
        )
        assert getattr(bezoar, verb.title()).work


@pytest.mark.parametrize("kind", [k for k in registry.KINDS if k not in ("paper", "bank")])
def test_the_readme_names_every_method(kind):
    text = document("README.md").partition("## What there is")[2]
    assert not [n for n in registry.method_names(kind) if not re.search(rf"\b{n}\b", text)]
