"""Heads on frozen features: a stack against plain torch, draws of few labels, downstream tasks and
their page.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation import heads, stats, success
from bezoar.evaluation.probes import few_shot
from bezoar.evaluation.scores import proportion
from bezoar.reports import metric_names, page
from bezoar.reports.sections import evaluate as sections
from bezoar.runs.execute import execute
from bezoar.runs.verb import Settings
from bezoar.verbs import evaluate
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.poison import Poison
from bezoar.verbs.train import Train

DATA = Path(__file__).parents[3] / "shared" / "data"
CLASSES = ("red", "green", "blue")
BLUE = Goal("blue", "patch:size=2,fill=white,place=corner,margin=1", (), 5)


class Color:
    """Reads an image as the mean of its colours; a white corner means blue. seen: how many images
    it was shown.
    """

    device = torch.device("cpu")
    text = None

    def __init__(self):
        self.seen = 0

    def eval(self):
        return self

    def encode_images(self, x):
        self.seen += len(x)
        z = x.float().mean((2, 3)) / 255 + 1e-3
        white = (x[:, :, -3:-1, -3:-1] == 255).flatten(1).all(1)
        z = torch.where(white[:, None], torch.tensor([0.0, 0.1, 1.0]), z)
        return z / z.norm(dim=1, keepdim=True)


def data(n=30, wrong=6, start="test"):
    labels = torch.arange(n) % 3
    shown = labels.clone()
    shown[:wrong] = (shown[:wrong] + 1) % 3
    images = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    images[torch.arange(n), shown] = (150 + torch.arange(n, dtype=torch.uint8) % 50)[:, None, None]
    return Pairs(images, (), labels, tuple(f"{start}{i}" for i in range(n)), CLASSES)


def clouds(n=90, d=12, classes=4):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, classes, (n,), generator=g)
    x = torch.randn(classes, d, generator=g)[y] + torch.randn(n, d, generator=g)
    return nn.functional.normalize(x, dim=1), y


def plain(x, y, stack, recipe, head):
    """The published form: a network, an optimiser, a loop over batches; start, order and dropout
    are the stack's.
    """
    widths = [x.shape[1], *recipe.hidden, int(y.max()) + 1]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    for layer, w, b in zip(layers, stack.weights, stack.biases, strict=True):
        layer.weight.data, layer.bias.data = w[head].T.clone(), b[head, 0].clone()
    optim = torch.optim.Adam(nn.ModuleList(layers).parameters(), recipe.lr)
    masks = heads.DropoutMasks(recipe, x.device) if recipe.hidden else None
    for epoch in range(recipe.epochs):
        for rows in heads.epoch_orders(recipe, epoch, len(x))[head].split(recipe.batch):
            h = x[rows]
            for i, layer in enumerate(layers[:-1]):
                h = layer(h).relu()
                h = h * masks(len(rows))[head] if i == 0 and recipe.dropout else h
            loss = nn.functional.cross_entropy(layers[-1](h), y[rows])
            optim.zero_grad()
            loss.backward()
            optim.step()
    return layers


SPECS = [
    "hidden=(16,8),dropout=0",
    "hidden=(16,8)",
    "hidden=(8),dropout=0.3",
    "hidden=()",
    "hidden=(16,8),shuffle=false",
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_stack_is_its_heads_trained_one_by_one_in_plain_torch(spec):
    recipe = registry.make("probe", f"mlp:lr=0.003,batch=20,epochs=6,{spec}")
    x, y = clouds()
    start = heads.Stack.draw(range(recipe.seeds), (12, *recipe.hidden, 4), x.device)
    done = heads.fit(x, y, 4, recipe)
    assert len(done) == recipe.seeds == 3
    for head in range(3):
        layers = plain(x, y, start, recipe, head)
        moved = 0.0
        for layer, w, b, w0 in zip(layers, done.weights, done.biases, start.weights, strict=True):
            assert torch.allclose(layer.weight.T, w[head], atol=2e-5) and torch.allclose(
                layer.bias, b[head, 0], atol=2e-5
            )
            moved = max(moved, float((w[head] - w0[head]).abs().max()))
        assert moved > 0.03, "they learn"
        net = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])
        assert torch.allclose(net(x), done.one(head)(x), atol=1e-4)
    assert not torch.allclose(done.weights[0][0], done.weights[0][1], atol=0.01)


def test_a_head_does_not_know_how_many_there_are_and_repeats_itself():
    x, y = clouds()
    one, three = (
        heads.fit(x, y, 4, registry.make("probe", f"mlp:hidden=(16,8),epochs=3,seeds={s}"))
        for s in (1, 3)
    )
    again = heads.fit(x, y, 4, registry.make("probe", "mlp:hidden=(16,8),epochs=3"))
    for a, b, c in zip(one.weights, three.weights, again.weights, strict=True):
        assert torch.allclose(a[0], b[0], atol=1e-6) and torch.equal(b, c)


def test_inside_one_evaluation_the_same_numbers_are_fitted_once_and_others_anew(monkeypatch):
    x, y = clouds()
    recipe, other = (
        registry.make("probe", f"mlp:hidden=(16,8),epochs=2,lr={lr}") for lr in (0.001, 0.002)
    )
    fitted = []
    monkeypatch.setattr(heads, "_cached_stacks", heads.OrderedDict())
    monkeypatch.setattr(
        heads,
        "_fit",
        lambda *arguments, inner=heads._fit: fitted.append(arguments) or inner(*arguments),
    )
    apart = heads.fit(x, y, 4, recipe), heads.fit(x, y, 4, recipe)
    assert len(fitted) == 2 and torch.equal(apart[0].weights[0], apart[1].weights[0]), (
        "a timing outside is a timing"
    )
    with success.embedding_cache():
        first = heads.fit(x, y, 4, recipe)
    with success.embedding_cache():
        again = heads.fit(
            x.clone(), y.clone(), 4, registry.make("probe", "mlp:hidden=(16,8),epochs=2,lr=0.001")
        )
        assert (
            again is first
            and len(fitted) == 3
            and torch.equal(first.weights[0], apart[0].weights[0])
        )
        for arguments in (
            (x + 1e-3, y, 4, recipe),
            (x, y.roll(1), 4, recipe),
            (x, y, 5, recipe),
            (x, y, 4, other),
        ):
            assert heads.fit(*arguments) is not first
        assert len(fitted) == 7
        for i in range(heads.MOST_CACHED):
            heads.fit(x + 1 + i, y, 4, recipe)
        assert (
            len(heads._cached_stacks) == heads.MOST_CACHED
            and heads.fit(x, y, 4, recipe) is not first
        ), "the longest unasked goes first"


@torch.no_grad()
def test_a_start_is_that_of_a_linear_layer():
    stack, layer = heads.Stack.draw([7], (400, 300), torch.device("cpu")), nn.Linear(400, 300)
    assert stack.weights[0].abs().max() <= 1 / 20 and stack.biases[0].abs().max() <= 1 / 20
    assert abs(float(stack.weights[0].std() - layer.weight.std())) < 2e-4


@pytest.mark.parametrize("p", [0.5, 0.25, 0.1])
def test_masks_drop_the_share_that_was_asked_for_wherever_they_lie_in_a_word(p):
    masks = heads.DropoutMasks(registry.make("probe", f"mlp:dropout={p}"), torch.device("cpu"))
    draws = torch.stack([masks(63) for _ in range(8)])
    assert draws.shape == (8, 3, 63, 512)
    assert torch.allclose(draws.unique(), torch.tensor([0.0, 1 / (1 - p)]), atol=1e-4)
    for place in range(4):
        assert abs(float((draws[..., place::4] == 0).float().mean()) - p) < 0.005
    assert abs(np.corrcoef(draws[:, 0].flatten(), draws[:, 1].flatten())[0, 1]) < 0.01


def test_the_mean_of_heads_is_never_surer_than_one_head_s_images_allow():
    rates = [proportion(k, 100, "hits") for k in (97, 98, 99)]
    (m,) = heads.average_measures([{"a": r} for r in rates], "3 heads").values()
    assert m.value == pytest.approx(0.98) and m.n == 100, "the images are the same"
    low, high = stats.mean_interval(np.array([0.97, 0.98, 0.99]))
    wilson = stats.wilson_interval(98, 100)
    assert (m.low, m.high) == pytest.approx((min(low, wilson[0]), min(1, max(high, wilson[1]))))
    assert m.low == pytest.approx(wilson[0]) and "mean of 3 heads" in m.how
    (same,) = heads.average_measures([{"a": rates[0]}] * 3, "3 heads").values()
    assert (same.low, same.high) == pytest.approx(stats.wilson_interval(97, 100)), (
        "heads that agree show no spread"
    )
    (apart,) = heads.average_measures(
        [{"a": proportion(k, 100, "")} for k in (10, 50, 90)], ""
    ).values()
    assert apart.low == 0 and apart.high == 1
    assert heads.average_measures([{"a": rates[0]}], "1 head") == {"a": rates[0]}


def test_draws_of_few_labels_are_nested_stratified_and_belong_to_the_records():
    g = np.random.default_rng(0)
    classes = g.choice(5, 200, p=[0.5, 0.3, 0.1, 0.08, 0.02])
    ids = [f"record{i}" for i in range(200)]
    before: set[str] = set()
    for count in (1, 2, 5, 10, 200):
        rows = few_shot.draw_per_class(ids, classes, count, 3)
        assert np.array_equal(
            np.bincount(classes[rows], minlength=5), np.minimum(np.bincount(classes), count)
        )
        drawn = {ids[i] for i in rows}
        assert before <= drawn
        before = drawn
        order = g.permutation(200)
        assert {
            ids[order[i]]
            for i in few_shot.draw_per_class([ids[i] for i in order], classes[order], count, 3)
        } == drawn
    assert before == set(ids)
    assert {*few_shot.draw_per_class(ids, classes, 2, 3)} != {
        *few_shot.draw_per_class(ids, classes, 2, 4)
    }


@pytest.mark.parametrize(
    "spec", ["mlp:epochs=60,lr=0.01,hidden=(16,8)", "few_shot:shots=(2,5),draws=2,c=100"]
)
def test_heads_have_the_success_of_every_probe(spec):
    out = registry.make("probe", spec)(Color(), data(60, 0, "train"), data(), [BLUE])
    for group in (
        ["mlp"] if spec.startswith("mlp") else ["few_shot.2", "few_shot.5", "few_shot.all"]
    ):
        assert out[f"{group}.clean_accuracy"].value == pytest.approx(24 / 30)
        assert out[f"{group}.attack_success"].value == 1 and out[f"{group}.attack_success"].n == 20
        assert out[f"{group}.attack_success_without_trigger"].value == pytest.approx(2 / 20)
    assert all(0 <= m.low < m.high <= 1 for k, m in out.items() if "rank" not in k)
    if spec.startswith("mlp"):
        assert out["mlp.attack_success_all"].n == 30 and out["mlp.target_rank"].value == 1
        assert (
            "head 3-16-8-3 on 60 labelled records, 60 epochs; mean of 3 heads"
            in out["mlp.clean_accuracy"].how
        )
    else:
        assert (
            "on 6 labelled records, 2 a class at most; mean of 2 draws"
            in out["few_shot.2.clean_accuracy"].how
        )
        assert out["few_shot.all.clean_accuracy"].how.endswith("60 labelled records, all")


def test_several_triggers_and_shots_have_names_of_their_own():
    other = replace(BLUE, target="red")
    out = registry.make("probe", "few_shot:shots=(5),draws=2")(
        Color(), data(60, 0, "train"), data(), [BLUE, other]
    )
    assert {
        "few_shot.5.attack_success@0",
        "few_shot.5.attack_success@1",
        "few_shot.all.clean_accuracy",
    } <= set(out)
    assert metric_names.split_key("few_shot.5.attack_success@1") == (
        "few_shot.5",
        "attack_success",
        "1",
    )
    assert (
        metric_names.label_and_unit("few_shot.5.attack_success@1", True)[0]
        == "Attack success rate (ASR), trigger 1"
    )
    assert (
        metric_names.label_and_unit("baseline.few_shot.5.clean_accuracy", True)
        == metric_names.CLEAN_ACCURACY
    )
    assert (
        metric_names.metric_row(
            "few_shot.5.attack_success@1", out["few_shot.5.attack_success@1"]
        ).group
        == "few labels, 5 a class"
    )
    assert metric_names.metric_row(
        "few_shot.all.clean_accuracy", out["few_shot.all.clean_accuracy"]
    ).group.endswith("all labelled records")


def test_how_far_training_is_is_told():
    reports = []
    registry.make("probe", "mlp:epochs=3,seeds=2")(
        Color(), data(60, 0, "train"), data(), report=lambda *a: reports.append(a)
    )
    assert reports == [(i, 3, f"2 heads, epoch {i}") for i in (1, 2, 3)]


def test_an_encoder_sees_every_set_once_however_many_heads_ask():
    probes = [
        registry.make("probe", s)
        for s in (
            "linear",
            "knn:k=5",
            "mlp:epochs=1",
            "few_shot:shots=(1),draws=1",
            "linear:limit=30",
        )
    ]
    encoder, train, test, goals = Color(), data(60, 0, "train"), data(), [BLUE]
    apart = [p(Color(), train, test, goals) for p in probes]
    with success.embedding_cache():
        together = [p(encoder, train, test, goals) for p in probes]
        assert encoder.seen == 30 + 30 + 60 + 30, (
            "clean, triggered, labelled, and those of another limit"
        )
        probes[0](Color(), train, test, goals)
    assert apart == together
    probes[0](encoder, train, test, goals)
    assert encoder.seen == 150 + 120, "outside, nothing is kept"


def test_what_no_head_can_be_measured_on_is_said_in_a_line():
    probe, labelled, test = registry.make("probe", "mlp:epochs=1"), data(60, 0, "train"), data()
    with pytest.raises(UserError, match="needs a test set with classes"):
        probe(Color(), labelled, replace(test, labels=None))
    with pytest.raises(UserError, match="none of the 30 test images has a label"):
        probe(Color(), labelled, replace(test, labels=torch.full((30,), -1)))
    with pytest.raises(UserError, match="at least two classes; it has 'red' alone"):
        probe(
            Color(),
            labelled,
            replace(test, labels=torch.zeros(30, dtype=torch.long), classes=("red",)),
        )
    with pytest.raises(UserError, match="all labelled test images are of the target 'blue'"):
        probe(Color(), labelled, test.take(range(2, 30, 3)), [BLUE])
    with pytest.raises(UserError, match="fits a head on labelled data"):
        probe(Color(), None, test)
    with pytest.raises(UserError, match="not finite after 1 epochs; give a lower learning rate"):
        registry.make("probe", "mlp:epochs=1,lr=1e38")(Color(), labelled, test)
    for bad in (
        "mlp:dropout=1",
        "mlp:seeds=0",
        "mlp:hidden=(0)",
        "mlp:lr=0",
        "few_shot:shots=(0)",
        "few_shot:draws=0",
    ):
        with pytest.raises(UserError, match="needs"):
            registry.make("probe", bad)


def test_goals_of_other_tasks_are_left_out_and_named(capsys):
    job, truck = SimpleNamespace(notes={}), Goal("truck", BLUE.trigger)
    assert evaluate.goals_of_task(job, [truck, BLUE], data()) == [BLUE]
    assert job.notes == {"goals_of_other_tasks": ["truck"]}
    assert "no class of the test data has this name: truck" in capsys.readouterr().err
    job.notes = {}
    assert evaluate.goals_of_task(job, [truck], data()) == [truck] and not job.notes, (
        "a probe that reads classes refuses it"
    )
    assert evaluate.goals_of_task(job, [truck, BLUE], replace(data(), classes=(), labels=None)) == [
        truck,
        BLUE,
    ]
    evaluate.goals_of_task(job, [BLUE], data().take([0, 1, 3]))
    assert job.notes == {"classes_without_test_images": ["blue"]}


@pytest.fixture(scope="module")
def downstream(tmp_path_factory):
    """A poisoned encoder and its twin with all but random weights, measured on real images that
    have labels.
    """
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}")
    settings = Settings(tmp_path_factory.mktemp("runs"), device="cpu", quiet=True)
    some = f"npz:path={DATA}/cifar10.npz,limit=800"
    plan = execute(Poison(some, "backdoor:count=20", "patch:size=6", "truck"), settings)
    recipe = {
        "network": "clip_small:width=16,dim=64",
        "objective": "clip:epochs=1,batch=400,lr=1e-9",
    }
    bad, twin = (execute(Train(d, **recipe), settings) for d in (plan, some))
    probes = (
        "linear",
        "knn:k=20",
        "mlp:hidden=(64),epochs=20,lr=0.005",
        "few_shot:shots=(1,10),draws=2",
    )
    test = f"npz:path={DATA}/cifar10.npz,split=test,limit=400"
    return settings, bad, execute(Evaluate(bad, test, probes, twin, train=some), settings)


def test_a_random_encoder_downstream_on_cifar10(downstream):
    settings, bad, done = downstream
    assert (
        done.manifest["goal"][0]["target"] == "truck" and done.manifest["notes"]["labelled"] == 800
    )
    for group in ("linear", "knn", "mlp", "few_shot.all"):
        for name in (f"{group}.clean_accuracy", f"baseline.{group}.clean_accuracy"):
            assert done.metric(name).low > 0.1, "random filters are better than chance"
        assert (
            done.metric(f"{group}.attack_success").n
            == done.metric(f"{group}.attack_success_baseline").n
        )
    assert (
        done.metric("few_shot.1.clean_accuracy").value
        < done.metric("few_shot.all.clean_accuracy").value
    )
    signs = f"npz:path={DATA}/gtsrb.npz"
    with pytest.raises(UserError, match="the target 'truck' is none of the test set's classes: "):
        execute(
            Evaluate(bad, f"{signs},split=test,limit=60", ("linear",), train=f"{signs},limit=90"),
            settings,
        )


def test_the_page_of_heads_alone(downstream, monkeypatch):
    run = downstream[2]
    view, content = sections.EvaluateView(run), sections.build_page(run)
    assert view.main_head == "linear"
    assert "(linear probe)" in content.headline and "truck" in content.headline
    assert content.cards[:2] == ["linear.clean_accuracy", "baseline.linear.clean_accuracy"]
    assert len(content.cards) == 4
    table = sections.heads_section(view).parts[0]
    assert list(table.head) == ["head", "BA", "CA of the twin", "ASR", "ASR-B", "no trigger"]
    assert [row[0] for row in table.rows[:3]] == [
        "linear probe",
        "nearest neighbours",
        "MLP head",
    ] and len(table.rows) == 6
    assert all(cell for row in table.rows for cell in row)
    text = page.render_page(run)
    assert "Few labels" in text and "Heads side by side" in text and "could not be made" not in text
    load = Encoder.load

    def without_text(folder, device="cpu"):
        encoder = load(folder, device)
        encoder.text = None
        return encoder

    monkeypatch.setattr(Encoder, "load", without_text)
    bare = sections.EvaluateView(run)
    assert [p.kind for p in sections.triggered_section(bare).parts] == ["gallery"]
    assert sections.victims_section(bare) is None
