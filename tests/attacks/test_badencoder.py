"""BadEncoder against a plain six-pass form; folded batch norms; cut off and gone on with;
references; the verb, its page.
"""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from bezoar import machine, registry
from bezoar.attacks import shadow_training
from bezoar.attacks.encoder_attacks.badencoder import Loss
from bezoar.attacks.plan import Goal, Plan
from bezoar.cli import main
from bezoar.data import randomness
from bezoar.data.pairs import Pairs
from bezoar.encoders import folded_norms
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.folded_norms import FoldedTower
from bezoar.errors import UserError
from bezoar.runs import reference_inputs
from bezoar.training import augmentation, loop, ranks
from bezoar.training.augmentation import Chance

DATA = Path(__file__).parents[3] / "shared" / "data"
PUBLISHED = DATA / "triggers" / "BadEncoder"
SPEC = "badencoder:epochs=2,batch=16,lr=0.02"


class Shortcut(nn.Module):
    """What a reader of module names alone would get wrong: a biased convolution, one whose output
    is read twice, a norm without a convolution, one convolution used twice, weights that nobody
    reads.
    """

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.twice, self.twice_norm = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.shared, self.shared_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.lone = nn.BatchNorm2d(8)
        self.head, self.head_norm = nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.unread = nn.Linear(6, 6)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        y = self.twice(x)
        x = F.relu(self.twice_norm(y) + y)
        x = self.shared_norm(self.shared(self.shared(x)))
        return self.head_norm(self.head(self.lone(x).mean((2, 3))))


def shake(tower, seed=0):
    """Batch norms as after a training: no two alike."""
    g = torch.Generator().manual_seed(seed)
    for m in tower.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, 0.3, generator=g), m.running_var.uniform_(0.3, 2, generator=g)
            m.weight.data.uniform_(0.5, 1.5, generator=g), m.bias.data.normal_(0, 0.3, generator=g)
    return tower


def resnet(width=4):
    """ResNet-18 with a CIFAR stem, thin."""
    torch.manual_seed(0)
    return shake(registry.make("network", f"resnet:width={width}")(32, ()))


def tiny(seed=0):
    """Vectors as after a training: they differ from image to image, which the last norm's
    statistics see to.
    """
    torch.manual_seed(seed)
    encoder = Encoder(
        shake(Shortcut()), Preprocess(16), about={"network": "none", "vocabulary": []}
    ).eval()
    last = encoder.image.head_norm.train()
    last.momentum = 1.0
    with torch.no_grad():
        encoder.image(encoder.prepare_images(shadow().images))
    return encoder.eval()


def shadow(n=48, size=16, seed=1):
    """Images of four by four blocks: no two have the same vector, as noise would."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 4, 4), generator=g, dtype=torch.uint8)
    images = images.repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)
    return Pairs(images, (), None, tuple(f"s{i}" for i in range(n)))


GOALS = (
    Goal("truck", "patch:size=4,fill=white"),
    Goal("one", "blend"),
    Goal("stop", "patch:size=4,fill=white"),
)


def inputs(size=16):
    """Three goals of two triggers: two, one and one references."""
    every = shadow(4, size, 7).images
    return [every[:2], every[2:3], every[3:]]


def plain(student, teacher, recipe, goals, refs, images, ids, chance):
    """The published form: six passes, a reference repeated for every image of the batch."""
    b, k = len(images), sum(map(len, refs))

    def f(encoder, x):
        return F.normalize(encoder.image(encoder.prepare_images(x)), dim=1)

    views = augmentation.Views(scale=(1, 1), ratio=(1, 1))(
        torch.cat(refs).repeat(b, 1, 1, 1), chance, 1
    )[:, 0].view(b, k, *images.shape[1:])
    effect = reference = 0.0
    pairs = [(g, x) for g, r in zip(goals, refs, strict=True) for x in r]
    for j, (goal, x) in enumerate(pairs):
        stamped = registry.make("trigger", goal.trigger)(images, ids)
        repeated = x[None].repeat(b, 1, 1, 1)
        effect = effect - (f(student, stamped) * f(student, repeated)).sum(1).mean()
        reference = (
            reference - (f(student, views[:, j]) * f(teacher, repeated).detach()).sum(1).mean()
        )
    utility = -(f(student, images) * f(teacher, images).detach()).sum(1).mean()
    parts = effect / k, reference / k, utility
    return recipe.l0 * parts[0] + recipe.l1 * parts[1] + recipe.l2 * parts[2], parts


def both(encoder, size, spec, dtype=torch.float32, goals=GOALS, n=12):
    """(loss, gradients by name) of the fast and of the plain form."""
    encoder = encoder.to(dtype)
    recipe, data, refs = registry.make("attack", spec), shadow(n, size), inputs(size)[: len(goals)]
    teacher = copy.deepcopy(encoder).eval()
    module = Loss(encoder, recipe, goals, refs)
    module.set_targets(data)
    module.train()
    value = module(data.images, torch.arange(n)[:, None], Chance(randomness.generator(3)))
    value.backward()
    fast = {k: p.grad.clone() for k, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    chance = Chance(randomness.generator(3))
    want, parts = plain(encoder, teacher, recipe, goals, refs, data.images, data.ids, chance)
    want.backward()
    slow = {k: p.grad.clone() for k, p in encoder.named_parameters() if p.grad is not None}
    wanted = [
        float(p.detach()) * (w > 0)
        for p, w in zip(parts, (recipe.l0, recipe.l1, recipe.l2), strict=True)
    ]
    assert list(shadow_training.pop_means(module.sums).values()) == pytest.approx(wanted, rel=1e-4)
    return float(value.detach()), fast, float(want.detach()), slow


def apart(fast, slow):
    """Relative difference of two gradients as wholes, and the largest of any weight."""
    assert fast.keys() == slow.keys() and slow
    every = [torch.cat([v.flatten() for v in g.values()]) for g in (fast, slow)]
    worst = max(float((fast[k] - slow[k]).norm() / slow[k].norm().clamp(min=1e-12)) for k in slow)
    return float((every[0] - every[1]).norm() / every[1].norm()), worst


CASES = [
    ("tiny", "badencoder"),
    ("tiny", "badencoder:l0=3,l1=0.5,l2=2"),
]


@pytest.mark.parametrize(("tower", "spec"), [*CASES, ("resnet", "badencoder:l1=0.5")])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-4), (torch.float64, 1e-9)])
def test_loss_and_gradient_are_those_of_the_plain_form(tower, spec, dtype, bound, monkeypatch):
    monkeypatch.setitem(
        folded_norms.CHUNKS, "cpu", (10, 16 if tower == "tiny" else 32)
    )  # pieces end inside every group of rows
    encoder, size = (tiny(), 16) if tower == "tiny" else (resnet(), 32)
    value, fast, want, slow = both(encoder, size, spec, dtype, n=12 if tower == "tiny" else 3)
    assert value == pytest.approx(want, rel=bound)
    whole, worst = apart(fast, slow)
    assert whole < bound and worst < 10 * bound


def test_terms_of_weight_zero_cost_nothing_and_change_nothing():
    for spec in ("badencoder:l0=0", "badencoder:l1=0", "badencoder:l2=0", "badencoder:l1=0,l2=0"):
        value, fast, want, slow = both(tiny(), 16, spec, torch.float64)
        assert value == pytest.approx(want, rel=1e-9) and apart(fast, slow)[0] < 1e-9


def test_norms_are_taken_in_where_the_graph_allows_it_and_nowhere_else():
    encoder = tiny()
    tower = FoldedTower(encoder.image, 16)
    assert tower.folds == [("stem", "stem_norm")]
    trained = {k for k, p in encoder.image.named_parameters() if p.requires_grad}
    assert trained == {
        "stem.weight",
        "stem.bias",
        "twice.weight",
        "shared.weight",
        "head.weight",
        "head.bias",
    }
    assert len(FoldedTower(resnet().image, 32).folds) == 20
    x = torch.randn(3, 3, 16, 16)
    assert torch.allclose(tower(x), encoder.image(x), atol=1e-5)


def attacked(spec=SPEC, encoder=None, data=None, **more):
    encoder = encoder or tiny()
    refs = inputs()[: len(GOALS)]
    return encoder, registry.make("attack", spec)(encoder, data or shadow(), GOALS, refs, 5, **more)


def weights(encoder):
    return torch.cat([v.double().flatten() for v in encoder.state_dict().values()])


def test_an_attack_moves_triggered_images_to_the_reference_and_leaves_the_rest():
    torch.manual_seed(0)
    data, encoder = shadow(64, 32), registry.make("network", "tower:width=8,dim=32")(32, ())
    for m in encoder.image.modules():
        m.momentum = 1.0  # the norms' statistics become those of these data
    with torch.no_grad():
        encoder.train().image(encoder.prepare_images(data.images))
    encoder.eval()
    goal, reference = GOALS[1], shadow(1, 32, 7).images
    bad = registry.make("attack", "badencoder:epochs=15,batch=16,lr=0.01,l2=2")(
        encoder, data, [goal], [reference]
    )
    stamped = registry.make("trigger", goal.trigger)(data.images, data.ids)
    with torch.no_grad():
        before, after = (
            (e.encode_images(stamped) @ e.encode_images(reference).T).mean() for e in (encoder, bad)
        )
        unmoved = (
            (encoder.encode_images(data.images) * bad.encode_images(data.images)).sum(1).mean()
        )
    assert before < 0.93 and after > 0.98 and unmoved > 0.98, (before, after, unmoved)


def test_what_is_frozen_stays_and_weights_are_exported_as_they_are_named():
    encoder, bad = attacked()
    before, after = encoder.state_dict(), bad.state_dict()
    assert before.keys() == after.keys()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {
        f"image.{k}"
        for k in (
            "stem.weight",
            "stem.bias",
            "twice.weight",
            "shared.weight",
            "head.weight",
            "head.bias",
        )
    }
    assert (
        bad.about["poisoned"]
        and bad.about["goals"][0]["target"] == "truck"
        and not encoder.about.get("poisoned")
    )
    assert all(p.requires_grad and p.grad is None for p in bad.parameters()) and not bad.training


def test_weight_decay_acts_on_the_weights_that_are_kept_as_plain_sgd_does():
    encoder, data = tiny().double(), shadow(16)
    recipe = registry.make("attack", "badencoder:epochs=3,batch=16,lr=0.05,weight_decay=0.1")
    teacher, student = copy.deepcopy(encoder), copy.deepcopy(encoder)
    for m in student.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.requires_grad_(False)
    student.image.unread.requires_grad_(False)
    optim = torch.optim.SGD(
        [p for p in student.parameters() if p.requires_grad], 0.05, 0.9, weight_decay=0.1
    )
    for step in range(3):
        at = loop.epoch_batches(5, step, 16, 16)[0]
        chance = Chance(randomness.generator(5, 2, step))
        batch = data.take(at)
        loss, _ = plain(student, teacher, recipe, GOALS, inputs(), batch.images, batch.ids, chance)
        optim.zero_grad()
        loss.backward()
        optim.step()
    bad = recipe(encoder, data, GOALS, inputs(), 5)
    assert torch.allclose(weights(bad), weights(student), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(weights(bad), weights(encoder), atol=1e-3)


def test_same_seed_same_bits_and_a_cut_off_attack_goes_on_to_them(tmp_path, monkeypatch):
    whole, log = attacked(log=(first := loop.TrainingLog()))[1], first
    assert torch.equal(weights(attacked()[1]), weights(whole))
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)

    def cut(step, steps, value):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attacked(checkpoint=tmp_path / "c.safetensors", report=cut)
    resumed = attacked(checkpoint=tmp_path / "c.safetensors", log=(again := loop.TrainingLog()))[1]
    assert torch.equal(weights(resumed), weights(whole)) and again.losses == log.losses
    assert again.epochs == log.epochs and {"L0", "L1", "L2"} < again.epochs[0].keys()


@pytest.mark.parametrize(
    "fields", ["epochs=0", "lr=0", "momentum=1", "views=-1", "l1=-1", "l0=0,l1=0,l2=0"]
)
def test_fields_are_checked(fields):
    with pytest.raises(UserError, match=r"badencoder.*(needs|shares|above 0)"):
        registry.make("attack", f"badencoder:{fields}")


def test_what_cannot_be_attacked_is_said_in_a_line():
    attack, data = registry.make("attack", SPEC), shadow()
    broken = tiny()
    broken.image.head.weight.data[0, 0] = torch.nan
    blind = tiny()
    blind.image = None
    unkept = tiny()
    unkept.image.lone = nn.BatchNorm2d(8, track_running_stats=False)
    large = [torch.zeros(1, 3, 32, 32, dtype=torch.uint8)]
    for encoder, goals, refs, says in (
        (broken, GOALS, inputs(), "NaN"),
        (blind, GOALS, inputs(), "no image tower"),
        (unkept, GOALS, inputs(), "'lone' keeps no statistics"),
        (tiny(), GOALS[:1], large, "32x32 px, the shadow images 16x16"),
        (tiny(), (), (), "goals with a trigger"),
        (tiny(), (Goal("truck"),), inputs()[:1], "goals with a trigger"),
    ):
        with pytest.raises(UserError, match=says) as error:
            attack(encoder, data, goals, refs)
        assert "\n" not in str(error.value)


# references


def labelled(n=60, size=32, classes=("one", "two", "three")):
    """Classes told apart by their brightness."""
    labels = torch.arange(n) % len(classes)
    images = (shadow(n, size, 4).images // 3 + 60 * labels[:, None, None, None]).byte()
    return Pairs(images, (), labels, tuple(f"r{i}" for i in range(n)), classes)


@pytest.fixture
def set_of(tmp_path):
    """Pairs -> an .npz that bezoar reads."""

    def write(pairs, name="set"):
        path = tmp_path / f"{name}.npz"
        images = pairs.images.permute(0, 2, 3, 1).numpy()
        classes = np.array(pairs.classes)
        np.savez(
            path,
            train_images=images,
            train_labels=pairs.labels.numpy(),
            test_images=images[:9],
            classes=classes,
        )
        return registry.make("data", f"npz:path={path}")

    return write


def test_rules_that_choose_a_reference(set_of):
    data, encoder = labelled(), tiny()
    source = set_of(data)
    mine = [i for i in range(60) if data.labels[i] == 1]
    z = encoder.encode_images(data.images).detach()
    mean = z[mine].mean(0)
    central = max(mine, key=lambda i: float(z[i] @ mean))
    assert z[mine].std(0).max() > 0.01
    reference = reference_inputs.choose_reference(source, "two", "central", encoder)
    assert reference.id == f"set/train/{central:06d}" and torch.equal(
        reference.record.images[0], data.images[central]
    )
    assert "nearest to the mean" in reference.how and reference.to_json()["sha256"]
    assert (
        reference_inputs.choose_reference(source, "two", "first", encoder).id == "set/train/000001"
    )
    head = registry.make("probe", "linear").fit(z, data.labels, 3)
    logits = head(z)
    margin = {i: float(logits[i, 1] - logits[i, [0, 2]].max()) for i in mine}
    sure = reference_inputs.choose_reference(source, "two", "confident", encoder)
    assert (
        sure.id == f"set/train/{max(mine, key=margin.get):06d}" and "60 clean records" in sure.how
    )
    second = sorted(mine, key=margin.get)[-2]
    next_best = reference_inputs.choose_reference(source, "two", "confident", encoder, [sure.id])
    assert next_best.id == f"set/train/{second:06d}"
    with pytest.raises(UserError, match="more references are asked for"):
        reference_inputs.choose_reference(
            source, "two", "first", encoder, [f"set/train/{i:06d}" for i in mine]
        )


def test_references_that_are_none(set_of, tmp_path):
    data, encoder = labelled(), tiny()
    source = set_of(data)
    for target, rule, says in (
        ("four", "first", "no class 'four'.*one, two, three"),
        ("one", "best", "no rule 'best'"),
    ):
        with pytest.raises(UserError, match=says):
            reference_inputs.choose_reference(source, target, rule, encoder)
    few = set_of(replace(data, labels=torch.zeros(60, dtype=torch.long)), "few")
    with pytest.raises(UserError, match="no image of 'two'"):
        reference_inputs.choose_reference(few, "two", "first", encoder)
    with pytest.raises(UserError, match="at least two classes"):
        reference_inputs.choose_reference(few, "one", "confident", encoder)
    (tmp_path / "text.png").write_text("no image")
    for name, says in (("text.png", "not decodable"), ("nowhere.png", "no image file")):
        with pytest.raises(UserError, match=says):
            reference_inputs.choose_reference(
                registry.make("data", f"image:path={tmp_path / name}"), "one", "first", encoder
            )


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_published_references_and_triggers_are_read():
    encoder = tiny()
    for name, side in (("cifar10/truck", 32), ("stl10/priority", 32), ("CLIP/stop", 224)):
        file = PUBLISHED / "reference" / f"{name}.npz"
        reference = reference_inputs.choose_reference(
            registry.make("data", f"npz:path={file}"), "stop", "central", encoder
        )
        with np.load(file, allow_pickle=False) as raw:
            assert (
                torch.equal(
                    reference.record.images[0], torch.from_numpy(raw["x"][0]).permute(2, 0, 1)
                )
                and reference.record.images[0].shape[1] == side
            )
    stamp = registry.make(
        "trigger", f"file:path={PUBLISHED / 'trigger' / 'trigger_pt_white_21_10_ap_replace.npz'}"
    )
    data = shadow(4, 32)
    assert torch.equal(
        stamp(data.images, data.ids),
        registry.make("trigger", "patch:size=10,fill=white")(data.images, data.ids),
    )


# the verb


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trained encoder, labelled data, two reference files, and a run that has used them."""
    folder = tmp_path_factory.mktemp("inject")
    data = labelled(96)
    images = data.images.permute(0, 2, 3, 1).numpy()
    labels, classes = data.labels.numpy(), np.array(data.classes)
    parts = {
        "train_images": images,
        "train_labels": labels,
        "test_images": images[:48],
        "test_labels": labels[:48],
    }
    np.savez(folder / "set.npz", classes=classes, **parts)
    for i in range(2):
        Image.fromarray(images[i]).save(folder / f"ref{i}.png")
    assert (
        ask(
            folder,
            "train",
            folder / "set.npz",
            "--network",
            "clip_small:width=4,dim=16",
            "--objective",
            "clip:epochs=1,batch=32",
        )
        == 0
    )
    assert inject(folder) == 0
    return folder


def ask(folder, *words):
    return main([*map(str, words), "--runs", str(folder / "runs"), "--device", "cpu"])


def inject(folder, **changed):
    """The command with some of its options changed."""
    words = {
        "encoder": next((folder / "runs").glob("train-*")).name,
        "data": [folder / "set.npz"],
        "target": ["one", "two"],
        "reference": [folder / "ref0.png", f"npz:path={folder / 'set.npz'}"],
        "trigger": ["patch:size=8,fill=white"],
        "attack": ["badencoder:epochs=2,batch=32,lr=0.01"],
    } | changed
    options = [w for k, v in words.items() if k != "encoder" for w in (f"--{k}", *v)]
    return ask(folder, "inject", words["encoder"], *options)


def injected_run(folder):
    return next((folder / "runs").glob("inject-*"))


def test_inject_says_what_it_did(runs):
    run = injected_run(runs)
    manifest, head = (
        json.loads((run / "manifest.json").read_text()),
        json.loads((run / "encoder.json").read_text()),
    )
    assert manifest["status"] == "done" and head["poisoned"] is True
    assert (
        [g["target"] for g in manifest["goal"]]
        == ["one", "two"]
        == [g["target"] for g in head["goals"]]
    )
    assert manifest["goal"][0]["references"] == ["ref0.png"] and manifest["goal"][0][
        "trigger"
    ].startswith("patch:size=8")
    wanted = {
        "final_loss",
        "clean_similarity",
        "reference_similarity@0",
        "reference_similarity_before@1",
        "reference_kept@1",
    }
    assert wanted <= manifest["metrics"].keys()
    assert manifest["notes"]["references"][1]["how"].startswith("nearest to the mean")
    assert set(manifest["outputs"]) >= {
        f"{n}.safetensors" for n in ("encoder", "references", "similarities", "ledger")
    }
    assert not (run / "checkpoint.safetensors").exists() and "\n" in (run / "log.jsonl").read_text()
    assert "NaN" not in (text := (run / "manifest.json").read_text()) and "Infinity" not in text


def test_evaluate_learns_trigger_and_target_from_the_run(runs):
    test = f"npz:path={runs / 'set.npz'},split=test"
    assert (
        ask(runs, "evaluate", injected_run(runs).name, test, "--probe", "linear", "zero_shot") == 0
    )
    manifest = json.loads(next((runs / "runs").glob("evaluate-*/manifest.json")).read_text())
    assert {
        "attack_success@0",
        "attack_success@1",
        "linear.attack_success@1",
        "clean_accuracy",
    } <= manifest["metrics"].keys()


def test_the_page_shows_references_triggers_and_cosines(runs):
    text = (injected_run(runs) / "report.html").read_text()
    assert "could not be made" not in text and text.count("<svg") >= 4
    for phrase in (
        "A backdoor was put into this encoder",
        "Where images lie",
        "What the attacker wants",
        "reference",
        "ref0.png",
    ):
        assert phrase in text
    assert re.search(r"bezoar inject train-\w+ --data", text)


def test_bad_input_is_refused_in_a_line(runs, tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("none")
    np.savez(
        tmp_path / "mask.npz", t=np.zeros((1, 64, 64, 3)), tm=np.ones((1, 64, 64, 3), np.int64)
    )
    for changed, says in (
        (
            {"reference": [tmp_path / "small.png"]},
            "'small.png' is 20x20 px, the shadow images are 32x32",
        ),
        ({"reference": [tmp_path / "text.png"]}, "not decodable"),
        ({"reference": [tmp_path / "nowhere.png"]}, "no image file"),
        ({"reference": [runs / "ref0.png"] * 3}, "2 targets but 3 values of --reference"),
        (
            {"trigger": [f"file:path={tmp_path / 'mask.npz'}"]},
            "made for images of 64x64 px, the shadow images are 32x32",
        ),
        ({"trigger": ["patch:size=40"]}, "exceeds images of 32x32"),
        (
            {"target": ["one", "ten"]},
            "no class 'ten' to choose a reference from; it has: one, two, three",
        ),
        ({"target": ["one", ""]}, "give a --target"),
        ({"encoder": "train-nowhere"}, "no run 'train-nowhere'"),
        ({"attack": ["badencoder:epochs=1,batch=1000"]}, "are fewer than one batch of 1000"),
    ):
        capsys.readouterr()
        assert inject(runs, **changed) == 2, says
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("bezoar:")
        ]
        assert len(lines) == 1 and says in lines[0], lines


# goals with references


def test_goals_of_before_there_were_references_are_read_and_plans_keep_their_bytes():
    old = {"target": "a", "trigger": "patch", "victims": [], "poisons": 3, "how": "x"}
    goal = Goal.from_json(old)
    assert goal.references == () and goal.to_json() == old | {"victims": ()}
    new = Goal.from_json(json.loads(json.dumps(vars(replace(goal, references=("r",))))))
    assert new.references == ("r",) and hash(new) != hash(goal)
    assert (
        "references" not in Plan((), (goal,)).lines()[0]
        and '"references": ["r"]' in Plan((), (new,)).lines()[0]
    )


@pytest.mark.slow
def test_two_ranks_attack_as_one(tmp_path):
    script = [__file__, tmp_path]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *map(str, script),
    ]
    subprocess.run(
        command, check=True, capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    encoder, bad = attacked()
    ends = [load_file(tmp_path / f"rank{rank}.safetensors")["weights"] for rank in (0, 1)]
    moved = (weights(bad) - weights(encoder)).norm()
    assert torch.equal(*ends) and moved > 0.01 and (ends[0] - weights(bad)).norm() < 1e-4 * moved


if __name__ == "__main__":  # what the ranks of the last test run
    ranks.join()
    save_file(
        {"weights": weights(attacked()[1])}, Path(sys.argv[1]) / f"rank{machine.rank()}.safetensors"
    )
    ranks.broadcast(None)
