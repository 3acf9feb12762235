"""Specs: one spelling of a configured method, read, written and refused."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bezoar import method_source, registry
from bezoar.errors import UserError

ALL = [(kind, name) for kind in registry.KINDS for name in registry.method_names(kind)]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_method_loads_describes_itself_and_cites(kind, name):
    cls = registry.find_method(kind, name)
    described = method_source.describe(registry.PACKAGE / registry.KINDS[kind] / f"{name}.py")
    assert described.summary.endswith((".", ").")) or ":" in described.summary
    assert all(text for _, _, _, text in described.fields), "every field says what it is"
    assert cls.__call__.__doc__ or kind == "paper", "of tables, `PaperTable` says what all do"


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_default_specs_make_the_same_method_again(kind, name):
    required = {
        "shards": "path=x.tar",
        "captions": "path=x.csv",
        "folder": "path=x",
        "npz": "path=x.npz",
    }
    required |= {
        "image": "path=x.png",
        "file": "path=x.npz",
        "imported": "path=x.pth",
        "embeddings": "path=x",
        "lit": "image=(weights:path=x.pth),text=(sentence:path=x)",
    }
    required |= {"table": "path=x.csv", "weights": "path=x", "hugging_face": "path=x"}
    required |= {"hub": "org/name", "several": "triggers=patch+blur"}
    required |= {"texts": "path=x.csv", "texts_of": "data=scenes", "wordnet": "path=x"}
    required |= {"sentence": "path=x", "mismatch": "query=dog"}
    if kind == "trigger":  # a poison has the name too, and needs nothing
        required["composite"] = "reference=x.png"
    method = registry.make(kind, f"{name}:{required.get(name, '')}")
    assert registry.make(kind, registry.spec(method)) == method


@given(size=st.integers(1, 64), text=st.sampled_from(["corner", "random", "3/4"]))
def test_spec_round_trip(size, text):
    trigger = registry.make("trigger", f"patch:size={size},place={text}")
    assert registry.make("trigger", registry.spec(trigger)) == trigger


def test_braces_and_quotes_do_not_split():
    assert registry.split_outside_brackets('path=cc/{00000,00331}.tar,size=64,x="a,b"', ",") == [
        "path=cc/{00000,00331}.tar",
        "size=64",
        'x="a,b"',
    ]


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("trigger", "pach:size=3", "there are: augment"),
        ("trigger", "patch:sise=3", "it has: size"),
        ("trigger", "patch:size=three", "size must be int"),
        ("trigger", "patch:seed=9223372036854775808", "seed must be int"),
        ("poison", "backdoor:captions=all", "one of training, templates, repeated"),
        ("objective", "clip:epochs=0", "epochs >= 1"),
        ("data", "shards", "needs path"),
        ("detector", "./nowhere.py", "no file"),
        ("trigger", "patch:size=(3", "unbalanced"),
    ],
)
def test_bad_specs_are_refused_in_one_line(kind, text, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")) as caught:
        registry.make(kind, text)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_users_own_is_a_method(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        '"""Mine."""\nfrom bezoar.registry import method\n@method\nclass Mine:\n    k: int = 3\n'
        "    def __call__(self, encoder, source):\n        return self.k\n"
    )
    registry.allow(f"{mine}")
    method = registry.make("detector", f"{mine}:k=8")
    assert method.k == 8 and method(None, None) == 8
    assert registry.make("detector", registry.spec(method)) == method


def test_a_method_is_called_with_what_it_needs_and_is_offered():
    class Needy:
        needs = ("report", "parent")

        def __call__(self, encoder, report):
            return encoder, report

    assert registry.call(Needy(), "encoder", report="report", clean="clean") == (
        "encoder",
        "report",
    )


def test_list_json_names_every_method():
    out = subprocess.run(
        [sys.executable, "-m", "bezoar", "list", "--json"], capture_output=True, check=True
    ).stdout
    listed = json.loads(out)
    assert {k: [d["name"] for d in v] for k, v in listed.items()} == {
        k: registry.method_names(k) for k in registry.KINDS
    }


def write_method(file, log) -> None:
    """A detector that notes in `log` that its file has been run."""
    body = (
        f"class {file.stem.title()}:\n    k: int = 1\n\n    def __call__(self):\n        return 1\n"
    )
    file.write_text(
        f"from bezoar.registry import method\nopen({str(log)!r}, "
        f"'a').write('ran')\n\n\n@method\n{body}"
    )


def test_a_file_of_code_is_loaded_only_where_the_user_has_named_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(registry, "_named", set())
    mine, evil, log = tmp_path / "mine.py", tmp_path / "evil.py", tmp_path / "log"
    for file in (mine, evil):
        write_method(file, log)
    monkeypatch.chdir(tmp_path)
    for text in (f"{mine}", f"{evil}:k=2", "./evil.py", "evil.py:k=1"):
        with pytest.raises(UserError, match="would run the code of"):
            registry.make("detector", text)
    assert not log.exists() and not (tmp_path / "state").exists(), (
        "reading a spec neither runs code nor widens what may run"
    )
    registry.allow(f"{mine}:k=3")
    assert registry.make("detector", f"{mine}:k=3").k == 3
    monkeypatch.setattr(registry, "_named", set())  # another process
    assert registry.make("detector", f"{mine}:k=4").k == 4 and registry.allowed_files() == {
        str(mine)
    }
    with pytest.raises(UserError, match="would run the code of"):
        registry.make("detector", f"{evil}")
    monkeypatch.setenv("BEZOAR_METHODS", f"{evil}")
    assert registry.make("detector", f"{evil}").k == 1


def test_a_spec_within_a_spec_names_files_too(tmp_path):
    for text, files in (
        ("patch:size=6", []),
        ("finetune:objective=(evil.py:epochs=1)", ["evil.py"]),
        ('x:y="evil.py"', ["evil.py"]),
        ("x mine.py", ["x mine.py"]),
        (f"{tmp_path}/a b.py:k=(1,2)", [f"{tmp_path}/a b.py"]),
        ("a.py:objective=(b.py:network=c.py)", ["a.py", "b.py", "c.py"]),
    ):
        assert sorted(registry.method_files(text)) == files


def test_a_default_named_elsewhere_is_told_as_it_is():
    fields = {
        f[0]: f
        for f in method_source.describe(
            registry.PACKAGE / registry.KINDS["detector"] / "loss_trace.py"
        ).fields
    }
    assert fields["network"][2] == "'clip_small'" and fields["side"][2] == "64"
    fields = {
        f[0]: f
        for f in method_source.describe(
            registry.PACKAGE / registry.KINDS["data"] / "shards.py"
        ).fields
    }
    assert fields["load"][1] == "Literal['auto', 'memory', 'stream']"
