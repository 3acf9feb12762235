"""`bezoar shadows` as its users run it: folds that keep lineages whole, what it refuses, and the
audit that reads its bank.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from bezoar import registry
from bezoar.auditing.audits import mntd
from bezoar.cli import main
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.reports.page import execute
from bezoar.runs import sweep
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings, Trial
from bezoar.verbs.audit import sample_clean_records
from bezoar.verbs.inject import Inject
from bezoar.verbs.shadows import Shadows, check_enough_shadows, deal_folds
from bezoar.verbs.train import Train

DATA = "scenes:count=64"
QUICK = ("--queries", "4", "--steps", "3", "--images", "16")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shadows") / "runs"


def copied(run: Run, name: str, noise: int, **more) -> Run:
    """The same run with weights of its own: an encoder in milliseconds."""
    run = Run(Path(shutil.copytree(run.path, run.path.parent / name)))
    weights = load_file(run.path / "encoder.safetensors")
    g = torch.Generator().manual_seed(noise)
    moved = {
        k: v + 0.3 * torch.randn(v.shape, generator=g) if v.is_floating_point() else v
        for k, v in weights.items()
    }
    save_file(
        {k: v.abs() if "var" in k else v for k, v in moved.items()},
        run.path / "encoder.safetensors",
    )
    (run.path / "manifest.json").write_text(json.dumps(run.manifest | more))
    return run


@pytest.fixture(scope="module")
def clean(runs) -> list[Run]:
    """Six towers; the first was trained."""
    verb = Train(DATA, "tower:width=4,dim=8", "simclr:epochs=1,batch=32,hidden=8,dim=4")
    first = execute(verb, Settings(runs, 0, "cpu", quiet=True))
    return [first, *(copied(first, f"train-{i}", i) for i in range(1, 6))]


@pytest.fixture(scope="module")
def attacked(runs, clean) -> list[Run]:
    """Six attacked ones, the first three from clean ones that are shadows too, two of them from
    one.
    """
    verb = Inject(
        clean[0],
        DATA,
        ("striped star",),
        ("scenes:count=300",),
        "badencoder:epochs=1,batch=32,lr=0.01",
        ("patch:size=4",),
    )
    first = execute(verb, Settings(runs, 0, "cpu", quiet=True))
    injected = [first]
    for i, parent in enumerate(
        (clean[1].name, clean[1].name, "train-gone", "train-away", "train-far"), 1
    ):
        injected.append(
            copied(
                first,
                f"inject-{i}",
                10 + i,
                ask=first.manifest["ask"] | {"encoder": {"run": parent}},
            )
        )
    return injected


def words(clean, attacked, runs, *more) -> list[str]:
    first = ["shadows", *(r.path for r in clean), "--attacked", *(r.path for r in attacked), *QUICK]
    return [*map(str, first), "--runs", str(runs), "--device", "cpu", *more]


def refused(capsys, words) -> str:
    """What a command that ends with 2 says, in one line."""
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bezoar:")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def fitted(runs, clean, attacked) -> Run:
    assert main(words(clean, attacked, runs)) == 0
    return Run(next(runs.glob("shadows-*")))


def test_folds_keep_lineages_whole_and_kinds_even():
    lineages = [f"p{i}" for i in range(10)] * 2 + [
        f"s{i}" for i in range(10)
    ]  # pairs, then clean ones without a child
    labels = [False] * 10 + [True] * 10 + [False] * 10
    for seed in range(5):
        folds = deal_folds(lineages, labels, 5, seed)
        assert all(
            len({f for f, lineage in zip(folds, lineages, strict=True) if lineage == u}) == 1
            for u in set(lineages)
        )
        for fold in range(5):
            kinds = [bad for bad, f in zip(labels, folds, strict=True) if f == fold]
            assert (kinds.count(True), kinds.count(False)) == (2, 4)
        assert folds == deal_folds(lineages, labels, 5, seed)
    assert len({tuple(deal_folds(lineages, labels, 5, seed)) for seed in range(5)}) > 1
    uneven = deal_folds(["a"] * 7 + list("bcdefg"), [True] * 7 + [False] * 6, 3, 0)
    assert len(set(uneven[:7])) == 1 and set(uneven) == {0, 1, 2}


def test_every_fold_leaves_enough_to_fit_on():
    five = [False] * 5 + [True] * 5
    check_enough_shadows(five, [0, 1, 2, 3, 4] * 2, 5)
    with pytest.raises(UserError, match=r"4 of each .* 5 lineages there are 3 and 4"):
        check_enough_shadows(five, [0, 0, 2, 3, 4, 0, 1, 2, 3, 4], 5)
    with pytest.raises(UserError, match="there are 3 and 4"):
        check_enough_shadows([False] * 3 + [True] * 4, list(range(7)), 7)


def test_each_encoder_is_judged_by_a_bank_that_was_fitted_without_its_lineage(
    fitted, clean, attacked
):
    shadows = json.loads(fitted.file("shadows.json").read_text())["shadows"]
    by = {s["name"]: s for s in shadows}
    assert [s["name"] for s in shadows] == [r.name for r in (*clean, *attacked)]
    assert [s["attacked"] for s in shadows] == [False] * 6 + [True] * 6 and by["inject-1"][
        "attack"
    ] == "badencoder patch"
    lineages = [by[r.name]["lineage"] for r in attacked]
    assert lineages == [
        clean[0].name,
        "train-1",
        "train-1",
        "train-gone",
        "train-away",
        "train-far",
    ]
    fold = by["train-1"]["fold"]
    others = [s for s in shadows if s["fold"] != fold]
    assert not {"train-1", "inject-1", "inject-2"} & {s["name"] for s in others}
    sample = sample_clean_records(registry.make("data", "scenes:count=64,split=test"), 16)[0]
    encoders = [Encoder.load(fitted.path.parent / s["name"]) for s in others]
    bank = mntd.fit(encoders, [s["attacked"] for s in others], sample, 0, 4, 3)
    for name in ("train-1", "inject-1", "inject-2"):
        z = mntd.measure_logit(bank, Encoder.load(fitted.path.parent / name))
        assert z == pytest.approx(by[name]["logit"], abs=1e-6)


def test_its_figures_are_those_of_the_held_out_logits(fitted):
    shadows = json.loads(fitted.file("shadows.json").read_text())["shadows"]
    truth, logits = [s["attacked"] for s in shadows], [s["logit"] for s in shadows]
    assert (
        fitted.metric("auroc").value == pytest.approx(roc_auc_score(truth, logits))
        and fitted.metric("auroc").n == 12
    )
    right = [(z > 0) == bad for z, bad in zip(logits, truth, strict=True)]
    assert fitted.metric("accuracy").value == pytest.approx(sum(right) / 12)
    area = fitted.metric("auroc")
    assert area.low < area.value < area.high and "fitted without its lineage" in area.how
    bank = mntd.load(str(fitted.file("mntd.safetensors")))
    assert bank["held_out"].tolist() == pytest.approx(logits) and bank["labels"].tolist() == truth
    notes = fitted.manifest["notes"]
    assert (notes["clean"], notes["attacked"], notes["lineages"]) == (6, 6, 9) and fitted.manifest[
        "goal"
    ] == []
    assert notes["shadows"] == {s["name"]: s["weights"] for s in shadows}


def test_what_clean_images_were_left_out_is_told(clean, attacked, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"broken")
    more = ("--data", f"folder:path={folder},size=32")
    assert main(words(clean, attacked, tmp_path / "runs", *more)) == 4
    shown = capsys.readouterr()
    assert "1 records or files were left out, beside 20 that were read" in shown.err
    run = Run(next((tmp_path / "runs").glob("shadows-*")))
    (line,) = run.manifest["notes"]["incomplete"]
    assert "broken.png" in line


def test_the_same_question_has_the_same_bits(fitted, clean, attacked, tmp_path):
    again = execute(
        Shadows(tuple(clean), tuple(attacked), images=16, queries=4, steps=3),
        Settings(tmp_path, 0, "cpu", quiet=True),
    )
    assert again.name == fitted.name
    assert (
        again.file("mntd.safetensors").read_bytes() == fitted.file("mntd.safetensors").read_bytes()
    )


def test_the_page_shows_logits_and_queries(fitted):
    text = (fitted.path / "report.html").read_text()
    assert "could not be made" not in text
    for phrase in (
        "encoders it has not seen",
        "Queries",
        "from noise",
        "MNTD over 6 attacked encoders and 6 clean ones",
        "badencoder patch",
    ):
        assert phrase in text


def test_the_audit_reads_the_run_and_judges_no_shadow(fitted, clean, attacked, runs, capsys):
    other = copied(clean[0], "train-other", 99)
    common = ["--images", "16", "--bank", "shipped", "--runs", runs, "--device", "cpu"]
    for place in (fitted.path, fitted.path / "mntd.safetensors"):
        capsys.readouterr()
        assert (
            main(
                [
                    *map(
                        str,
                        [
                            "audit",
                            other.path,
                            "--audit",
                            f"mntd:bank={place}",
                            *common,
                            "--json",
                            "full",
                        ],
                    )
                ]
            )
            == 0
        )
        manifest = json.loads(capsys.readouterr().out)
    bank = mntd.load(str(fitted.file("mntd.safetensors")))
    assert manifest["metrics"]["mntd.value"]["value"] == pytest.approx(
        mntd.measure_logit(bank, Encoder.load(other.path)), abs=1e-6
    )
    assert manifest["metrics"]["mntd.shadows_auroc"]["value"] == fitted.metric("auroc").value
    renamed = Path(shutil.copytree(attacked[1].path, runs / "inject-renamed"))
    for shadow in (clean[2].path, renamed):
        message = refused(capsys, ["audit", shadow, "--audit", f"mntd:bank={fitted.path}", *common])
        assert "one of the 12 shadow encoders" in message
    message = refused(
        capsys, ["audit", other.path, "--audit", f"mntd:bank={clean[0].path}", *common]
    )
    assert "no MNTD bank" in message


def test_what_is_no_shadow_is_one_line(runs, clean, attacked, capsys):
    assert "given as clean and as attacked" in refused(
        capsys, words(clean, [*attacked, clean[0]], runs)
    )
    assert "was not attacked" in refused(capsys, words(clean[1:], [*attacked, clean[0]], runs))
    assert "is poisoned" in refused(capsys, words([*clean, attacked[0]], attacked[1:], runs))
    assert "2 clean and 6 attacked" in refused(capsys, words(clean[:2], attacked, runs))
    message = refused(capsys, words(clean, attacked[:4], runs))
    assert "too few" in message and "4 attacked encoders" in message
    assert "too few" in refused(capsys, words([], [], runs))
    twin = copied(clean[2], "train-twin", 0)
    shutil.copy(clean[2].path / "encoder.safetensors", twin.path)
    message = refused(capsys, words([*clean, twin], attacked, runs))
    assert "train-2 and train-twin have the same weights" in message
    verb = Train(DATA, "tower:width=5,dim=8", "simclr:epochs=1,batch=32,hidden=8,dim=4")
    odd = execute(verb, Settings(runs, 0, "cpu", quiet=True))
    message = refused(capsys, words([*clean, odd], attacked, runs))
    assert (
        odd.name in message
        and "its network is tower:width=5,dim=8, not tower:width=4,dim=8" in message
    )
    assert "2 folds" in refused(capsys, words(clean, attacked, runs, "--folds", "1"))


def test_a_shadow_may_bring_a_seed_of_its_own(tmp_path):
    """A verb inside a verb is run with the outer seed, unless it stands as a trial."""
    train = Train(
        "scenes:count=32", "tower:width=4,dim=8", "simclr:epochs=1,batch=32,hidden=8,dim=4"
    )
    verb = Shadows(tuple(Trial(train, k) for k in (3, 4)), (Trial(train, 5), train))
    graph = sweep.dependency_graph([Trial(verb, 7)])
    assert [t.seed for t in graph] == [3, 4, 5, 7, 7]
    request = json.loads(json.dumps(sweep.trial_to_json(Trial(verb, 7), Settings(tmp_path), False)))
    assert sweep.verb_from_json(request["verb"]) == verb
    with pytest.raises(UserError, match="was not attacked"):
        execute(verb, Settings(tmp_path, 7, "cpu", quiet=True))
    assert sorted(
        Run(p.parent).manifest["ask"]["seed"] for p in tmp_path.glob("train-*/manifest.json")
    ) == [3, 4, 5, 7]
