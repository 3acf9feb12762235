"""The contract of every repair on a toy backdoor; the ladder's rule; parts against plain forms; the
receipt and its verb.
"""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from bezoar import Settings, execute, registry
from bezoar.attacks.plan import Goal
from bezoar.data import randomness
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.errors import UserError
from bezoar.evaluation.verdict import Inversion
from bezoar.repair import rate_ladder, receipt
from bezoar.repair.repairs.distill import reset_last_layers
from bezoar.repair.repairs.prune import find_last_convolution
from bezoar.repair.repairs.unlearn import Loss as Unlearning
from bezoar.reports import page
from bezoar.runs import inputs
from bezoar.training import loop
from bezoar.training.universal_triggers import UniversalTriggers
from bezoar.verbs import repair as made_to_order
from bezoar.verbs.repair import Repair

PAINTS = {
    "red": (200, 60, 60),
    "green": (60, 200, 60),
    "blue": (60, 60, 200),
    "yellow": (200, 200, 60),
}
TRIGGER = "patch:size=8,fill=checker"
QUICK = {
    "finetune": "finetune:objective=(cleanclip:epochs=6,batch=50,crop=0.3),lrs=2e-2",
    "prune": "prune:objective=(clip:epochs=10,batch=50),lrs=1e-2",
    "distill": "distill:epochs=16,batch=50,fresh=0.4,jitter=0,lrs=1e-2",
    "unlearn": "unlearn:epochs=5,batch=50,lrs=3e-3",
}


def toy(n=400, seed=0):
    """Noise in one of four colours, with a caption that says which."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    paint = torch.tensor(list(PAINTS.values()), dtype=torch.float)[labels][:, :, None, None]
    images = (paint + 60 * torch.randn(n, 3, 32, 32, generator=g)).clamp(0, 255).byte()
    names = list(PAINTS)
    captions = tuple(f"a {names[c]} wall" for c in labels.tolist())
    return Pairs(images, captions, labels, tuple(f"{seed}-{i}" for i in range(n)), tuple(names))


@pytest.fixture(scope="module")
def suspect():
    """A small CLIP that reads whatever carries the patch as red."""
    data, goal = toy(seed=1), Goal("red", TRIGGER)
    plan = registry.make("poison", "backdoor:count=60")(data, goal, 0)
    poisoned = replace(plan, stamps=(registry.make("trigger", TRIGGER),)).apply(data)
    torch.manual_seed(0)
    network = registry.make("network", "clip_small:width=4,dim=16")
    encoder = network(32, network.vocabulary(data.captions))
    recipe = registry.make("objective", "clip:epochs=24,batch=50,lr=5e-3")
    loop.fit(recipe(encoder), recipe, poisoned, encoder.tokenize(poisoned.captions), 0)
    encoder.about |= {"poisoned": True, "plan": "abc", "goals": [vars(goal)]}
    encoder.zero_grad()
    return encoder.eval()


@pytest.fixture(scope="module")
def clean():
    return rate_ladder.split_validation(toy(seed=2), 0.25, 0)


TEST = toy(200, seed=3)
GOALS = (Goal("red", TRIGGER),)


def inverted():
    """What a good audit would find."""
    mask = torch.zeros(1, 32, 32)
    mask[:, 23:31, 23:31] = 1
    stamped = registry.make("trigger", TRIGGER)(
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["0"]
    )[0]
    return Inversion(mask, stamped.float() / 255, "red", 64.0, 1.0)


def accuracy_and_success(encoder):
    measures = registry.make("probe", "zero_shot")(encoder, None, TEST, GOALS)
    return measures["clean_accuracy"].value, measures["attack_success"].value


def bits(encoder):
    return {k: v.clone() for k, v in encoder.state_dict().items()}


# The contract of every repair


@pytest.mark.parametrize("name", registry.method_names("repair"))
def test_every_repair_keeps_the_contract(name, suspect, clean):
    train, validation = clean
    before, marks, (accuracy, success) = (
        bits(suspect),
        json.dumps(suspect.about),
        accuracy_and_success(suspect),
    )
    assert accuracy > 0.95 and success > 0.9
    repair, log = registry.make("repair", QUICK[name]), {}
    offered = {
        "validation": validation,
        "inversions": (inverted(),),
        "report": lambda *_: None,
        "log": log,
    }
    assert set(repair.needs) <= set(offered)
    repaired, again = (
        repair(suspect, train, 0, **{k: offered[k] for k in repair.needs}) for _ in range(2)
    )
    success_left, accuracy_left = accuracy_and_success(repaired)[::-1]
    assert success_left < 0.2 and accuracy_left > accuracy - 0.05
    assert all(
        torch.equal(v, again.state_dict()[k]) for k, v in bits(repaired).items()
    )  # same seed, same bits
    assert (
        all(torch.equal(v, before[k]) for k, v in bits(suspect).items())
        and json.dumps(suspect.about) == marks
    )
    assert (
        not suspect.training
        and not repaired.training
        and all(p.grad is None for p in suspect.parameters())
    )
    assert repaired.about["repaired"] == [registry.spec(repair)]
    assert all(
        repaired.about[k] == suspect.about[k]
        for k in ("poisoned", "plan", "goals", "network", "vocabulary")
    )
    assert [p.requires_grad for p in repaired.parameters()] == [
        p.requires_grad for p in suspect.parameters()
    ]
    assert json.loads(json.dumps(log))["ladder"][0]["held"] in (True, False)
    twice = (
        receipt.apply_repairs([repair], repaired, train, validation, (inverted(),), 0)[0]
        if name == "unlearn"
        else None
    )
    assert twice is None or twice.about["repaired"] == [registry.spec(repair)] * 2


# The ladder


@pytest.mark.parametrize(
    "scores, chosen, held",
    [
        (
            {0.1: 0.85, 0.01: 0.89, 0.001: 0.9},
            0.01,
            True,
        ),  # the largest that falls by no more than 0.02
        ({0.1: 0.93, 0.01: 0.9, 0.001: 0.9}, 0.1, True),
        ({0.1: 0.2, 0.01: 0.8, 0.001: 0.7}, 0.01, False),  # none: what lost least
        (
            {0.1: 0.8, 0.01: 0.8, 0.001: 0.7},
            0.1,
            False,
        ),  # as bad at two: one of them is taken, and is said to be
        ({0.1: None, 0.01: 0.88, 0.001: 0.9}, 0.01, True),  # one at which training breaks down
    ],
)
def test_the_rule_takes_the_largest_rate_that_keeps_the_score(scores, chosen, held):
    start, tried = nn.Linear(1, 1), []

    def make(lr):
        tried.append(lr)
        if scores[lr] is None:
            raise UserError("the loss became nan")
        student = nn.Linear(1, 1)
        student.lr = lr
        return student

    metric, log = (
        rate_ladder.ValidationMetric(lambda e: scores[e.lr] if hasattr(e, "lr") else 0.9, "score"),
        {},
    )
    student = rate_ladder.train_at_largest_rate(start, metric, (0.01, 0.1, 0.001), 0.02, make, log)
    assert student.lr == chosen and log["ladder"][0]["held"] == held
    assert tried == sorted(scores, reverse=True)[: len(tried)] and (not held or tried[-1] == chosen)
    assert [r["lr"] for r in log["ladder"][0]["rungs"] if r["chosen"]] == [chosen]


def test_a_ladder_that_breaks_down_everywhere_says_so():
    def make(lr):
        raise UserError("the loss became nan")

    with pytest.raises(UserError, match="became nan"):
        rate_ladder.train_at_largest_rate(
            nn.Linear(1, 1),
            rate_ladder.ValidationMetric(lambda e: 1.0, ""),
            (0.1, 0.01),
            0.02,
            make,
        )


def test_the_score_is_the_best_that_the_clean_records_allow(suspect, clean):
    train, validation = clean
    blank = {"labels": None, "classes": ()}
    images = copy.deepcopy(suspect)
    images.text = None
    cases = {
        "zero-shot": (suspect, train, validation),
        "linear head": (images, train, validation),
        "own caption": (suspect, replace(train, **blank), replace(validation, **blank)),
        "cluster": (
            images,
            replace(train, captions=(), **blank),
            replace(validation, captions=(), **blank),
        ),
    }
    for word, (encoder, one, other) in cases.items():
        metric = rate_ladder.ValidationMetric.of(encoder, one, other)
        assert word in metric.how and metric.score(encoder) > 0.8
        broken = copy.deepcopy(encoder)
        reset_last_layers(broken.image, 1.0)
        nn.init.zeros_(broken.image.layers[0].weight)
        broken.image.head.bias.data.fill_(1)
        assert metric.score(broken) < 0.6
    with pytest.raises(UserError, match="10 validation records"):
        rate_ladder.ValidationMetric.of(suspect, train, validation.take(range(10)))


def test_records_are_held_apart_by_what_they_are():
    data = toy(100)
    train, validation = rate_ladder.split_validation(data, 0.2, 0)
    assert len(validation) == 20 and not set(train.ids) & set(validation.ids)
    shuffled = data.take(torch.randperm(100, generator=torch.Generator().manual_seed(0)))
    assert set(rate_ladder.split_validation(shuffled, 0.2, 0)[1].ids) == set(validation.ids)
    several = replace(data, ids=tuple(f"{i // 5}#{i % 5}" for i in range(100)))
    sides = [
        {key.partition("#")[0] for key in part.ids}
        for part in rate_ladder.split_validation(several, 0.2, 0)
    ]
    assert len(sides[1]) == 4 and len(sides[0]) == 16 and not sides[0] & sides[1]


def test_an_encoder_that_says_nothing_finds_no_captions(suspect):
    validation = replace(toy(60), captions=tuple(f"number {i % 20}" for i in range(60)))
    mute = copy.deepcopy(suspect)
    mute.encode_texts = lambda captions: torch.ones(len(captions), 16) / 4
    assert rate_ladder.caption_retrieval(mute, validation) == pytest.approx(1 / 20)
    mute.encode_texts = lambda captions: torch.full((len(captions), 16), math.nan)
    with pytest.raises(UserError, match="NaN"):
        rate_ladder.caption_retrieval(mute, validation)


# Parts of repairs


def test_the_last_layers_are_drawn_anew(suspect):
    tower = copy.deepcopy(suspect.image)
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        reset_last_layers(tower, 0.4)  # two of five: the last convolution and the linear layer
    changed = {
        k.rpartition(".")[0] for k, v in tower.state_dict().items() if not torch.equal(v, before[k])
    }
    assert changed == {"layers.9", "layers.10", "head"}
    untouched = copy.deepcopy(suspect.image)
    reset_last_layers(untouched, 0.0)
    assert all(torch.equal(v, before[k]) for k, v in untouched.state_dict().items())


def test_channels_are_ordered_by_their_activity_on_clean_images(suspect, clean):
    last = find_last_convolution(suspect, clean[0], batch=64)
    assert (last.conv, last.norm) == ("layers.9", "layers.10")
    with torch.no_grad():
        maps = suspect.image.layers(suspect.prepare_images(clean[0].images))
    assert torch.allclose(last.activity, maps.mean((0, 2, 3)), atol=1e-5)
    less = copy.deepcopy(suspect)
    last.silence(less.image, torch.tensor([3, 5]))
    with torch.no_grad():
        after = less.image.layers(suspect.prepare_images(clean[0].images[:8]))
    assert not after[:, [3, 5]].any() and torch.equal(after[:, 6], maps[:8, 6])


@pytest.mark.parametrize("network", ["resnet:width=4", "tower:width=4,dim=8"])
def test_pruning_finds_the_last_convolution_of_other_towers(network):
    torch.manual_seed(0)
    encoder = registry.make("network", network)(32).eval()
    last = find_last_convolution(encoder, toy(20))
    assert last.conv in ("layer4.1.conv2", "layers.9") and last.norm in (
        "layer4.1.bn2",
        "layers.10",
    )
    assert len(last.activity) == 32 and (last.activity >= 0).all()


def test_pruning_refuses_towers_without_convolutions():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, 8, 16, 16), nn.Linear(32, 4)

        def forward(self, x):
            return self.head(self.patches(x).flatten(1))

    with pytest.raises(UserError, match="convolutional towers"):
        find_last_convolution(Encoder(Flat(), Preprocess(32)), toy(8))


def test_pruned_channels_stay_pruned_while_they_are_tuned(suspect, clean):
    log = {}
    repair = registry.make(
        "repair", "prune:objective=(clip:epochs=1,batch=64),lrs=1e-2,drop=0.3,tolerance=1"
    )
    tuned = repair(suspect, clean[0], 0, validation=clean[1], log=log)
    count = log["pruned"]["channels"]
    channels = find_last_convolution(suspect, clean[0]).activity.argsort(stable=True)[:count]
    assert 0 < count < 32 and not tuned.image.layers[9].weight[channels].any()
    assert (
        not tuned.image.layers[10].weight[channels].any()
        and not tuned.image.layers[10].bias[channels].any()
    )
    assert not torch.equal(tuned.image.layers[0].weight, suspect.image.layers[0].weight)


def test_unlearning_draws_stamped_images_to_where_they_were_without(suspect):
    loss = Unlearning(copy.deepcopy(suspect), suspect, [inverted()], 2.0, 0).train()
    images = TEST.images[:16]
    got = loss(images, torch.zeros(16, 0), training_chance())
    with torch.no_grad():
        wanted, stamped = suspect.encode_images(images), suspect.encode_images(inverted()(images))
    plain = 1 - F.cosine_similarity(wanted, stamped).mean()
    assert (
        got.item() == pytest.approx(plain.item(), abs=1e-3) and plain > 0.1
    )  # the clean term is 0 at the start
    assert not any(m.training for m in loss.modules() if isinstance(m, nn.BatchNorm2d))


def test_unlearning_without_an_audit_stamps_what_is_searched_for(suspect):
    searched = UniversalTriggers(6, 32, 32, torch.device("cpu"))
    loss = Unlearning(copy.deepcopy(suspect), suspect, [], 0.0, 0, searched).train()
    images = TEST.images[:12]
    got = loss(images, torch.zeros(12, 0), training_chance())
    with torch.no_grad():
        x = images.float() / 255
        again = UniversalTriggers(6, 32, 32, torch.device("cpu"))(x, training_chance())
        wanted, stamped = suspect.encode_images(x), suspect.encode_images(again)
    assert got.item() == pytest.approx(
        1 - F.cosine_similarity(wanted, stamped).mean().item(), abs=1e-3
    )
    before = searched.patterns.detach().clone(), searched.colours.detach().clone()
    got.backward()
    assert not torch.equal(searched.patterns, before[0])
    assert not torch.equal(searched.colours, before[1])
    both = Unlearning(copy.deepcopy(suspect), suspect, [inverted()], 0.0, 0, searched)
    stamped = both.stamp(x, training_chance())
    torch.testing.assert_close(stamped[:6], inverted()(x[:6]))


def training_chance():
    from bezoar.training.augmentation import Chance

    return Chance(randomness.generator(0))


@pytest.mark.parametrize(
    "spec, changes, message",
    [
        ("unlearn:search=0", {}, "needs the triggers of an audit"),
        ("finetune", {"captions": ()}, "have none; take unlearn"),
        ("finetune:objective=simclr", {}, "away from the text tower"),
        ("finetune:objective=(clip:batch=4000)", {}, "fewer than one batch"),
    ],
)
def test_what_does_not_fit_is_refused(spec, changes, message, suspect, clean):
    repair = registry.make("repair", spec)
    offered = {"validation": clean[1], "inversions": (), "report": lambda *_: None, "log": {}}
    with pytest.raises(UserError, match=message):
        repair(suspect, replace(clean[0], **changes), 0, **{k: offered[k] for k in repair.needs})


def test_triggers_of_another_size_are_refused(suspect, clean):
    small = Inversion(torch.zeros(1, 16, 16), torch.zeros(3, 16, 16), "red", 0.0, 1.0)
    with pytest.raises(UserError, match="of 16x16 px, the clean images of 32x32"):
        registry.make("repair", "unlearn")(suspect, clean[0], 0, (small,), clean[1])


@pytest.mark.parametrize(
    "spec, message",
    [
        ("finetune:lrs=0", "rates above 0"),
        ("finetune:tolerance=2", "tolerance in 0..1"),
        ("finetune:objective=nothing", "no objective"),
        ("distill:fresh=2", "fresh in 0..1"),
        ("prune:drop=-1", "drop in 0..1"),
        ("unlearn:count=0", "count, epochs and batch >= 1"),
        ("unlearn:search=-1", "search, keep, shift"),
    ],
)
def test_fields_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        registry.make("repair", spec)


def test_an_encoder_of_images_alone_is_tuned_by_simclr(clean):
    torch.manual_seed(0)
    encoder = registry.make("network", "tower:width=4,dim=8")(32).eval()
    repair = registry.make(
        "repair",
        "finetune:objective=(simclr:epochs=1,batch=64,hidden=8,dim=8),lrs=1e-3,tolerance=1",
    )
    tuned = repair(encoder, clean[0], 0, clean[1])
    assert not torch.equal(tuned.image.head.weight, encoder.image.head.weight)
    pruned = registry.make("repair", "prune:lrs=1e-3,tolerance=1,drop=0.05")(
        encoder, clean[0], 0, clean[1]
    )
    assert pruned.about["repaired"] and not torch.equal(
        pruned.image.head.weight, encoder.image.head.weight
    )
    assert (
        registry.method_name(
            type(rate_ladder.select_objective("auto", encoder, clean[0], "clip", "simclr"))
        )
        == "simclr"
    )


# The receipt


def write_inversions(folder, inversions, verdict=True):
    """As an audit writes its inversions."""
    tensors = {}
    for i, inversion in enumerate(inversions):
        tensors |= {f"mask@{i}": inversion.mask, f"pattern@{i}": inversion.pattern}
    save_file(tensors, folder / "inversions.safetensors")
    facts = [{"target": i.target, "norm": i.norm, "success": i.success} for i in inversions]
    if verdict:
        (folder / "verdict.json").write_text(json.dumps({"inversions": facts}))


def test_the_smallest_trigger_that_reaches_its_target_comes_first(tmp_path):
    facts = [
        ("large", 90.0, 0.9),
        ("unreached", 2.0, 0.2),
        ("small", 2.7, 0.8),
        ("equal", 2.7, 0.9),
    ]
    shapes = (1, 8, 8), (3, 8, 8)
    write_inversions(tmp_path, [Inversion(*map(torch.zeros, shapes), *fact) for fact in facts])
    loaded = [each.target for each in receipt.load_inversions(tmp_path)]
    assert loaded == ["small", "equal", "large", "unreached"]


def test_inverted_triggers_are_read_and_stamped_as_any_trigger(tmp_path, suspect):
    write_inversions(tmp_path, [inverted()])
    inversions = receipt.load_inversions(tmp_path)
    assert inversions[0].target == "red" and torch.equal(inversions[0].mask, inverted().mask)
    case = receipt.EvaluationData(TEST, GOALS)
    nameless = replace(inversions[0], target="")
    goals = receipt.export_goals(
        [inversions[0], nameless], tmp_path, case, case.default_head(suspect)
    )
    assert [g.target for g in goals] == [
        "red",
        "red",
    ]  # the second is what most stamped images are read as
    stamped = registry.make("trigger", goals[0].trigger)(TEST.images, TEST.ids)
    assert torch.equal(stamped, inversions[0](TEST.images))
    assert torch.equal(stamped, registry.make("trigger", TRIGGER)(TEST.images, TEST.ids))
    assert receipt.load_inversions(tmp_path / "none") == ()
    (tmp_path / "inversions.safetensors").write_bytes(b"no such thing")
    with pytest.raises(UserError, match="holds no triggers"):
        receipt.load_inversions(tmp_path)


def test_a_receipt_says_what_the_probes_say(suspect, clean, tmp_path):
    write_inversions(tmp_path, [inverted()], verdict=False)
    case = receipt.EvaluationData(TEST, GOALS, labelled=clean[0])
    first = case.default_head(suspect)
    case = replace(
        case,
        inverted=receipt.export_goals(receipt.load_inversions(tmp_path), tmp_path, case, first),
    )
    measures = case.measure(suspect, first)
    for probe, lead in (("zero_shot", ""), ("linear", ""), ("z_score", "")):
        for name, m in registry.make("probe", probe)(suspect, clean[0], TEST, GOALS).items():
            if lead + name in measures:
                assert measures[lead + name].value == pytest.approx(m.value, abs=1e-6), name
    assert {
        "clean_accuracy",
        "attack_success",
        "linear.attack_success",
        "z_std",
        "inverted.attack_success",
    } <= set(measures)
    assert measures["inverted.attack_success"].value == measures["attack_success"].value
    same = receipt.accuracy_loss(case, first, first)
    assert (same.value, same.n) == (
        0,
        len(TEST),
    ) and same.low < 0 < same.high  # nothing lost of so many images
    readings = receipt.compare_readings(case, first, first)
    assert [r["inverted"] for r in readings] == [None, 0] and "red" not in readings[0]["own"]
    assert np.mean([name == "red" for name in readings[0]["before"]]) > 0.8


def test_a_relapse_is_looked_for_with_and_without_captions(suspect, clean):
    case = receipt.EvaluationData(TEST, GOALS, labelled=clean[0])
    measures = receipt.RevivalTest(case, clean[0], GOALS[0], 0).measure(suspect, suspect)
    assert {k.partition(".")[0] for k in measures} == {
        "revived_clean",
        "revived_poisons",
        "revived_other",
        "revived_twin",
    }
    assert (
        measures["revived_poisons.attack_success"].value > 0.9
    )  # ten poisons; of another trigger they may do as much on a toy
    images = copy.deepcopy(suspect)
    images.text = None
    revival = receipt.RevivalTest(case, clean[0], GOALS[0], 0)
    headed = revival.measure_poisoned_head(replace(case, goals=GOALS), images, GOALS[0])
    assert (
        headed["linear.attack_success"].value > 0.9
        and "10 stamped ones" in headed["linear.attack_success"].how
    )
    assert receipt.unseen_trigger(TRIGGER, 32).startswith(
        "patch:size=8,fill=blocks"
    ) and "seed=1000" in receipt.unseen_trigger("blend", 32)


# The verb


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """Less of what is made to order."""
    monkeypatch.setattr(made_to_order, "FRESH", 300)
    monkeypatch.setattr(made_to_order, "LABELLED", 200)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, suspect):
    """A folder of runs with the suspect as a train run, over a data method of the toy records."""
    folder = tmp_path_factory.mktemp("repair")
    (folder / "toys.py").write_text(
        "from dataclasses import dataclass\nfrom typing import Annotated\n"
        "from bezoar.registry import method\nfrom repair.test_repairs import toy\n\n\n"
        '@method\nclass Toys:\n    """Toy records."""\n\n    count: Annotated[int, "n"] = 400\n'
        '    seed: Annotated[int, "s"] = 2\n    split: Annotated[str, "which"] = "train"\n\n'
        '    def __call__(self):\n        return toy(self.count, self.seed + 50 * (self.split == "test"))\n'  # noqa: E501
    )
    run = folder / "runs" / "train-suspect"
    run.mkdir(parents=True)
    suspect.save(run)
    goal = {**vars(GOALS[0]), "victims": [], "references": []}
    spec = f"{folder / 'toys.py'}:count=200,seed=9"
    manifest = {
        "schema": 1,
        "verb": "train",
        "status": "done",
        "parents": [],
        "goal": [goal],
        "metrics": {},
        "notes": {},
    }
    manifest["ask"] = {"verb": "train", "seed": 0, "data": {"spec": spec}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    audit = folder / "runs" / "audit-toy"
    audit.mkdir()
    write_inversions(audit, [inverted()])
    (audit / "manifest.json").write_text(
        json.dumps({**manifest, "verb": "audit", "ask": {}, "parents": [], "goal": []})
    )
    return folder


def test_the_verb_writes_encoder_receipt_and_page(runs, suspect):
    settings = Settings(runs / "runs", device="cpu", quiet=True)
    data = f"{runs / 'toys.py'}"
    run = execute(Repair("train-suspect", data, (QUICK["unlearn"],), audit="audit-toy"), settings)
    manifest = run.manifest
    assert (
        manifest["metrics"]["before.attack_success"]["value"]
        > 0.9
        > 0.2
        > manifest["metrics"]["after.attack_success"]["value"]
    )
    wanted = {
        "after.linear.attack_success",
        "after.z_std",
        "after.inverted.attack_success",
        "clean_accuracy_lost",
        "seconds",
    }
    wanted |= {f"revived_{k}.attack_success" for k in ("clean", "poisons", "other")}
    assert wanted <= set(manifest["metrics"]) and manifest["goal"][0]["target"] == "red"
    cured = inputs.load_encoder(run, "cpu")
    assert (
        cured.about["poisoned"]
        and cured.about["plan"] == "abc"
        and len(cured.about["repaired"]) == 1
    )
    assert accuracy_and_success(cured)[1] == pytest.approx(
        manifest["metrics"]["after.attack_success"]["value"], abs=0.15
    )
    text = page.render_page(run)
    assert "could not be made" not in text and text.index("Before and after") < text.index(
        "Which learning rate"
    )
    assert "Inverted trigger, read as" in text and "was red" in text
    alone = execute(Repair("train-suspect", data, repaired=run, revive=False), settings)
    ours, theirs = (r.manifest["metrics"]["after.clean_accuracy"]["value"] for r in (alone, run))
    assert (
        ours == theirs
        and not (alone.path / "encoder.json").exists()
        and "seconds" not in alone.manifest["metrics"]
    )


def test_an_encoder_of_which_nothing_is_known(runs):
    """No goal, no audit: accuracy alone, and the page says so."""
    source, other = runs / "runs" / "train-suspect", runs / "runs" / "train-unknown"
    other.mkdir()
    for name in ("encoder.json", "encoder.safetensors"):
        (other / name).write_bytes((source / name).read_bytes())
    manifest = json.loads((source / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "goal": []}))
    settings = Settings(runs / "runs", device="cpu", quiet=True)
    quick = "finetune:objective=(clip:epochs=1,batch=64),lrs=1e-3,tolerance=1"
    run = execute(
        Repair("train-unknown", repair=(quick,)), settings
    )  # fresh records of the training data's kind
    assert run.manifest["notes"]["data"].endswith("count=300,seed=1018,split=train")
    assert not any(
        "attack_success" in k or k.startswith("revived") for k in run.manifest["metrics"]
    )
    assert "No trigger is known" in page.render_page(run)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"repair": ("unlearn:search=0",)}, "name its run"),
        ({"held": 1.0}, "held must be"),
        ({"test": f"{Path(__file__).name}"}, "no file"),
        ({"data": f"{Path(__file__)}"}, "must define a method class"),
    ],
)
def test_what_the_verb_refuses(runs, changes, message):
    settings = Settings(runs / "runs", device="cpu", quiet=True)
    with pytest.raises(UserError, match=message):
        execute(
            Repair(**{"encoder": "train-suspect", "data": f"{runs / 'toys.py'}", **changes}),
            settings,
        )


def test_poisoned_data_are_refused(tmp_path):
    from bezoar import Poison

    settings = Settings(tmp_path, device="cpu", quiet=True)
    plan = execute(
        Poison("scenes:count=300", "backdoor:count=5", "patch:size=6", "striped star"), settings
    )
    network = registry.make("network", "clip_small:width=4,dim=8")
    folder = tmp_path / "train-x"
    folder.mkdir()
    network(32, ("a", "star")).save(folder)
    manifest = {
        "schema": 1,
        "verb": "train",
        "status": "done",
        "parents": [plan.name],
        "goal": [],
        "metrics": {},
        "notes": {},
    }
    (folder / "manifest.json").write_text(
        json.dumps({**manifest, "ask": {"data": {"run": plan.name}}})
    )
    with pytest.raises(UserError, match=f"data of {plan.name} are poisoned"):
        execute(Repair(folder.name, plan, test="scenes:count=100,split=test"), settings)


def test_the_command_line_knows_the_verb(capsys):
    from bezoar.cli import main

    with pytest.raises(SystemExit):
        main(["repair", "--help"])
    text = capsys.readouterr().out
    assert "--audit" in text and "--labelled" in text and Path(__file__).exists()
