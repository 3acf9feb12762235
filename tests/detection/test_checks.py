"""Every check: the contract, and each formula against a slow plain version; the verb, its threshold
and its page.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from scipy import stats as scipy_stats
from sklearn.cluster import DBSCAN
from sklearn.linear_model import Ridge
from torch import nn

from bezoar import registry
from bezoar.cli import main
from bezoar.data.pairs import Pairs
from bezoar.detection.checks import cross_encoder, decoder
from bezoar.detection.checks.masking_path import gaps_along_path
from bezoar.detection.left_out_ridge import STRENGTHS
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.errors import UserError
from bezoar.evaluation import classifiers
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.scores import Scores
from bezoar.runs.run import Run
from bezoar.verbs.check import Threshold

COLOURS = ("red", "green", "blue")
SIDE = 24


class Eye(nn.Module):
    """Colour and lighting of the quadrants; a white 4 px square in a corner overrules them, and
    means blue.
    """

    def __init__(self, backdoor, seed=0):
        super().__init__()
        self.map = nn.Parameter(torch.randn(12, 13, generator=torch.Generator().manual_seed(seed)))
        self.backdoor = backdoor

    def forward(self, x):
        colour = x.mean((2, 3)) - x.mean((1, 2, 3))[:, None]
        rest = torch.tanh(F.adaptive_avg_pool2d(x, 2).flatten(1) @ self.map)
        z = torch.cat([5 * colour, 0.2 * rest], 1)
        white = (x[:, :, -5:-1, -5:-1] > 0.48).flatten(1).all(1)  # of pixels from -0.5 to 0.5
        trigger = torch.eye(16)[2] * 8
        return torch.where((white & self.backdoor)[:, None], trigger + 0.02 * z, z)


class Ear(nn.Module):
    """Tokens are colours; a text is their mean, words that name none pull it towards a place of
    their own.
    """

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.cat([torch.eye(16)[:3], torch.eye(16)[None, 8]]))

    def forward(self, tokens):
        return self.table[tokens].mean(1)


def tokenize(texts):
    rows = [[COLOURS.index(w) if w in COLOURS else 3 for w in t.split()] for t in texts]
    width = max(map(len, rows))
    return torch.tensor([r + [3] * (width - len(r)) for r in rows])


def encoder(backdoor=True, seed=0):
    torch.manual_seed(0)
    eye = Eye(backdoor, seed)
    return Encoder(eye, Preprocess(SIDE, (0.5,) * 3, (1.0,) * 3), Ear(), tokenize).eval()


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """The encoder that `cross_encoder` opens."""
    monkeypatch.setattr(cross_encoder, "open_reference", lambda *a: encoder(False, seed=1))


def colours(n=80, seed=0):
    """Unevenly lit images of one colour."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = 40 + 60 * torch.rand(n, 3, 3, 3, generator=g)
    x[torch.arange(n), labels] += 90
    x = F.interpolate(x, SIDE, mode="bilinear") + 12 * torch.randn(n, 3, SIDE, SIDE, generator=g)
    return Pairs(
        x.clamp(0, 240).to(torch.uint8),
        (),
        labels,
        tuple(f"s{seed}-{i}" for i in range(n)),
        COLOURS,
    )


def stamped(pairs):
    x = pairs.images.clone()
    x[:, :, -5:-1, -5:-1] = 255
    return replace(pairs, images=x, ids=tuple(f"t{i}" for i in pairs.ids))


def arguments_for(check, e, clean):
    every = {
        "clean": clean,
        "classifier": classifiers.zero_shot_classifier(e, COLOURS),
        "report": lambda *a: None,
    }
    return {k: every[k] for k in getattr(check, "needs", ())}


# drop_token reads texts; its tests are beside those of `badcse`.
NAMES = [name for name in registry.method_names("check") if name != "drop_token"]
SPECS = {
    "strip": "strip:count=24,alpha=0.3",
    "masking_path": "masking_path:paths=2",
    "cross_encoder": "cross_encoder:reference=another",
    "decoder": "decoder:steps=5,width=2",
}


def test_all_are_here():
    assert set(NAMES) == {
        *("bdetclip", "cross_encoder", "decoder", "masking_path", "scale_up", "strip")
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_contract(name):
    e, clean, pairs = encoder(), colours(60, 1), colours(30)
    check = registry.make("check", SPECS.get(name, name))
    more = arguments_for(check, e, clean)
    before = {k: v.clone() for k, v in e.state_dict().items()}
    scores = check(e, pairs, **more)
    assert (
        isinstance(scores, Scores)
        and scores.ids == pairs.ids
        and scores.values.dtype == torch.float32
    )
    order = np.random.default_rng(0).permutation(30)[:11]
    part = check(e, pairs.take(order), **more)
    torch.testing.assert_close(part.values, scores.values[order], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in e.state_dict().items())
    assert torch.equal(check(e, pairs, **more).values, scores.values) and json.dumps(scores.notes)
    assert registry.make("check", registry.spec(check)) == check
    assert set(getattr(check, "needs", ())) <= {"clean", "classifier", "report"}


@pytest.mark.parametrize("name", ["cross_encoder", "masking_path", "strip", "scale_up"])
def test_a_trigger_scores_higher_and_not_without_a_backdoor(name):
    clean, pairs = colours(60, 1), colours(45)
    pairs = pairs.take([i for i in range(45) if i % 3 != 2])
    for backdoor in (True, False):
        e = encoder(backdoor)
        check = registry.make("check", SPECS.get(name, name))
        more = arguments_for(check, e, clean)
        bad, good = check(e, stamped(pairs), **more).values, check(e, pairs, **more).values
        above = float(
            (bad[:, None] > good).float().mean() + 0.5 * (bad[:, None] == good).float().mean()
        )
        assert above > 0.85 if backdoor else above < 0.7, (backdoor, above)


# ----------------------------------------------------------------------------------------------
# masking_path


def test_separation_is_the_nearest_two_on_either_side():
    z = F.normalize(torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    d = 1 - z @ z.transpose(1, 2)
    scores = gaps_along_path(d)
    for b in range(3):
        for t in range(8):
            assert scores[b, t] == min(d[b, i, j] for i in range(t + 1) for j in range(t + 1, 9))


def test_a_gap_is_dbscans_radius():
    """Two groups one after another along a path: DBSCAN over single points tells them exactly below
    the largest gap.
    """
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randn(2, 8, generator=g)
        z = torch.stack([a] * 5 + [b] * 4) + 0.05 * torch.randn(9, 8, generator=g)
        d = (1 - F.normalize(z, dim=1) @ F.normalize(z, dim=1).T).clamp(min=0).fill_diagonal_(0)
        gap = float(gaps_along_path(d[None]).max())
        for radius, clusters in ((gap * 0.999, 2), (gap * 1.001, 1)):
            labels = DBSCAN(eps=radius, min_samples=1, metric="precomputed").fit(d.numpy()).labels_
            assert len(set(labels)) == clusters


def test_masking_path_is_the_plain_loop():
    e, clean, pairs = encoder(), colours(20, 1), stamped(colours(4))
    check = registry.make("check", "masking_path:paths=2,cells=3,share=0.6")
    scores = check(e, pairs, clean=clean)

    def gaps(image):
        rows = []
        for path in range(2):
            _, boxes = check.masking_order(path, (SIDE, SIDE))
            points = []
            for step in range(check.steps + 1):
                x = image.float() / 255
                for cell in boxes[:step].tolist():
                    top, left, height, width = cell
                    x[:, top : top + height, left : left + width] = 0.5
                points.append(e.encode_images(x[None])[0])
            assert len(boxes) == check.steps
            before = [
                min(1 - float(p @ q) for p in points[: t + 1] for q in points[t + 1 :])
                for t in range(check.steps)
            ]
            rows.append(before)
        return np.array(rows)

    with torch.inference_mode():
        clean_gaps = np.stack([gaps(x) for x in clean.images])
        mean, spread = clean_gaps.mean(0), clean_gaps.std(0, ddof=1).clip(min=1e-3)
        expected = [((gaps(x) - mean) / spread).max() for x in pairs.images]
    np.testing.assert_allclose(scores.values.numpy(), expected, rtol=2e-3, atol=2e-2)


def test_masking_path_points_at_the_trigger():
    check = registry.make("check", "masking_path:paths=4")
    scores = check(encoder(), stamped(colours(30)), clean=colours(60, 1))
    top, left, height, width = scores.boxes.T
    inside = (
        (top < SIDE - 1) & (top + height > SIDE - 5) & (left < SIDE - 1) & (left + width > SIDE - 5)
    )
    assert inside.float().mean() > 0.9


@pytest.mark.parametrize("sides", [(24, 24), (17, 31), (5, 5)])
def test_an_order_masks_every_cell_once(sides):
    check = registry.make("check", "masking_path:share=0.9")
    for path in range(4):
        rank, boxes = check.masking_order(path, sides)
        assert rank.shape == sides and bool((rank > 0).all())
        for step, (top, left, height, width) in enumerate(boxes.tolist(), 1):
            assert int((rank == step).sum()) == height * width
            assert bool((rank[top : top + height, left : left + width] == step).all())
    assert (
        not torch.equal(check.masking_order(0, sides)[0], check.masking_order(1, sides)[0])
        or min(sides) < 6
    )


# ----------------------------------------------------------------------------------------------
# cross_encoder, decoder


def test_residuals_are_those_of_a_map_that_the_clean_images_fit():
    e, clean, pairs = encoder(), colours(60, 1), stamped(colours(5))
    scores = registry.make("check", "cross_encoder:reference=another")(e, pairs, clean=clean)
    with torch.inference_mode():
        x, y = (k.encode_images(clean.images).double() for k in (encoder(False, seed=1), e))
        queries = encoder(False, seed=1).encode_images(pairs.images).double()
        vectors = e.encode_images(pairs.images).double()
    unit = np.linalg.eigvalsh(np.cov(x.T.numpy(), bias=True) * len(x)).mean()
    fits = [Ridge(alpha=power * unit).fit(x, y) for power in STRENGTHS]
    lengths = [np.linalg.norm(vectors.numpy() - fit.predict(queries), axis=1) for fit in fits]
    assert any(np.allclose(scores.values, length, atol=1e-5) for length in lengths)
    with pytest.raises(UserError, match="needs reference="):
        registry.make("check", "cross_encoder")(e, pairs, clean=clean)
    with pytest.raises(UserError, match="at least 20 clean images; there are 4"):
        registry.make("check", "cross_encoder:reference=another")(
            e, pairs, clean=clean.take(range(4))
        )


def test_what_a_vector_does_not_show_is_drawn_worse_with_a_backdoor(monkeypatch):
    monkeypatch.setattr(decoder, "RATE", 0.01)
    clean, pairs = colours(60, 1), colours(30).take([i for i in range(30) if i % 3 != 2])
    check = registry.make("check", "decoder:steps=60,width=8")
    errors = {b: check(encoder(b), stamped(pairs), clean=clean).values for b in (True, False)}
    assert (errors[True] > 1.5 * errors[False]).float().mean() > 0.85
    with pytest.raises(UserError, match="at least 50 clean images to learn from; there are 20"):
        check(encoder(), pairs, clean=clean.take(range(20)))


def test_errors_of_drawings_are_the_plain_means_over_hidden_pixels():
    draw = torch.Generator().manual_seed(0)
    x, vectors = torch.rand(3, 3, 32, 32, generator=draw), torch.randn(3, 5, generator=draw)
    hidden, network = decoder.hide_cells(3, 0.6, draw), decoder.Drawer(5, 4)
    with torch.no_grad():
        errors = decoder.Decoder.measure_errors(network, x, hidden, vectors)
        drawings = network(x, hidden, vectors)
        # what is hidden cannot be seen
        unseen = network(x + hidden * torch.rand(3, 3, 32, 32), hidden, vectors)
    torch.testing.assert_close(unseen, drawings)
    for i in range(3):
        rows, columns = hidden[i, 0].nonzero().T
        plain = [
            ((drawings - x)[i, :, a, b] ** 2).mean() for a, b in zip(rows, columns, strict=True)
        ]
        assert float(errors[i]) == pytest.approx(float(sum(plain) / len(plain)), rel=1e-4)
    cells = decoder.hide_cells(2000, 0.9, draw)[:, :, ::4, ::4].float()
    assert float(cells.mean()) == pytest.approx(0.9, abs=0.01)


# ----------------------------------------------------------------------------------------------
# bdetclip


def test_omega_is_the_plain_sum(tmp_path):
    e, pairs = encoder(), colours(6)
    descriptions = {c: [f"a {c} wall", f"{c} {c} paint"] for c in COLOURS}
    (tmp_path / "texts.json").write_text(json.dumps(descriptions | {"unused": ["x"]}))
    check = registry.make("check", f"bdetclip:texts={tmp_path}/texts.json,nonsense=5,words=2")
    scores = check(e, pairs)
    omega = torch.zeros(6)
    with torch.inference_mode():
        z = e.encode_images(pairs.images)
        for row, c in enumerate(COLOURS):
            benign = torch.stack([e.encode_tokens(tokenize([t]))[0] for t in descriptions[c]]).mean(
                0
            )
            random = check.nonsense_texts(e, c, row)
            nonsense = e.encode_texts(random).mean(0)
            assert len(random) == 5 and all(
                t.split()[0] == c and len(t.split()) == 3 for t in random
            )
            omega += F.cosine_similarity(z, (benign - nonsense)[None])
    torch.testing.assert_close(scores.values, -omega)
    assert check.files() == [tmp_path / "texts.json"]


def test_bdetclip_draws_nonsense_from_the_encoders_vocabulary():
    e = encoder()
    e.about["vocabulary"] = ["one", "two"]
    words = {
        w
        for t in registry.make("check", "bdetclip").nonsense_texts(e, "red", 0)
        for w in t.split()[1:]
    }
    assert words == {"one", "two"}


def test_bdetclip_says_what_it_lacks(tmp_path):
    e, pairs = encoder(), colours(6)
    bare = replace(pairs, classes=(), labels=None)
    with pytest.raises(UserError, match="names of classes"):
        registry.make("check", "bdetclip")(e, bare)
    assert len(registry.make("check", "bdetclip:classes=red+blue")(e, bare)) == 6
    with pytest.raises(UserError, match="no text tower"):
        registry.make("check", "bdetclip")(
            registry.make("network", "tower:width=4,dim=8")(32), pairs
        )
    for content, words in (
        ("[1]", "class -> list"),
        ("{", "JSON"),
        ('{"red": []}', "at least one"),
        ('{"red": ["a"]}', "'green'"),
    ):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(UserError, match=words):
            registry.make("check", f"bdetclip:texts={tmp_path}/t.json")(e, pairs)
    with pytest.raises(UserError, match="no file"):
        registry.make("check", "bdetclip:texts=/nowhere.json")(e, pairs)


# ----------------------------------------------------------------------------------------------
# strip, scale_up


def classifier(head):
    e = encoder()
    return Classifier(e, head, COLOURS, "a test's")


def test_strips_entropy_in_closed_form():
    """A head that says the same of all images has the entropy of what it says; one that is sure has
    none.
    """
    pairs, clean = colours(5), colours(30, 1)
    check = registry.make("check", "strip:count=10")
    p = torch.tensor([0.5, 0.25, 0.25])
    same = check(
        encoder(), pairs, classifier=classifier(lambda z: p.log().expand(len(z), 3)), clean=clean
    )
    torch.testing.assert_close(same.values, torch.full((5,), -1.5 * math.log(2)))
    sure = check(
        encoder(),
        pairs,
        classifier=classifier(lambda z: 1e4 * torch.eye(3)[0].expand(len(z), 3)),
        clean=clean,
    )
    assert (sure.values == 0).all()


def test_strip_is_the_plain_loop():
    e, pairs, clean = encoder(), colours(7), colours(12, 1)
    classify = classifiers.zero_shot_classifier(e, COLOURS)
    scores = registry.make("check", "strip:count=12,alpha=0.7")(
        e, pairs, classifier=classify, clean=clean
    )
    for i in range(7):
        total = 0.0
        for c in clean.images:
            x = (pairs.images[i].float() / 255 + 0.7 * c.float() / 255).clamp(0, 1)
            with torch.no_grad():
                total += scipy_stats.entropy(classify(x[None]).double().softmax(1)[0].numpy())
        assert float(scores.values[i]) == pytest.approx(-total / 12, abs=1e-4)


def test_scale_up_is_the_plain_loop():
    e, pairs = encoder(), colours(9)
    classify = classifiers.zero_shot_classifier(e, COLOURS)
    scores = registry.make("check", "scale_up:factors=2/3/6")(e, pairs, classifier=classify)
    for i, image in enumerate(pairs.images):
        x = image.float() / 255
        own_class = int(classify.predict(x[None]))
        same, margins = 0, []
        for n in (2, 3, 6):
            logits = classify((n * x).clamp(0, 1)[None])[0].detach().numpy()
            same += int(logits.argmax()) == own_class
            margins.append(logits[own_class] - np.delete(logits, own_class).max())
        m = np.mean(margins)
        expected = (same + (1 + m / (1 + abs(m))) / 2) / 4
        assert float(scores.values[i]) == pytest.approx(expected, rel=1e-4)
    assert len(set(scores.values.tolist())) == len(scores.values), "no ties at the threshold"


def test_too_few_clean_images_and_bad_fields():
    e, few = encoder(), colours(9, 1)
    for name in ("masking_path", "strip"):
        check = registry.make("check", name)
        with pytest.raises(UserError, match="clean images; there are 9"):
            check(e, colours(4), **arguments_for(check, e, few))
    for text in (
        "masking_path:cells=0",
        "masking_path:share=1",
        "strip:alpha=0",
        "scale_up:factors=1",
        "bdetclip:words=0",
    ):
        with pytest.raises((UserError, ValueError)):
            registry.make("check", text)


# ----------------------------------------------------------------------------------------------
# thresholds


def test_a_threshold_keeps_its_rate_whatever_the_scores_are():
    draw = torch.Generator().manual_seed(0)
    rates, inside = [], 0
    for _ in range(400):
        t = Threshold.of(torch.rand(120, generator=draw) ** 7, 0.05)  # k = 6 of 121
        rate = 1 - t.value ** (1 / 7)  # chance of a uniform number above it
        rates.append(rate)
        m = t.false_positives()
        inside += m.low <= rate <= m.high
    assert t.rank == 6 and m.value == pytest.approx(6 / 121) and m.n == 120
    assert np.mean(rates) == pytest.approx(6 / 121, abs=0.004) and 0.92 < inside / 400 < 0.98


def test_too_few_clean_images_for_a_rate_are_said():
    t = Threshold.of(torch.arange(50.0), 0.01)
    assert t.value == 49 and t.rank == 1 and "takes 99" in t.limit
    assert (
        not Threshold.of(torch.arange(99.0), 0.01).limit
        and Threshold.of(torch.arange(99.0), 0.01).value == 98
    )


# ---------------------------------------------------------------------------------------------- the
# verb


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A small CLIP, not trained, as a run's directory."""
    folder = tmp_path_factory.mktemp("served")
    runs = folder / "runs"
    words = [
        "train",
        "scenes:count=300",
        "--objective",
        "clip:epochs=1,batch=64",
        "--runs",
        str(runs),
    ]
    assert main([*words, "--network", "clip_small:width=8,dim=32"]) == 0
    return runs, next(runs.glob("train-*")).name


def ask(capsys, served, *words):
    runs, train = served
    status = main(["check", train, *words, "--runs", str(runs), "--json", "full"])
    out = capsys.readouterr()
    return status, json.loads(out.out) if status in (0, 4) else out.err


CLEAN = ("--clean", "scenes:count=120,split=test,seed=3")


def test_the_verb_scores_flags_and_measures(served, capsys):
    status, manifest = ask(
        capsys,
        served,
        "scenes:count=90,split=test",
        *CLEAN,
        "--check",
        "masking_path:paths=1",
        "bdetclip",
        "strip:count=20",
        "scale_up",
        "--trigger",
        "patch:size=6",
        "--rate",
        "0.1",
    )
    assert status == 0
    m = manifest["metrics"]
    for name in ("masking_path", "bdetclip", "strip", "scale_up"):
        assert (
            m[f"{name}.flagged"]["n"] == 90
            and m[f"{name}.caught"]["n"] == m[f"{name}.false_positives"]["n"] == 45
        )
        assert (
            m[f"{name}.expected_false_positives"]["value"] == pytest.approx(6 / 61)
            and 0 <= m[f"{name}.auroc"]["value"] <= 1
        )
    folder = next(
        p.parent
        for p in served[0].glob("check-*/manifest.json")
        if json.loads(p.read_text()) == manifest
    )
    table = pq.read_table(folder / "scores.parquet").to_pydict()
    assert len(table["id"]) == 90 and sum(table["triggered"]) == 45
    cut = m["bdetclip.threshold"]["value"]
    assert table["bdetclip.flagged"] == [v > cut for v in table["bdetclip"]]
    flagged = json.loads((folder / "flagged.json").read_text())
    assert len(flagged["strip"]) == round(m["strip.flagged"]["value"] * 90)
    assert all(len(row["box"]) == 4 for row in flagged["masking_path"])
    assert pq.read_table(folder / "clean.parquet").num_rows == 60
    page = (folder / "report.html").read_text()
    assert (
        "could not be made" not in page
        and "Side by side" in page
        and "Most suspicious to scale up" not in page
    )
    assert Run(folder).manifest["notes"]["clean"] == {"calibrating": 60, "thresholds": 60}


def test_without_a_truth_it_says_what_a_flag_is_worth(served, capsys):
    status, manifest = ask(
        capsys,
        served,
        "scenes:count=40,split=test",
        *CLEAN,
        "--check",
        "bdetclip",
        "--rate",
        "0.001",
    )
    assert status == 0 and set(manifest["metrics"]) == {
        f"bdetclip.{k}" for k in ("flagged", "threshold", "expected_false_positives")
    }
    assert "takes 999" in manifest["notes"]["limits"][0]
    folder = next(
        p.parent
        for p in served[0].glob("check-*/manifest.json")
        if json.loads(p.read_text()) == manifest
    )
    assert "takes 999" in (folder / "report.html").read_text()


def test_a_poison_run_brings_the_truth(served, capsys):
    runs = served[0]
    words = [
        "--poison",
        "backdoor:count=20",
        "--trigger",
        "patch:size=6",
        "--target",
        "striped star",
        "--runs",
        str(runs),
    ]
    assert main(["poison", "scenes:count=600", *words]) == 0
    poison = next(runs.glob("poison-*")).name
    capsys.readouterr()
    status, manifest = ask(capsys, served, poison, *CLEAN, "--check", "bdetclip")
    assert status == 0 and manifest["metrics"]["bdetclip.caught"]["n"] == 20
    status, output = ask(
        capsys, served, poison, *CLEAN, "--check", "bdetclip", "--trigger", "patch:size=6"
    )
    assert status == 2 and "poisoned already" in output


def test_bad_input_is_one_line(served, capsys):
    images = "scenes:count=40,split=test"
    cases = [
        ((images,), "give --clean"),
        ((images, "--clean", images), "among the clean ones"),
        ((images, "--clean", "scenes:count=3,split=test,seed=3"), "at least 4"),
        ((images, *CLEAN, "--rate", "0"), "rate must be"),
        ((images, *CLEAN, "--check", "strip:count=500"), "count=60"),
        ((images, *CLEAN, "--check", "none_such"), "no check 'none_such'"),
        (
            (images, *CLEAN, "--check", "strip:count=20", "--classifier", "own"),
            "without a head of its own",
        ),
    ]
    for words, expected in cases:
        status, output = ask(capsys, served, *words)
        assert status == 2 and expected in output.splitlines()[-1]
    status, manifest = ask(capsys, served, images, *CLEAN, "--check", "bdetclip", "strip:count=500")
    assert (
        status == 4
        and "strip" in manifest["notes"]["incomplete"][0]
        and "bdetclip.flagged" in manifest["metrics"]
    )


def test_an_encoder_is_no_reference_of_its_own(monkeypatch):
    monkeypatch.setattr(cross_encoder, "open_reference", lambda *a: encoder())
    check = registry.make("check", "cross_encoder:reference=itself")
    with pytest.raises(UserError, match="the reference is this encoder itself"):
        check(encoder(), colours(5), clean=colours(60, 1))


def test_checks_of_images_refuse_texts(tmp_path, served, capsys):
    for name in ("new", "clean"):
        rows = "".join(f"{name} text {i}\n" for i in range(60))
        (tmp_path / f"{name}.csv").write_text(f"caption\n{rows}")
    words = (f"texts:path={tmp_path}/new.csv", "--clean", f"texts:path={tmp_path}/clean.csv")
    status, message = ask(capsys, served, *words, "--check", "decoder")
    assert status == 2
    assert "check decoder: it reads images, and these records are texts" in message
