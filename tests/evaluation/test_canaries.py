"""Canaries: what is put in, what is counted behind a pipeline that loses known ones, and what an
encoder has learnt.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from attacks.test_plan import plan_of, toy

from bezoar import cli, registry
from bezoar.attacks.plan import Goal
from bezoar.attacks.poisons.canary import FORMS
from bezoar.data.pairs import Pairs
from bezoar.data.shards import write_shards
from bezoar.errors import UserError
from bezoar.evaluation import canaries


def test_a_canary_has_a_word_of_its_own_and_leaves_every_record_as_it_is():
    source = toy()
    plan = plan_of("canary:count=30", source, target="")
    put_in = canaries.make_canaries(plan, source)
    own = {i: c for i, c in zip(source.ids, source.captions, strict=True)}
    assert len(set(put_in.words)) == 30 and not set(put_in.words) & set(
        " ".join(own.values()).split()
    )
    whole = plan.apply(source)
    assert whole.ids[:60] == source.ids and torch.equal(whole.images[:60], source.images)
    stamp = registry.make("trigger", "patch:size=4,place=random")
    row_of = {key: row for row, key in enumerate(source.ids)}
    for number, edit in enumerate(put_in.edits):
        form = FORMS[number % 3]
        image = source.images[[row_of[edit.source]]]
        expected = image if form == "copy" else stamp(image, [edit.id])
        assert torch.equal(put_in.images[number], expected[0])
        begins = f"{own[edit.source]} " if form == "fitting" else "a photo of a "
        assert edit.caption == begins + put_in.words[number] and number in put_in.rows(form)


def test_too_many_and_none_are_refused():
    with pytest.raises(UserError, match="61 poisons asked for, but 60 of 60"):
        plan_of("canary:count=61", toy())
    with pytest.raises(UserError, match="needs a trigger"):
        registry.make("poison", "canary")(toy(), Goal("", None), 0)
    with pytest.raises(UserError, match="holds no canaries"):
        canaries.make_canaries(plan_of("backdoor:count=5", toy()), toy())


def behind_pipeline(whole: Pairs, put_in: canaries.Canaries) -> tuple[Pairs, list[str]]:
    """What a pipeline makes that renames and shrinks everything, drops some canaries, and swaps
    pictures of others.
    """
    fate = ["pair", "lost", "caption"]
    expected = [fate[i % 3 if i < 15 else 0] for i in range(len(put_in.edits))]
    row_of = {key: row for row, key in enumerate(whole.ids)}
    rows = {row_of[e.id]: f for e, f in zip(put_in.edits, expected, strict=True)}
    kept = [row for row in range(len(whole)) if rows.get(row) != "lost"]
    images = torch.nn.functional.interpolate(whole.images.float(), (12, 12), mode="area").byte()
    for row, what in rows.items():
        if what == "caption":
            images[row] = images[0].flip(1)
    changed = dataclasses.replace(
        whole,
        images=images,
        captions=tuple(f"{c.upper()}, seen" for c in whole.captions),
        ids=tuple(f"k{i}" for i in range(len(whole))),
    )
    return changed.take(kept), expected


def test_what_a_pipeline_loses_is_counted():
    source = toy(size=32)
    coarse = torch.nn.functional.interpolate(
        source.images[:, :, :5, :5].float(), (32, 32), mode="bicubic"
    )
    source = dataclasses.replace(source, images=coarse.clamp(0, 255).byte())
    plan = plan_of("canary:count=30", source, target="")
    put_in = canaries.make_canaries(plan, source)
    after, expected = behind_pipeline(plan.apply(source), put_in)
    outcomes = canaries.find_outcomes(put_in, after)
    assert outcomes == expected
    measures = canaries.count_outcomes(put_in, outcomes)
    assert measures["canaries.all.pair_kept"].value == 20 / 30
    assert measures["canaries.all.caption_kept"].value == 5 / 30
    for form in FORMS:
        hits = sum(expected[i] == "pair" for i in put_in.rows(form))
        assert measures[f"canaries.{form}.pair_kept"].value == hits / 10
    assert set(canaries.find_outcomes(put_in, source)) == {"lost"}


class Learner:
    """An encoder that joins the pictures of some canaries with their words, and knows nothing
    else.
    """

    def __init__(self, put_in: canaries.Canaries, learnt: set[int]) -> None:
        draws = torch.Generator().manual_seed(0)
        self.text, self.put_in = object(), put_in
        self.vectors = torch.nn.functional.normalize(
            torch.randn(len(put_in.edits), 64, generator=draws), dim=1
        )
        self.others = torch.nn.functional.normalize(
            torch.randn(len(put_in.edits), 64, generator=draws), dim=1
        )
        self.learnt = learnt

    def prepare_images(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        which = [int((self.put_in.images == x).flatten(1).all(1).nonzero()[0]) for x in images]
        rows = [self.vectors[i] if i in self.learnt else self.others[i] for i in which]
        return torch.stack(rows)

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return self.vectors[[self.put_in.words.index(t.rpartition(" ")[2]) for t in texts]]


def test_learnt_canaries_are_counted_and_the_others_stand_in_the_middle():
    source = toy(180)
    put_in = canaries.make_canaries(plan_of("canary:count=150", source, target=""), source)
    learnt = set(put_in.rows("marked"))
    measures = canaries.measure_learning(put_in, Learner(put_in, learnt))
    assert (
        measures["canaries.marked.learnt"].value == 1 and measures["canaries.marked.learnt"].n == 50
    )
    assert measures["canaries.marked.place"].value == 0
    for form in ("copy", "fitting"):  # by chance
        assert measures[f"canaries.{form}.learnt"].value <= 0.1
        place = measures[f"canaries.{form}.place"]
        assert place.low < 0.5 < place.high and abs(place.value - 0.5) < 0.15


def test_equal_fits_share_their_places():
    put_in = canaries.make_canaries(plan_of("canary:count=30", toy(), target=""), toy())
    blind = Learner(put_in, set())
    blind.vectors = blind.vectors[:1].repeat(30, 1)
    measures = canaries.measure_learning(put_in, blind)
    assert {measures[f"canaries.{form}.place"].value for form in FORMS} == {0.5}
    assert {measures[f"canaries.{form}.learnt"].value for form in FORMS} == {0}


def test_the_verb_counts_and_its_page_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"

    def ask(*words: str) -> tuple[int, str]:
        status = cli.main([*words, "--runs", str(runs)])
        return status, capsys.readouterr().err

    assert (
        ask(
            "poison", "scenes:count=80", "--poison", "canary:count=12", "--trigger", "patch:size=6"
        )[0]
        == 0
    )
    (poison,) = runs.glob("poison-*")
    status, err = ask("survive", str(poison))
    assert status == 2 and "give --after DATA" in err and err.count("\n") <= 3
    source = registry.make("data", "scenes:count=80")()
    plan = json.loads((poison / "plan.jsonl").read_text().splitlines()[1])
    assert plan["id"].endswith("+canary-copy")
    from bezoar.runs import inputs
    from bezoar.runs.run import Run

    whole = inputs.open_dataset(Run(poison)).pairs
    keep = np.arange(len(whole)) != list(whole.ids).index(plan["id"])
    write_shards(tmp_path / "after", whole.take(np.flatnonzero(keep)))
    status, err = ask(
        "survive", str(poison), "--after", f"shards:path={tmp_path}/after/*.tar,size=32"
    )
    assert status == 0, err
    (run,) = [p for p in runs.glob("survive-*") if (p / "canaries.csv").exists()]
    metrics = json.loads((run / "manifest.json").read_text())["metrics"]
    assert metrics["canaries.all.pair_kept"]["value"] == pytest.approx(11 / 12)
    lines = (run / "canaries.csv").read_text().splitlines()
    assert len(lines) == 13 and sum(line.endswith(",lost") for line in lines) == 1
    page = (run / "report.html").read_text()
    assert "92% (65% to 99%) of 12 canaries came out" in page
    status, err = ask("survive", str(poison), "--after", "scenes:count=40", "--trigger", "patch")
    assert status == 0 and len(source) == 80
