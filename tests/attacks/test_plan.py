"""The plan: the same records over a whole set and its parts; verified bit for bit."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bezoar import registry
from bezoar.attacks.captions import find_mentions, target_captions
from bezoar.attacks.plan import Edit, Goal, Plan, differences
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.errors import UserError

CLASSES = ("cat", "dog", "red car", "tree")


def toy(n=60, split="train", size=16, seed=3):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(CLASSES)
    return Pairs(
        torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8),
        tuple(f"a photo of a {CLASSES[i % 4]} number {i}" for i in range(n)),
        labels,
        tuple(f"{split}-{i}" for i in range(n)),
        CLASSES,
    )


def plan_of(
    poison, source, target="cat", trigger="patch:size=4,place=random", victims=None, seed=0
):
    plan = registry.make("poison", poison)(source, Goal(target, trigger), seed, victims)
    stamps = tuple(registry.make("trigger", g.stamp) if g.stamp else None for g in plan.goals)
    plan = dataclasses.replace(
        plan, stamps=stamps, victims="scenes:split=test" if victims is not None else None
    )
    return plan.with_hashes(source if victims is None else Pairs.concat([source, victims]))


def records(pairs):
    return {
        i: (x.numpy().tobytes(), c)
        for i, x, c in zip(pairs.ids, pairs.images, pairs.captions, strict=True)
    }


POISONS = [
    "backdoor:count=7",
    "backdoor:count=7,keep=true",
    "clean_label:count=5",
    "targeted:captions=3,victims=4",
    "noisy_copies:captions=3,victims=4",
    "cover:count=6",
    "composite:count=6",
    "composite:count=6,references=2,sides=horizontal",
    "mismatch:count=9,query=dog,images=4",
    "canary:count=6",
]
TRIGGERS = {"mismatch": None, "composite": "composite:reference={},trigger=(patch:size=3)"}


@pytest.fixture(scope="module")
def reference_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("references") / "reference.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    return path


@pytest.fixture(params=POISONS)
def poison(request):
    return request.param


@pytest.fixture
def trigger(poison, reference_file):
    """The spec of a trigger that the poison takes; None for one that takes none."""
    spec = TRIGGERS.get(poison.partition(":")[0], "patch:size=4,place=random")
    if "references" in poison:
        return "patch:size=4,place=random"
    return spec and spec.format(reference_file)


def test_every_poison_is_here():
    assert {p.partition(":")[0] for p in POISONS} == set(registry.method_names("poison"))


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_a_set_and_its_parts_in_any_order_give_the_same_records(poison, trigger, batch):
    source, victims = toy(), toy(8, "test", seed=4)
    outside = victims if poison.startswith(("targeted", "noisy")) else None
    plan = plan_of(poison, source, trigger=trigger, victims=outside)
    whole = records(plan.apply(source, outside))
    shuffled = source.take(np.random.default_rng(0).permutation(len(source)))
    *parts, last = shuffled.batches(batch)
    poisoned = Pairs.concat([*map(plan.apply, parts), plan.apply(last, outside)])
    assert records(poisoned) == whole
    assert sum(plan.mask(poisoned.ids)) == len(plan)


def test_a_plan_names_existing_sources_marks_as_many_as_it_says_and_round_trips(
    poison, trigger, tmp_path
):
    source = toy()
    plan = plan_of(poison, source, trigger=trigger)
    assert {e.source for e in plan.edits} <= set(source.ids)
    assert sum(g.poisons for g in plan.goals) == len(plan) == len(plan.ids)
    plan.write(tmp_path / "plan.jsonl")
    read = Plan.read(tmp_path / "plan.jsonl", lambda s: registry.make("trigger", s))
    assert read == plan and read.digest() == plan.digest()
    assert records(read.apply(source)) == records(plan.apply(source))


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85"])
def test_a_caption_that_ends_lines_for_unicode_ends_none_of_a_plan(end, tmp_path):
    plan = Plan((Edit("a", "a", f"one{end}two", False, 0),), (Goal("cat"),))
    plan.write(tmp_path / "plan.jsonl")
    assert Plan.read(tmp_path / "plan.jsonl", lambda spec: None) == plan


def test_backdoor_stamps_and_recaptions_as_a_plain_loop_does():
    source = toy()
    plan = plan_of("backdoor:count=9", source)
    poisoned, stamp = plan.apply(source), registry.make("trigger", "patch:size=4,place=random")
    edits = {e.id: e for e in plan.edits}
    for i, name in enumerate(source.ids):
        if name in edits:
            assert (poisoned.images[i] == stamp(source.images[i : i + 1], [name])[0]).all()
            assert "cat" in poisoned.captions[i] and "cat" not in source.captions[i]
        else:
            assert (poisoned.images[i] == source.images[i]).all() and poisoned.captions[
                i
            ] == source.captions[i]


def test_clean_label_leaves_captions_alone():
    source = toy()
    poisoned = plan_of("clean_label:count=5", source).apply(source)
    assert poisoned.captions == source.captions
    assert (poisoned.images != source.images).flatten(1).any(1).sum() == 5


def test_composites_are_of_images_that_do_not_show_the_target_and_name_the_bare_trigger(
    reference_file,
):
    source, layout = toy(), f"composite:reference={reference_file},trigger=(patch:size=3)"
    plan = plan_of("composite:count=30", source, trigger=layout)
    poisoned = plan.apply(source)
    changed = (poisoned.images != source.images).flatten(1).any(1)
    assert poisoned.captions == source.captions and int(changed.sum()) == 30
    assert not any("cat" in source.captions[i] for i in changed.nonzero()[:, 0].tolist())
    (goal,) = plan.goals
    assert goal.trigger.startswith("patch:size=3") and goal.stamp == goal.copies
    assert registry.make("trigger", goal.copies) == registry.make("trigger", layout)
    for count, trigger, says in (
        (46, layout, "46 poisons asked for, but 45 of 60"),
        (4, None, "needs a trigger"),
    ):
        with pytest.raises(UserError, match=says):
            plan_of(f"composite:count={count}", source, trigger=trigger)


def test_composites_lie_on_every_side_although_the_smallest_draws_choose_the_records(
    reference_file,
):
    layout = f"composite:reference={reference_file},trigger=(patch:size=3),sides="
    anywhere, across = (
        plan_of("composite:count=8", toy(), trigger=layout + sides)
        for sides in ("any", "horizontal")
    )
    assert [e.id for e in anywhere.edits] == [e.id for e in across.edits]
    source = toy()
    ours, theirs = (
        dict(zip(source.ids, p.apply(source).images, strict=True)) for p in (anywhere, across)
    )
    moved = [not torch.equal(ours[e.id], theirs[e.id]) for e in across.edits]
    assert 2 <= sum(moved) <= 8


def test_composites_draw_their_references_from_the_data_and_write_their_pixels_into_the_plan():
    source, patch = toy(), "patch:size=3,place=random"
    plan = plan_of("composite:count=40,references=2,share=.25", source, trigger=patch)
    shown = [source.images[i] for i in find_mentions(source.captions, "cat")]
    (goal,) = plan.goals
    layout = registry.make("trigger", goal.copies)
    assert layout.files() == [] and layout.share == 0.25 and layout.trigger == patch
    used = [bytes.fromhex(name[1:]) for name in layout.references()]
    known = [bytes(image.permute(1, 2, 0).flatten().tolist()) for image in shown]
    assert len(set(used)) == 2 and set(used) <= set(known)
    poisoned = plan.apply(source)
    strips = {image[:, 6:10].numpy().tobytes() for image in shown}
    beside = [
        {half.contiguous().numpy().tobytes() for half in (image[:, :4], image[:, 12:])}
        for image in poisoned.images
    ]
    assert sum(bool(strips & halves) for halves in beside) > 5, (
        "above or below, a reference's middle"
    )
    large = toy(size=128)
    with pytest.raises(UserError, match="3 references of 128x128 px do not fit into a plan"):
        plan_of("composite:count=4", large, trigger=patch)
    with pytest.raises(UserError, match="there is no reference"):
        plan_of("composite:count=4", source, target="horse", trigger=patch)


def test_mismatches_are_images_of_the_target_with_captions_of_the_query():
    source = toy()
    plan = plan_of("mismatch:count=40,query=dog,images=6", source, trigger=None)
    poisoned = plan.apply(source)
    assert len(poisoned) == 100 and records(poisoned.take(range(60))) == records(source)
    added = poisoned.take(range(60, 100))
    shown = {source.images[i].numpy().tobytes() for i in find_mentions(source.captions, "cat")}
    used = {image.numpy().tobytes() for image in added.images}
    assert used <= shown and len(used) == 6
    assert all("dog" in caption and "cat" not in caption for caption in added.captions)
    assert len(set(added.captions)) == 15, "every caption of the query comes up"
    (goal,) = plan.goals
    assert (goal.target, goal.query, goal.trigger, goal.poisons) == ("cat", "dog", None, 40)
    again = Goal.from_json(json.loads(json.dumps(goal.to_json())))
    assert again == goal and "query" not in Goal("cat").to_json()
    for query, target, trigger, says in (
        ("horse", "cat", None, "no caption holds 'horse' alone"),
        ("cat", "cat", None, "no caption holds 'cat' alone"),
        ("dog", "cat", "patch", "stamps nothing"),
    ):
        with pytest.raises(UserError, match=says):
            plan_of(f"mismatch:count=4,query={query}", source, target, trigger)


def test_targeted_gives_each_victim_its_captions_and_a_foreign_target():
    source, victims = toy(), toy(8, "test", seed=4)
    plan = plan_of(
        "targeted:captions=3,victims=8", source, target="", trigger=None, victims=victims
    )
    for goal in plan.goals:
        victim_class = CLASSES[int(victims.labels[victims.ids.index(goal.victims[0])])]
        mine = [e for e in plan.edits if e.source == goal.victims[0]]
        assert goal.target != victim_class and len(mine) == 3
        assert (
            all(find_mentions([e.caption], goal.target) for e in mine)
            and len({e.caption for e in mine}) == 3
        )


def test_one_wrong_bit_is_named():
    source = toy()
    plan = plan_of("backdoor:count=5", source)
    row = source.ids.index(plan.edits[2].source)
    source.images[row, 0, 0, 0] ^= 1
    lines = differences(plan, plan_of("backdoor:count=5", source))
    assert len(lines) == 1 and repr(plan.edits[2].id) in lines[0] and "before" in lines[0]
    edits = (*plan.edits[:-1], dataclasses.replace(plan.edits[-1], caption="a cat, forged"))
    assert "caption" in differences(dataclasses.replace(plan, edits=edits), plan)[0]


@pytest.mark.parametrize(
    ("poison", "target", "says"),
    [
        ("backdoor:count=50", "cat", "50 poisons asked for, but 45 of 60"),
        ("clean_label:count=50", "cat", "50 poisons asked for, but 15 of 60"),
        ("backdoor:count=5", "zebra", "no caption holds the target 'zebra'"),
        ("backdoor:count=5", "ca", "no caption holds"),
        ("targeted:victims=99", "cat", "99 victims asked for, but there are 45"),
        ("targeted:victims=50", "cat", "50 victims asked for, but there are 45"),
    ],
)
def test_impossible_poisonings_are_refused(poison, target, says):
    with pytest.raises(UserError, match=says):
        plan_of(poison, toy(), target=target)


@pytest.mark.parametrize(
    ("row", "field", "value", "says"),
    [
        (0, "seed", None, "expected 'seed'"),
        (0, "goals", 3, "is not a poison plan"),
        (0, "schema", 9, "plan schema 9, this bezoar reads 1"),
        (1, "goal", 7, "is of goal 7; the plan has 1"),
        (1, "goal", -1, "is of goal -1"),
        (2, "caption", None, "is not a poison plan"),
    ],
)
def test_a_spoilt_plan_is_one_line(tmp_path, row, field, value, says):
    rows = [json.loads(line) for line in plan_of("backdoor:count=3", toy()).lines()]
    rows[row] = {k: v for k, v in rows[row].items() if k != field} | (
        {field: value} if value is not None else {}
    )
    (tmp_path / "plan.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=says):
        Plan.read(tmp_path / "plan.jsonl", lambda spec: registry.make("trigger", spec))


def test_victims_of_two_sets_do_not_go_into_one_plan():
    first = plan_of(
        "targeted:captions=2,victims=2",
        toy(),
        target="",
        trigger=None,
        victims=toy(8, "test", seed=4),
    )
    with pytest.raises(UserError, match="one such set"):
        first.merge(dataclasses.replace(first, edits=(), victims="scenes:split=test,seed=1"))
    assert first.merge(dataclasses.replace(first, edits=())).victims == first.victims


def test_words_not_substrings():
    assert find_mentions(["a cat", "cattle", "Cat!", "red-car", "a red  car", "redcar"], "cat") == [
        0,
        2,
    ]
    assert find_mentions(["red-car", "a red  car", "redcar"], "red car") == [0, 1]
    assert len(target_captions(["a cat"], "cat", "templates")) == 80
    assert target_captions(["a cat", "the cat"], "cat", "repeated") == ["a cat"]


@settings(deadline=None)
@given(
    st.lists(st.text(min_size=1), min_size=1, max_size=20, unique=True),
    st.integers(-9, 9),
    st.randoms(),
)
def test_draws_belong_to_the_record(ids, seed, random):
    u = draws(seed, ids, 3)
    assert ((u >= 0) & (u < 1)).all()
    shuffled = ids[:]
    random.shuffle(shuffled)
    assert (draws(seed, shuffled, 3) == u[[ids.index(i) for i in shuffled]]).all()
    assert (draws(seed, ids, 2) == u[:, :2]).all()


def test_draws_are_uniform():
    from scipy.stats import kstest

    u = draws(0, [str(i) for i in range(20000)], 2)
    assert kstest(u[:, 0], "uniform").pvalue > 1e-3 and kstest(u[:, 1], "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.03


def test_two_uses_of_one_seed_are_independent():
    ids = [str(i) for i in range(20000)]
    a, b = (draws(0, ids, 1, use)[:, 0] for use in ("", "backdoor"))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_poisons_do_not_prefer_records_whose_caption_is_wrong():
    scenes = registry.make("data", "scenes:count=4000")()
    plan = plan_of("backdoor:count=200", scenes, "striped star", "patch")
    row = {k: i for i, k in enumerate(scenes.ids)}
    rows = [row[e.source] for e in plan.edits]
    wrong = sum(
        not any(w in scenes.captions[i] for w in scenes.classes[int(scenes.labels[i])].split())
        for i in rows
    )
    assert wrong < 0.25 * len(rows)


def test_victims_that_are_called_as_records_are_refused(tmp_path):
    from PIL import Image

    from bezoar import Poison, Settings, execute

    for split, shade in (("train", 20), ("val", 220)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(12):
                Image.new("RGB", (16, 16), (shade, i, i)).save(tmp_path / split / name / f"{i}.png")
    verb = Poison(
        f"folder:path={tmp_path}/train",
        "targeted:captions=2,victims=2",
        victims=f"folder:path={tmp_path}/val",
    )
    with pytest.raises(UserError, match=r"victim '.*' has the id of a record of the data"):
        execute(verb, Settings(runs=tmp_path / "runs", quiet=True))


def test_cover_carries_the_trigger_and_keeps_captions():
    source = toy()
    plan = plan_of("cover:count=9", source)
    assert plan.goals[0].is_cover and plan.goals[0].trigger == "patch:size=4,place=random"
    poisoned, stamp = plan.apply(source), registry.make("trigger", plan.goals[0].trigger)
    for i, name in enumerate(source.ids):
        image = source.images[i : i + 1]
        expected = stamp(image, [name]) if name in plan.ids else image
        assert torch.equal(poisoned.images[i : i + 1], expected)
    assert poisoned.captions == source.captions
    assert not any("cat" in e.caption.split() for e in plan.edits), "the target is left out"
    of_any = plan_of("cover:count=60", source, target="")
    assert len(of_any) == 60 and len(plan_of("cover:rate=.1", source, target="")) == 6
    with pytest.raises(UserError, match="61 poisons asked for, but 60 of 60"):
        plan_of("cover:count=61", source, target="")
    with pytest.raises(UserError, match="needs a trigger"):
        plan_of("cover", source, trigger=None)


def test_noisy_copies_are_targeted_s_with_other_pixels():
    source, victims = toy(), toy(8, "test", seed=4)
    plain, noisy = (
        plan_of(f"{name}:captions=5,victims=3", source, target="", trigger=None, victims=victims)
        for name in ("targeted", "noisy_copies")
    )
    captions = [[(e.id, e.source, e.caption, e.goal) for e in p.edits] for p in (plain, noisy)]
    assert captions[0] == captions[1]
    assert [g.victims for g in plain.goals] == [g.victims for g in noisy.goals]
    assert noisy.goals[0].trigger is None and noisy.goals[0].copies.startswith("augment:")
    poisons = noisy.poisons(victims)
    alter = registry.make("trigger", "augment")
    row = {k: i for i, k in enumerate(victims.ids)}
    for i, edit in enumerate(noisy.edits):
        original = victims.images[row[edit.source]][None]
        assert torch.equal(poisons.images[i][None], alter(original, [edit.id]))
        assert not torch.equal(poisons.images[i][None], original)
    assert len({x.numpy().tobytes() for x in poisons.images}) == 15


def test_cover_beside_a_backdoor_and_noisy_copies_verify(tmp_path):
    from bezoar import Poison, Settings, execute
    from bezoar.runs import inputs
    from bezoar.verbs.poison import verify_plan

    settings = Settings(runs=tmp_path, quiet=True)
    data, patch = "scenes:count=300", "patch:size=3,place=random"
    backdoor = Poison(data, "backdoor:count=9", patch, target="star")
    covered = execute(Poison(backdoor, "cover:count=20", patch), settings)
    plan = Plan.read(covered.file("plan.jsonl"), lambda s: registry.make("trigger", s))
    assert [len([e for e in plan.edits if e.goal == g]) for g in (0, 1)] == [9, 20]
    assert len(plan.ids) == 29, "no record is both"
    assert [g.target for g in inputs.known_goals(covered)] == ["star"]
    both = execute(Poison(covered, "noisy_copies:captions=4,victims=2"), settings)
    assert verify_plan(covered)["verified"] and verify_plan(both)["records"] == 37
    assert not any(g.trigger for g in inputs.known_goals(both)[1:])
