"""What README, docs and `--help` show is run: the Python of a page, and its commands, on small data
under the names that they type.

Every command is parsed in `test_docs.py`. Here each one that can be run on small data is run;
NOT_RUN says why the others are not.
"""

import re
import shlex
from pathlib import Path

import matplotlib
import pytest
from hostile.artefacts import write_weights
from PIL import Image
from test_docs import PAGES, blocks, commands, read_document

from bezoar import registry
from bezoar.cli import forms, main

pytestmark = pytest.mark.slow
PYTHON = ("README.md", "docs/start.md", "docs/python.md")
SMALLER = (
    ("count=20000", "count=640"),
    ("count=3000", "count=160"),
    ("count=2000", "count=160"),
    ("count=5000", "count=96"),
    ("count=512", "count=64"),
    ("count=500", "count=40"),
    ('"scenes"', '"scenes:count=160"'),
    ("backdoor:count=200", "backdoor:count=8"),
    ("canary:count=100", "canary:count=8"),
    ("captions=16,victims=8", "captions=2,victims=2"),
    ("scenes:split=test", "scenes:count=60,split=test"),
    ("epochs=8", "epochs=1"),
    ("my-clean-pairs.csv --audit", "scenes:count=320,seed=9 --audit"),  # of the triggers' size
    ("epochs=6", "epochs=1"),
)
TINY = "--network clip_small:width=4,dim=8 --objective clip:epochs=1,batch=64"
SCALED = {  # what makes a verb's own defaults small; a field that the command names stays as it is
    "train": TINY,
    "dose": f"{TINY} --doses 4 8 --trainings 2 --test scenes:count=60,split=test",
    "audit": "--audit whitening --images 24",
    "calibrate": "--audit whitening --images 24 --rate .4",
    "inject": "--attack badencoder:epochs=1,batch=32,views=1",
    "repair": "--test scenes:count=60,split=test",
    "scan": "--detector transplant",
}
NOT_RUN = {
    "make ": "an installation",
    "pip install": "an installation",
    "torchrun": "tests/training/test_torchrun.py runs two processes",
    "bezoar demo": "tests/verbs/test_demo.py runs both stories",
    "bezoar reproduce": "minutes to hours a table; tests/papers runs tables of every paper",
    "bezoar shadows": "ten encoders; tests/verbs/test_shadows.py",
    "open_clip:": "weights of the Hugging Face hub",
    "hf-hub:": "weights of the Hugging Face hub",
    "sentence:path": "weights that are fetched; tests/attacks/test_badcse.py writes some",
    "texts:path": "made from the former",
    "wordnet:path": "data that are fetched",
    "flickr8k": "data that are fetched",
    "cifar10:": "data that are fetched",
    "--encoder my-encoder": "what another pipeline trained; tests/verbs/test_survive.py",
    "--after": "what another pipeline made; tests/verbs/test_survive.py",
    "--open": "a browser",
    "efficientnet": "weights that are fetched",
    "siglip-folder": "weights of transformers; tests/encoders/test_transformers_weights.py writes some",  # noqa: E501
    "mean_std=half,classes": "classes of ImageNet",
}
CAPITALS = re.compile(r"\b(RUN|DATA|ENCODER|SCAN|CLEAN|SHADOW|DIR|KIND)\b")  # a line of synopsis


def make_smaller(text: str) -> str:
    for word, smaller in SMALLER:
        text = text.replace(word, smaller)
    return text


@pytest.mark.parametrize("name", PYTHON)
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    for language, code in blocks(read_document(name)):
        if language == "python":
            exec(compile(make_smaller(code), name, "exec"), {})


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the files and runs that the pages speak of, small; and the names of those
    runs.
    """
    folder = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pairs = registry.make("data", "scenes:count=320")()
        for name in ("my-images", "my-clean-images", "new-images", "photos"):
            Path(name).mkdir()
        rows = ["filepath,title"]
        for i, (image, caption) in enumerate(zip(pairs.images, pairs.captions, strict=True)):
            place = "my-images" if i < 100 else "new-images" if i < 140 else "my-clean-images"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{place}/{i}.png")
            Path(f"{place}/{i}.txt").write_text(caption)
            rows.append(f"{place}/{i}.png,{caption}")
        Path("my-clean-pairs.csv").write_text("\n".join(rows))
        Image.fromarray(pairs.images[0].permute(1, 2, 0).numpy()).save("truck.png")
        own = [code for language, code in blocks(read_document("docs/reproduce.md")) if language]
        for name, code in zip(("mine.py", "stripe.py", "shake.py"), own, strict=True):
            Path(name).write_text(code)
        names = {
            "poison-": run(
                'poison scenes:count=160 --poison backdoor:count=8 --trigger patch:size=6 --target "striped star"'  # noqa: E501
            )
        }
        names["poison-0b3d"] = names["poison-"]
        names["train-660f"] = run(f"train {names['poison-']} {TINY}")
        for seed, name in enumerate(("train-8bba", "train-9edc")):
            names[name] = run(f"train scenes:count=160 {TINY} --seed {seed}")
        names["scan-5656"] = run(f"scan {names['train-660f']} --detector clip_score")
        names["audit-19c2"] = run(
            f"audit {names['train-660f']} --data scenes:count=64,split=test --audit "
            "cleanse:steps=8 --images 24"
        )
        write_weights(Path("weights"))
        Path("weights/net.pth").rename("model.pth")
        yield names


def run(command: str) -> str:
    """Run a command without `bezoar`. Returns the name of the run that it made, the newest one."""
    before = set(Path("runs").glob("*-*")) if Path("runs").exists() else set()
    assert main(shlex.split(command)) in (0, 4), command
    made = [
        p for p in set(Path("runs").glob("*-*")) - before if p.name.startswith(command.split()[0])
    ]
    return made[0].name if made else ""


def examples() -> dict[str, str]:
    """Every command of README, docs and help, and where it stands."""
    lines = {
        shlex.join(["bezoar", *words]): name
        for name in ("README.md", *PAGES)
        for words in commands(name)
    }
    return lines | {shlex.join(shlex.split(line)): "--help" for line in forms.EXAMPLES.splitlines()}


def reason_not_to_run(command: str) -> str:
    """Why a command is not run; "" for one that is."""
    if CAPITALS.search(command):
        return "a synopsis"
    return next((why for part, why in NOT_RUN.items() if part in command), "")


@pytest.mark.parametrize("command", [line for line in examples() if not reason_not_to_run(line)])
def test_a_command_runs_as_it_is_typed(command, desk, monkeypatch):
    small = make_smaller(command)
    for name, run_name in sorted(desk.items(), key=lambda item: -len(item[0])):
        small = re.sub(rf"\b{name}(?=[ ]|$)", run_name, small)
    words = shlex.split(small)[1:]
    parts = re.split(r"(?=--)", SCALED.get(words[0], ""))
    for part in parts:
        if part.split() and part.split()[0] not in words and "--dry" not in words:
            words += part.split()
    assert main(words) in (0, 3, 4, 5), small


def test_the_list_of_what_is_not_run_names_nothing_else():
    lines = " ".join(
        [*examples(), *Path(__file__).parents[1].joinpath("README.md").read_text().splitlines()]
    )
    docs = lines + " ".join(read_document(name) for name in PAGES)
    assert not [part for part in NOT_RUN if part not in docs]
