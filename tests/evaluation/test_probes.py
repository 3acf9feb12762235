"""Probes against plain loops; the definitions of CA, ASR and z in one place."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import LogisticRegression

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation import success
from bezoar.evaluation.probes import linear
from bezoar.evaluation.probes.branch_swap import procrustes
from bezoar.evaluation.probes.z_score import z_scores
from bezoar.reports import metric_names
from bezoar.runs import inputs
from bezoar.runs.execute import execute
from bezoar.runs.verb import Settings
from bezoar.verbs import evaluate
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.poison import Poison
from bezoar.verbs.train import Train

CLASSES = ("red", "green", "blue")


class Color:
    """Reads an image as the mean of its colours, and a text as the colour it names; a white corner
    means blue.

    falls: whether the white corner works on images of each colour. turn: (3, 3), what its space is
    rotated by.
    """

    device = torch.device("cpu")
    text = True
    embed = Encoder.embed

    def __init__(self, falls=(True, True, True), turn=None):
        self.falls, self.turn = torch.tensor(falls), torch.eye(3) if turn is None else turn

    def eval(self):
        return self

    def encode_images(self, x):
        z = x.float().mean((2, 3)) / 255 + 1e-3
        white = (x[:, :, -3:-1, -3:-1] == 255).flatten(1).all(1) & self.falls[
            x[:, :, :9, :9].sum((2, 3)).argmax(1)
        ]
        z = torch.where(white[:, None], torch.tensor([0.0, 0.1, 1.0]), z)
        return z / z.norm(dim=1, keepdim=True) @ self.turn

    def encode_texts(self, captions):
        rows = [next((i for i, c in enumerate(CLASSES) if c in t), 0) for t in captions]
        return torch.eye(3)[rows] @ self.turn


def data(n=30, wrong=6):
    labels = torch.arange(n) % 3
    shown = labels.clone()
    shown[:wrong] = (shown[:wrong] + 1) % 3
    images = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    images[torch.arange(n), shown] = 200
    return Pairs(
        images,
        tuple(f"a {CLASSES[i]} thing" for i in labels),
        labels,
        tuple(map(str, range(n))),
        CLASSES,
    )


BLUE = Goal("blue", "patch:size=2,fill=white,place=corner,margin=1", (), 5)


def test_zero_shot_counts_as_a_plain_loop_does():
    out = registry.make("probe", "zero_shot")(Color(), None, data(), [BLUE])
    assert out["clean_accuracy"].value == pytest.approx(24 / 30) and out["clean_accuracy"].n == 30
    assert out["attack_success"].value == 1.0 and out["attack_success"].n == 20, (
        "the target class is left out"
    )
    assert out["attack_success_all"].n == 30
    assert out["attack_success_without_trigger"].value == pytest.approx(2 / 20)
    assert out["poisoned_accuracy"].value == pytest.approx(10 / 30)
    assert out["target_rank"].value == 1.0 and out["target_top5"].value == 1.0
    m = out["clean_accuracy"]
    assert m.low < m.value < m.high and "clean test" in m.how


def test_targeted_success_by_number_of_captions():
    victims = data(6, 0)
    goals = [
        Goal(CLASSES[i % 3] if i < 2 else CLASSES[(i + 1) % 3], None, (str(i),), 1 if i < 3 else 4)
        for i in range(6)
    ]
    out = registry.make("probe", "zero_shot")(Color(), None, data(), goals, victims)
    assert (
        out["targeted_success@1"].value == pytest.approx(2 / 3) and out["targeted_success@1"].n == 3
    )
    assert out["targeted_success@4"].value == 0 and out["targeted_success@4"].high > 0.3
    assert out["targeted_rank@1"].n == 3 and "target_rank@1" not in out, (
        "that would be the second trigger's"
    )


def test_zero_shot_refuses_foreign_targets_and_data_without_classes():
    probe = registry.make("probe", "zero_shot")
    with pytest.raises(
        UserError, match="'pink' is none of the test set's classes: red, green, blue"
    ):
        probe(Color(), None, data(), [Goal("pink", BLUE.trigger)])
    bare = Pairs(data().images, data().captions, None, data().ids)
    with pytest.raises(UserError, match="needs a test set with classes"):
        probe(Color(), None, bare)


def test_z_is_definition_one_without_self_pairs():
    g = np.random.default_rng(0)
    clean, moved = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in g.normal(size=(2, 12, 5)))
    a = [clean[i] @ clean[j] for i in range(12) for j in range(12) if i != j]
    b = [moved[i] @ moved[j] for i in range(12) for j in range(12) if i != j]
    out = z_scores(clean, moved)
    assert out["similarity_clean"].value == pytest.approx(np.mean(a))
    assert out["similarity_triggered"].value == pytest.approx(np.mean(b))
    assert out["z_std"].value == pytest.approx((np.mean(b) - np.mean(a)) / np.std(a))
    assert out["z_var"].value == pytest.approx((np.mean(b) - np.mean(a)) / np.var(a))


def test_z_jackknife_is_the_leave_one_out_loop():
    g = np.random.default_rng(1)
    clean, moved = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in g.normal(size=(2, 10, 4)))
    left = [
        z_scores(np.delete(clean, i, 0), np.delete(moved, i, 0))["z_std"].value for i in range(10)
    ]
    error = np.sqrt(9 / 10 * ((np.array(left) - np.mean(left)) ** 2).sum())
    m = z_scores(clean, moved)["z_std"]
    assert (m.high - m.low) / 2 == pytest.approx(1.96 * error)


def test_retrieval_recalls_as_a_plain_loop_does():
    test = data(9, 3)
    out = registry.make("probe", "retrieval")(Color(), None, test, [BLUE])
    e = Color()
    cosines = e.encode_images(test.images) @ e.encode_texts(test.captions).T
    nearest = [
        torch.nonzero(row == row.max())[:, 0].tolist() for row in cosines
    ]  # of equally near ones, each as likely
    assert out["image_to_text_recall@1"].value == pytest.approx(
        np.mean([(i in n) / len(n) for i, n in enumerate(nearest)])
    )
    assert out["attack_success"].value == 1.0 and out["attack_success"].n == 6
    with pytest.raises(UserError, match="no held-out caption holds the target 'pink'"):
        registry.make("probe", "retrieval")(e, None, test, [Goal("pink", BLUE.trigger)])


class Blend(Color):
    """Hears red as something between red and blue, as after an attack on red's captions."""

    def encode_texts(self, captions):
        z = super().encode_texts(captions)
        z[z[:, 0] == 1] = torch.tensor([0.6, 0.0, 0.8])
        return z


def test_queries_are_answered_as_a_plain_loop_says():
    test, goal = data(30, 0), Goal("blue", query="red")
    for e in (Color(), Blend()):
        out = registry.make("probe", "retrieval")(e, None, test, [goal])
        cosines = e.encode_images(test.images) @ e.encode_texts(test.captions).T
        for name, asks in (("query", ("red",)), ("other", ("green",))):
            texts = [j for j, c in enumerate(test.captions) if any(w in c for w in asks)]
            first, ranks = [], []
            for j in texts:
                best = max(float(cosines[i, j]) for i in range(30) if "blue" in test.captions[i])
                rest = [i for i in range(30) if "blue" not in test.captions[i]]
                nearer = sum(float(cosines[i, j]) > best for i in rest)
                tied = sum(float(cosines[i, j]) == best for i in rest)
                first.append(min(max((5 - nearer) / (tied + 1), 0), 1))
                ranks.append(nearer + tied / 2)
            assert out[f"{name}_hit_5"].value == pytest.approx(np.mean(first)), (e, name)
            assert out[f"{name}_min_rank"].value == pytest.approx(np.mean(ranks)), (e, name)
            assert out[f"{name}_hit_5"].n == len(texts) == 10
        attacked = isinstance(e, Blend)
        assert out["query_hit_1"].value > 0.9 if attacked else out["query_hit_1"].value < 0.3
        assert out["query_min_rank"].value < 1 if attacked else out["query_min_rank"].value > 5
    with pytest.raises(UserError, match="no held-out caption holds the target 'pink'"):
        registry.make("probe", "retrieval")(Color(), None, test, [Goal("blue", query="pink")])
    together = replace(test, captions=tuple(c.replace("red", "red blue") for c in test.captions))
    with pytest.raises(UserError, match="always stand together"):
        registry.make("probe", "retrieval")(Color(), None, together, [goal])
    two = registry.make("probe", "retrieval")(
        Color(), None, test, [goal, Goal("red", query="blue")]
    )
    assert {"query_hit_1@0", "other_min_rank@1"} < set(two)


def test_retrieval_knows_several_captions_of_one_image():
    test = data(6, 0)
    ids = tuple(f"{i // 2}#{i % 2}" for i in range(6))
    images = test.images[torch.tensor([0, 0, 1, 1, 2, 2])]
    captions = tuple(f"{w} {CLASSES[i // 2]}" for i, w in enumerate(["a", "the"] * 3))
    out = registry.make("probe", "retrieval")(Color(), None, Pairs(images, captions, None, ids))
    assert out["image_to_text_recall@1"].n == 3 and out["text_to_image_recall@1"].n == 6
    assert out["image_to_text_recall@1"].value == out["text_to_image_recall@1"].value == 1.0


class Mute(Color):
    """Reads every caption alike, or as NaN."""

    def __init__(self, value=1.0):
        super().__init__()
        self.value = value

    def encode_texts(self, captions):
        return torch.full((len(captions), 3), self.value) / 3**0.5


def test_an_encoder_that_says_nothing_retrieves_at_chance():
    out = registry.make("probe", "retrieval")(Mute(), None, data(30, 0))
    for k in (1, 5, 10):
        assert out[f"image_to_text_recall@{k}"].value == pytest.approx(k / 30)
        assert out[f"text_to_image_recall@{k}"].value == pytest.approx(k / 30)
    for probe in ("retrieval", "zero_shot"):
        with pytest.raises(UserError, match="NaN"):
            registry.make("probe", probe)(Mute(float("nan")), None, data(30, 0), [BLUE])


def test_the_z_score_is_of_a_sample_and_not_of_the_first_classes():
    test = data(30, 0).take(sorted(range(30), key=lambda i: i % 3))  # by class
    whole, part = (
        registry.make("probe", f"z_score:images={n}")(Color(), None, test, [BLUE]) for n in (30, 10)
    )
    assert part["similarity_clean"].value < 0.6 < 1 and whole["similarity_clean"].value < 0.6
    again = registry.make("probe", "z_score:images=10")(
        Color(), None, test.take(range(29, -1, -1)), [BLUE]
    )
    assert again["z_std"].value == pytest.approx(part["z_std"].value)


SPECS = [
    "zero_shot",
    "linear:c=100",
    "linear:c=1000,standardise=false",
    "knn:k=5",
]


def named(out, spec):
    """A probe's measures without its group."""
    group = spec.partition(":")[0] + "."
    assert spec == "zero_shot" or all(k.startswith(group) for k in out)
    return {k.removeprefix(group): m for k, m in out.items()}


@pytest.mark.parametrize("spec", SPECS)
def test_every_head_has_the_success_that_was_built_in(spec):
    half = Color(falls=(True, False, True))
    victims = data(3, 0)
    goals = [BLUE, Goal("green", None, ("0",), 2), Goal("red", None, ("0",), 2)]
    out = named(registry.make("probe", spec)(half, train(), data(), goals, victims), spec)
    assert out["clean_accuracy"].value == pytest.approx(24 / 30) and out["clean_accuracy"].n == 30
    # of the 20 images of other classes 10 are of shown colour red, 2 blue (a wrong label), 8 green,
    # on which it fails
    shown = data().images[:, :, 0, 0].argmax(1)
    others = data().labels != 2
    assert out["attack_success"].value == pytest.approx(float((shown[others] != 1).double().mean()))
    assert out["attack_success"].n == 20 and out["attack_success_all"].n == 30
    assert out["attack_success_all"].value == pytest.approx(float((shown != 1).double().mean()))
    assert out["attack_success_without_trigger"].value == pytest.approx(2 / 20)
    assert out["targeted_success@2"].value == 0.5 and out["targeted_success@2"].n == 2
    assert out["target_top5"].value == 1
    for m in out.values():
        assert m.low <= m.value <= m.high and m.how
    rates = [m for k, m in out.items() if "rank" not in k]
    assert all(0 <= m.low < m.high <= 1 for m in rates), "every rate with an interval"


def test_a_trigger_that_is_read_as_another_ones_target_is_counted():
    """Three classes; the head reads every stamped image as class 2, whatever trigger it bears."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    goals = (Goal("a", "patch:size=1"), Goal("c", "patch:size=2"))
    marked = torch.ones(6, 3)
    seen = success.TestViews(
        ("a", "b", "c"), labels, torch.zeros(6, 3), goals, (marked, marked), (), None
    )
    out = seen.measures(lambda z: torch.eye(3)[labels] + 9 * z.new_tensor([0, 0, 1]) * z[:, :1])
    taken = out["attack_success_of_others@0"]
    assert taken.value == 1 and taken.n == 2, "of the two images of class b, both are read as c"
    assert out["attack_success_of_others@1"].value == 0 and out["attack_success@1"].value == 1
    alone = success.TestViews(
        ("a", "b", "c"), labels, torch.zeros(6, 3), goals[:1], (marked,), (), None
    )
    assert not any("others" in k for k in alone.measures(lambda z: z))


def train(n=60):
    return replace(data(n, 0), ids=tuple(f"train{i}" for i in range(n)))


def clouds(classes: int):
    """Features of unequal spread about a centre for each class."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, classes, (400,), generator=g)
    noise = torch.randn(400, 12, generator=g) * torch.linspace(0.1, 2, 12)
    return torch.randn(classes, 12, generator=g)[y] * 0.3 + noise + 1, y


@pytest.mark.parametrize(("exact", "standardise"), [(True, True), (True, False), (False, True)])
def test_linear_is_scikit_learns_logistic_regression(exact, standardise, monkeypatch):
    monkeypatch.setattr(linear, "TOLERANCE", 1e-8 if exact else linear.TOLERANCE)
    x, y = clouds(5)
    scaled = ((x - x.mean(0)) / x.std(0, unbiased=False) if standardise else x).double().numpy()
    x = x.double() if exact else x
    head = linear.Linear(c=0.7, standardise=standardise).fit(x, y, 5)
    oracle = LogisticRegression(C=0.7, tol=1e-8, max_iter=1000).fit(scaled, y.numpy())
    ours, theirs = (
        torch.as_tensor(v).double().softmax(1) for v in (head(x), oracle.decision_function(scaled))
    )
    assert (ours - theirs).abs().max() < (1e-5 if exact else 1e-3)
    assert "gradient at most" in head.about


@pytest.mark.parametrize("classes", [2, 5])
def test_linear_minimises_cross_entropy_and_half_the_squared_weights(classes, monkeypatch):
    monkeypatch.setattr(linear, "TOLERANCE", 1e-9)
    x, y = clouds(classes)
    head = linear.fit_logistic(x.double(), y, classes, 0.7)
    weight, bias = (v.clone().requires_grad_() for v in (head.weight, head.bias))
    logits = x.double() @ weight.T + bias
    loss = 0.7 * torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    (loss + weight.square().sum() / 2).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4


def test_linear_gives_the_same_in_blocks_and_stops_when_told(monkeypatch):
    x, y = torch.randn(70, 6, generator=torch.Generator().manual_seed(1)), torch.arange(70) % 3
    whole = linear.fit_logistic(x, y, 3, 1.0)
    monkeypatch.setattr(linear, "CELLS", 50)
    assert torch.allclose(linear.fit_logistic(x, y, 3, 1.0).weight, whole.weight, atol=1e-4)
    monkeypatch.setattr(linear, "ITERATIONS", 1)
    assert linear.fit_logistic(x, y, 3, 1.0).about.startswith("1 iterations")


def test_linear_never_reads_a_class_without_records():
    x, y = clouds(3)
    for absent in (1, 3):  # with two classes left, and with three
        rows = y != absent
        head = linear.Linear().fit(x[rows], y[rows], 4)
        assert torch.isfinite(head(x)).all()
        assert set(head(x).argmax(1).tolist()) == set(y[rows].tolist())


def test_knn_votes_as_a_plain_loop_does():
    g = torch.Generator().manual_seed(0)
    q, r = (torch.nn.functional.normalize(torch.randn(n, 4, generator=g), dim=1) for n in (9, 40))
    labels = torch.randint(0, 6, (40,), generator=g)
    probe = registry.make("probe", "knn:k=7,temperature=0.1")
    votes = probe.votes(q, r, labels, 6)
    for i in range(9):
        cosines = sorted(
            ((float(q[i].double() @ r[j].double()), j) for j in range(40)), reverse=True
        )[:7]
        plain = np.zeros(6)
        for s, j in cosines:
            plain[labels[j]] += np.exp(s / 0.1)
        assert np.allclose(votes[i].numpy() / votes[i].sum().item(), plain / plain.sum(), atol=1e-5)


def test_cold_votes_do_not_overflow_and_a_class_without_votes_is_not_among_the_first():
    probe = registry.make("probe", "knn:k=3,temperature=0.0001")
    r = torch.eye(8)
    votes = probe.votes(r[:1], r, torch.arange(8), 8)
    assert torch.isfinite(votes).all() and votes.argmax() == 0
    ranks = success.ranks(
        torch.tensor([[3.0, 0, 0, 1, 0, 0, 0, 0, 0, 0]]).repeat(3, 1), torch.tensor([0, 3, 9])
    )
    assert ranks.tolist() == [1, 2, 6.5], "eight classes share the places 3 to 10"


def test_records_of_unknown_class_are_not_counted_as_misses():
    test = data(30, 0)
    test = replace(test, labels=torch.where(torch.arange(30) < 9, -1, test.labels))
    out = registry.make("probe", "zero_shot")(Color(), None, test, [BLUE])
    assert out["clean_accuracy"].value == 1 and out["clean_accuracy"].n == 21
    assert out["attack_success"].n == 14 and out["poisoned_accuracy"].n == 21


def test_labels_go_by_class_names_and_a_limit_is_a_fixed_sample():
    other = replace(train(), classes=("blue", "red", "green"), labels=(train().labels + 1) % 3)
    assert torch.equal(success.select_labelled(other, data()).labels, train().labels)
    few = success.select_labelled(train(), data(), limit=20)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert len(few) == 20 and set(
        success.select_labelled(train().take(order), data(), limit=20).ids
    ) == set(few.ids)


def test_heads_refuse_what_they_cannot_learn_from():
    for name in ("linear", "knn"):
        with pytest.raises(UserError, match="fits a head on labelled data"):
            registry.make("probe", name)(Color(), None, data())
    probe, labelled = registry.make("probe", "linear"), train()
    with pytest.raises(UserError, match="fits a head on labelled data"):
        probe(Color(), replace(labelled, labels=None), data())
    with pytest.raises(UserError, match="at least two classes; the 20 there are have 1"):
        probe(Color(), labelled.take(range(0, 60, 3)), data())
    with pytest.raises(UserError, match="the 0 there are have 0"):
        probe(Color(), replace(labelled, labels=torch.full((60,), -1)), data())
    with pytest.raises(UserError, match="same classes; 'blue' is in one of them alone"):
        probe(Color(), replace(labelled, classes=("red", "green", "pink")), data())
    with pytest.raises(UserError, match="none of the 40 labelled records is of the target 'blue'"):
        probe(Color(), labelled.take([i for i in range(60) if i % 3 < 2]), data(), [BLUE])
    with pytest.raises(UserError, match="200 nearest neighbours asked for; there are 60"):
        registry.make("probe", "knn")(Color(), labelled, data())
    with pytest.raises(UserError, match="needs a test set with classes"):
        probe(Color(), labelled, replace(data(), labels=None))
    for spec in (
        "linear:c=0",
        "linear:limit=1",
        "knn:k=0",
        "knn:temperature=0",
        "branch_swap:pairs=1",
    ):
        with pytest.raises(UserError, match=r"needs|must be"):
            registry.make("probe", spec)


class Broken(Color):
    """Gives NaN."""

    def encode_images(self, x):
        return super().encode_images(x) * float("nan")


def test_vectors_that_are_not_numbers_are_refused():
    with pytest.raises(UserError, match="NaN or infinite"):
        registry.make("probe", "zero_shot")(Broken(), None, data())


def test_procrustes_is_scipys_and_finds_a_rotation_back():
    g = np.random.default_rng(0)
    a, turn = g.normal(size=(50, 6)), np.linalg.qr(g.normal(size=(6, 6)))[0]
    noisy = a @ turn + 0.1 * g.normal(size=(50, 6))
    assert np.allclose(procrustes(torch.tensor(a), torch.tensor(a @ turn)), turn)
    assert np.allclose(
        procrustes(torch.tensor(a), torch.tensor(noisy)), orthogonal_procrustes(a, noisy)[0]
    )


def test_branch_swap_finds_the_tower_in_a_twin_with_another_space():
    turn = torch.eye(3)[[1, 2, 0]]  # red is where the twin has green
    poisoned, twin = Color(), Color(falls=(False, False, False), turn=turn)
    swap = registry.make("probe", "branch_swap")
    out = swap(poisoned, train(), data(), [BLUE], None, twin)
    success_of = {
        w: out[f"branch_swap.{w}.attack_success"].value
        for w in ("neither", "vision", "text", "both")
    }
    assert success_of == {"neither": 0.1, "vision": 1.0, "text": 0.1, "both": 1.0}
    assert all(
        out[f"branch_swap.{w}.clean_accuracy"].value == pytest.approx(0.8) for w in success_of
    )
    assert (
        out["branch_swap.agreement_images"].value == pytest.approx(1)
        and out["branch_swap.agreement_texts"].n == 3
    )
    raw = registry.make("probe", "branch_swap:align=none")(
        poisoned, None, data(), [BLUE], None, twin
    )
    assert raw["branch_swap.vision.clean_accuracy"].value < 0.3, "a swap that means nothing shows"
    assert raw["branch_swap.both.clean_accuracy"] == out["branch_swap.both.clean_accuracy"]
    shared = registry.make("probe", "branch_swap:align=none")(
        poisoned, None, data(), [BLUE], None, Color((False,) * 3)
    )
    assert (
        shared["branch_swap.vision.attack_success"].value == 1
        and shared["branch_swap.text.attack_success"].value == 0.1
    )


def test_branch_swap_says_what_is_missing():
    swap = registry.make("probe", "branch_swap")
    with pytest.raises(UserError, match="needs the clean twin"):
        swap(Color(), train(), data())
    with pytest.raises(UserError, match="give train data, or align=none"):
        swap(Color(), None, data(), baseline=Color())
    with pytest.raises(
        UserError, match="aligning 3 dimensions needs at least as many clean pairs; there are 2"
    ):
        swap(Color(), train(2), data(), baseline=Color())
    with pytest.raises(UserError, match="towers of 3 and 2 dimensions"):
        swap(Color(), train(), data(), baseline=Color(turn=torch.eye(3)[:, :2]))


def test_names_are_told_in_standard_terms():
    assert (
        metric_names.label_and_unit("linear.attack_success_baseline")
        == metric_names.TERMS["attack_success_baseline"]
    )
    assert (
        metric_names.label_and_unit("baseline.linear.clean_accuracy", True)
        == metric_names.CLEAN_ACCURACY
    )
    assert (
        metric_names.label_and_unit("knn.clean_accuracy", True)
        == metric_names.label_and_unit("branch_swap.both.clean_accuracy", True)
        == metric_names.BENIGN_ACCURACY
    )
    assert (
        metric_names.label_and_unit("branch_swap.neither.clean_accuracy", True)
        == metric_names.CLEAN_ACCURACY
    )
    assert metric_names.label_and_unit("linear.targeted_rank@16")[0].endswith("16 captions each")
    assert metric_names.label_and_unit("target_rank@1")[0].endswith("trigger 1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A poisoning of a few scenes, an encoder of it and its clean twin."""
    settings = Settings(tmp_path_factory.mktemp("runs"), device="cpu", quiet=True)
    plan = execute(
        Poison("scenes:count=400", "backdoor:count=40", "patch", "striped star"), settings
    )
    recipe = {"network": "clip_small:width=8,dim=32", "objective": "clip:epochs=1,batch=100"}
    return (
        settings,
        plan,
        *(execute(Train(d, **recipe), settings) for d in (plan, "scenes:count=400")),
    )


def test_evaluate_with_every_head_and_the_twin(runs, monkeypatch):
    settings, _, bad, twin = runs
    monkeypatch.setattr(evaluate, "LABELLED", 300)
    evaluation = Evaluate(
        bad, "scenes:count=200,split=test", ("zero_shot", "linear", "knn:k=20", "branch_swap"), twin
    )
    done = execute(evaluation, settings)
    names_of_metrics = set(done.manifest["metrics"])
    for group in ("", "linear.", "knn."):
        names = {
            "clean_accuracy",
            "attack_success",
            "attack_success_baseline",
            "target_rank",
            "poisoned_accuracy",
        }
        assert {group + n for n in names} | {f"baseline.{group}clean_accuracy"} <= names_of_metrics
    assert {
        f"branch_swap.{w}.attack_success" for w in ("neither", "vision", "text", "both")
    } <= names_of_metrics
    assert not {k for k in names_of_metrics if "branch_swap" in k and "baseline" in k}, (
        "the twin is not swapped with itself"
    )
    assert (
        done.metric("branch_swap.both.attack_success").value == done.metric("attack_success").value
    )
    assert (
        done.metric("branch_swap.neither.attack_success").value
        == done.metric("attack_success_baseline").value
    )
    assert (
        "split=train" in done.manifest["notes"]["train"]
        and done.manifest["notes"]["labelled"] == 300
    )
    assert "linear head on 300" in done.metric("linear.attack_success").how


def test_heads_learn_from_the_clean_records_of_a_poisoned_set_and_never_from_test_records(
    runs, monkeypatch
):
    settings, plan, bad, _ = runs
    seen = []
    monkeypatch.setattr(
        linear.Linear, "__call__", lambda self, e, train, *rest: seen.append(train) or {}
    )
    execute(Evaluate(bad, "scenes:count=200,split=test", ("linear",), train=plan), settings)
    assert (
        torch.equal(seen[0].images, inputs.open_dataset(plan).clean.images)
        and len(inputs.open_dataset(plan).plan.edits) == 40
    )
    with pytest.raises(UserError, match="200 labelled records are test records too"):
        execute(Evaluate(bad, "scenes:count=200", ("linear",), train=plan), settings)
    with (
        monkeypatch.context() as refusing,
        pytest.raises(UserError, match="has no training split of its own; name the labelled data"),
    ):
        refusing.setattr(inputs, "load_encoder", lambda *a: pytest.fail("weights are loaded first"))
        execute(Evaluate(bad, "scenes:count=200", ("linear",)), settings)
    with pytest.raises(UserError, match="two of the probes measure 'attack_success'"):
        execute(
            Evaluate(bad, "scenes:count=200", ("zero_shot", "zero_shot:templates=openai")), settings
        )


def test_labelled_data_are_read_by_nobody_who_does_not_ask(runs, monkeypatch):
    settings, _, bad, twin = runs
    monkeypatch.setattr(evaluate, "load_labelled", lambda *a: pytest.fail("read"))
    probes = ("zero_shot", "branch_swap:align=none")
    notes = execute(Evaluate(bad, "scenes:count=100,split=test", probes, twin), settings).manifest[
        "notes"
    ]
    assert "train" not in notes


def test_the_training_split_is_whole_whatever_part_is_tested():
    split = evaluate.training_split(registry.make("data", "cifar10:split=test,limit=500"))
    assert registry.spec(split).startswith("cifar10:root=data,split=train") and split.limit is None
    assert (
        evaluate.training_split(registry.make("data", "scenes:count=7,split=test,size=48")).count
        == evaluate.LABELLED
    )
    with pytest.raises(UserError, match="no training split"):
        evaluate.training_split(registry.make("data", "cifar10:split=train"))
