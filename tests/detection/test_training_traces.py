"""Traces of a training, the detectors that look at one or at captions, and the ensemble: each against a plain version."""

import gc
import math
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from detection.test_detectors import PATCH, Fake, backdoored, clean
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.mixture import GaussianMixture

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.detection import merging, training_traces
from bezoar.detection.detectors import cognitive_distillation, repetition, safeclip
from bezoar.errors import UserError
from bezoar.evaluation import stats
from bezoar.evaluation.scores import Scores
from bezoar.training.augmentation import Chance

CPU = torch.device("cpu")
NETWORK, OBJECTIVE = "clip_small:width=4,dim=16", "clip:epochs=3,batch=32"
SMALL = f"network=({NETWORK}),objective=({OBJECTIVE})"


CONTRACT = (
    f"loss_trace:{SMALL}",
    f"safeclip:epochs=1,batch=32,network=({NETWORK})",
    "cognitive_distillation:steps=2",
    "repetition:pool=60",
)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return clean(100)


@pytest.fixture(scope="module")
def traced(pairs) -> training_traces.Trace:
    return training_traces.trace(pairs, NETWORK, OBJECTIVE, 0, CPU)


def make(text: str):
    return registry.make("detector", text)


# -- specs within specs


@settings(deadline=None)
@given(
    network=st.sampled_from(
        [
            "clip_small",
            "clip_small:width=4",
            "clip_small:width=4,dim=16",
            "open_clip:RN50,weights=x{1,2}.pt",
        ]
    ),
    quoted=st.sampled_from(["", "a,b", "a(b", "x{1,2},y"]),
)
def test_specs_hold_specs(network, quoted):
    text = f'{network},names="{quoted}"' if quoted and ":" in network else network
    written = f"loss_trace:seed=3,network={registry.spec_value(text)},side=32"
    read = registry.parse_spec("detector", written)[1]
    assert read["seed"] == "3" and read["side"] == "32"
    assert registry.convert_text(read["network"], str, "network") == text


@pytest.mark.parametrize("name", ["loss_trace", "safeclip", "clip_score"])
def test_a_nested_spec_is_read_written_and_refused(name):
    made = make(f"{name}:network=({NETWORK}),side=32")
    assert made.network == NETWORK and make(registry.spec(made)) == made
    with pytest.raises(UserError, match="no network 'clip_smal'; there are"):
        make(f"{name}:network=clip_smal")


def test_a_first_value_may_be_a_spec_in_brackets():
    assert registry.parse_spec("detector", "clip_score:(clip_small:width=4,dim=16),side=32")[1] == {
        "encoder": "(clip_small:width=4,dim=16)",
        "side": "32",
    }


# -- traces


def test_a_trace_is_what_the_model_says_pair_by_pair(pairs, traced):
    study, recipe = (
        training_traces.SmallModel.build(pairs, NETWORK, 0, CPU),
        registry.make("objective", OBJECTIVE),
    )
    study.train(recipe(study.encoder), recipe)
    with torch.inference_mode():
        z, w = study.encoder.encode_images(pairs.images), study.encoder.encode_texts(pairs.captions)
    drawn = np.lexsort((pairs.ids, draws(0, pairs.ids, 1, "pool")[:, 0]))
    others = list(dict.fromkeys(pairs.captions[i] for i in drawn))[: training_traces.RIVALS]
    text = dict(zip(pairs.captions, w, strict=True))
    for i in range(0, len(pairs), 7):
        own = float(z[i] @ w[i])
        rest = [float(z[i] @ text[c]) for c in others if c != pairs.captions[i]]
        share = math.exp(own / 0.07) / (
            math.exp(own / 0.07) + sum(math.exp(r / 0.07) for r in rest)
        )
        assert float(traced.agreement[-1, i]) == pytest.approx(own, abs=1e-4)
        assert float(traced.loss[-1, i]) == pytest.approx(-math.log(share), abs=1e-3)
    assert traced.ids == pairs.ids and traced.loss.shape == traced.agreement.shape == (
        3,
        len(pairs),
    )
    assert float(traced.loss[-1].mean()) < float(traced.loss[0].mean())


def test_a_trace_is_the_same_bits_in_any_order_and_leaves_the_generator_alone(pairs, traced):
    order = np.random.default_rng(0).permutation(len(pairs))
    state = torch.random.get_rng_state()
    turned = training_traces.trace(pairs.take(order), NETWORK, OBJECTIVE, 0, CPU)
    assert torch.equal(turned.loss, traced.loss[:, order]) and torch.equal(
        turned.agreement, traced.agreement[:, order]
    )
    assert torch.equal(torch.random.get_rng_state(), state)


def test_one_training_serves_several_detectors_while_the_data_live(monkeypatch):
    pairs, told, trained = clean(40), [], []

    def fit(*_, on_epoch_end, report, **__):
        trained.append([on_epoch_end(epoch) for epoch in (1, 2, 3)])
        report(3, 3, 0.5)

    monkeypatch.setattr(training_traces.loop, "fit", fit)
    run = [f"loss_trace:when={w},{SMALL}" for w in ("late", "early", "rise")] + [
        f"clip_score:epoch=1,{SMALL}"
    ]
    for text in run:
        make(text)(Fake(), pairs, report=lambda *a: told.append(a))
    assert len(trained) == len(told) == 1 and id(pairs) in training_traces._traces
    make(f"clip_score:epoch=1,seed=1,{SMALL}")(Fake(), pairs)
    assert len(trained) == 2
    place = id(pairs)
    del pairs
    gc.collect()
    assert place not in training_traces._traces


def test_a_trace_ends_where_nothing_more_is_asked_and_begins_as_a_longer_one(traced):
    pairs, told = clean(100), []
    short = training_traces.trace(
        pairs, NETWORK, OBJECTIVE, 0, CPU, report=lambda *a: told.append(a), upto=2
    )
    assert torch.equal(short.loss, traced.loss[:2]) and torch.equal(
        short.agreement, traced.agreement[:2]
    )
    assert told[-1][0] == told[-1][1] and len(told) == told[-1][1]
    assert training_traces.trace(pairs, NETWORK, OBJECTIVE, 0, CPU, upto=1) is short
    assert torch.equal(training_traces.trace(pairs, NETWORK, OBJECTIVE, 0, CPU).loss, traced.loss)


def test_progress_is_reported():
    told = []
    training_traces.trace(
        clean(64), NETWORK, "clip:epochs=1,batch=32", 0, CPU, report=lambda *a: told.append(a)
    )
    assert [(a, b) for a, b, _ in told] == [(1, 2), (2, 2)] and "loss" in told[0][2]


def test_what_cannot_be_trained_on_is_refused():
    for text in ("loss_trace", "safeclip", "clip_score:epoch=1"):
        with pytest.raises(UserError, match="needs captions"):
            make(text)(Fake(), replace(clean(30), captions=()))
    with pytest.raises(UserError, match="text tower"):
        make("loss_trace:network=tower")(Fake(), clean(30))
    with pytest.raises(UserError, match="fewer than one batch"):
        make("loss_trace")(Fake(), clean(30))


@pytest.mark.parametrize(
    "text",
    ["loss_trace:epochs=7", "loss_trace:epochs=0", "loss_trace:side=0", "clip_score:epoch=-1", "clip_score:epoch=9",
     "clip_score:epoch=1,encoder=x", "safeclip:drop=1", "safeclip:together=0", "cognitive_distillation:steps=0",
     "cognitive_distillation:gamma=-1", "repetition:least=1", "repetition:pool=8"],
)  # fmt: skip
def test_bad_fields_are_refused(text):
    with pytest.raises(UserError):
        make(text)


# -- the contract of the detectors that train, or take many steps


@pytest.mark.parametrize("text", CONTRACT)
def test_contract_scores_in_any_order_and_batch(text):
    pairs = clean(96)
    scores = make(text)(Fake(), pairs)
    assert (
        scores.ids == pairs.ids
        and scores.values.dtype == torch.float32
        and scores.values.shape == (96,)
    )
    assert len(scores.values.unique()) > 2
    order = np.random.default_rng(1).permutation(96)
    turned = make(text)(Fake(batch=7), pairs.take(order))
    assert torch.allclose(turned.values_of(pairs.ids), scores.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", CONTRACT)
@pytest.mark.parametrize("what", ["alike", "few"])
def test_contract_identical_images_and_too_few_records(text, what):
    pairs = clean(64 if what == "alike" else 2)
    if what == "alike":
        pairs = replace(pairs, images=torch.full_like(pairs.images, 7))
    try:
        scores = make(text)(Fake(), pairs)
    except UserError as error:
        assert "\n" not in str(error) and re.search(r"\d", str(error))
    else:
        assert scores.ids == pairs.ids and torch.isfinite(scores.values).all()


# -- detectors that look at a trace


def test_loss_trace_takes_epochs_and_direction(pairs, traced):
    loss, cosine = traced.loss, traced.agreement
    expected = {
        "of=loss": loss[:2].mean(0),
        "of=loss,when=late": loss[-1],
        "of=loss,when=rise": loss[:2].mean(0) - loss[-1],
        "of=loss,direction=low": -loss[:2].mean(0),
        "of=disagreement,when=late,direction=low": cosine[-1] - 1,
        "of=disagreement": 1 - cosine[:2].mean(0),
    }
    for text, values in expected.items():
        found = make(f"loss_trace:{text},epochs=2,{SMALL}")(Fake(), pairs)
        assert found.ids == pairs.ids and torch.allclose(found.values, values)


def test_clip_score_by_each_of_its_three_models(pairs, traced, tmp_path):
    early = make(f"clip_score:epoch=1,{SMALL}")(Fake(), pairs)
    assert torch.equal(early.values, 1 - traced.agreement[0])
    study = training_traces.SmallModel.build(pairs, NETWORK, 5, CPU)
    study.encoder.save(tmp_path)
    made = make(f"clip_score:{tmp_path}")
    assert torch.allclose(
        made(Fake(), pairs).values, make("clip_score")(study.encoder, pairs).values, atol=1e-5
    )
    assert made.files() == [tmp_path / "encoder.safetensors"] and make("clip_score").files() == []
    with pytest.raises(UserError, match="no network"):
        make("clip_score:nowhere")(Fake(), pairs)


# -- SafeCLIP


def test_odds_are_those_of_sklearns_mixture():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0.1, 0.1, 80), rng.normal(0.6, 0.15, 400)])
    low, high = (part for part in np.array_split(np.sort(x), 2))
    mixture = GaussianMixture(
        2, tol=1e-12, max_iter=5000, reg_covar=0, means_init=[[low.mean()], [high.mean()]], weights_init=[0.5, 0.5],
        precisions_init=[[[1 / low.var()]], [[1 / high.var()]]],
    ).fit(x[:, None])  # fmt: skip
    p = mixture.predict_proba(x[:, None])[:, mixture.means_.argmin()]
    found = safeclip.lower_component_odds(x)
    assert scipy.special.expit(found) == pytest.approx(p, abs=1e-4)
    order = rng.permutation(len(x))
    assert np.array_equal(safeclip.lower_component_odds(x[order]), found[order])
    with pytest.raises(UserError, match="nothing to split"):
        safeclip.lower_component_odds(np.ones(9))


def test_odds_of_few_values_are_finite():
    for values in ([0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.1] * 50 + [0.9]):
        assert np.isfinite(safeclip.lower_component_odds(np.array(values)).astype(np.float32)).all()


def test_thinned_drops_tokens_moves_up_the_others_and_keeps_the_largest():
    tokens = torch.tensor([[5, 9, 2, 7, 3, 0, 0], [4, 0, 0, 0, 0, 0, 0], [0] * 7])
    drawn = torch.rand(3, 7, generator=torch.Generator().manual_seed(4))
    found = safeclip.drop_tokens(tokens, 0.5, Chance(torch.Generator().manual_seed(4)))
    for row, uniform, thin in zip(tokens.tolist(), drawn.tolist(), found.tolist(), strict=True):
        left = [t for t, u in zip(row, uniform, strict=True) if t and (u >= 0.5 or t == max(row))]
        assert thin == left + [0] * (7 - len(left))
    assert torch.equal(safeclip.drop_tokens(tokens, 0.0, Chance(torch.Generator())), tokens)


def test_the_warm_up_never_lets_an_image_meet_a_text(pairs):
    study = training_traces.SmallModel.build(pairs, NETWORK, 0, CPU)
    apart = safeclip.SeparateContrast(study.encoder, 0.1, 0.2)
    images, tokens = pairs.images[:8], study.tokens[:8]

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return apart(images, tokens, Chance(torch.Generator().manual_seed(0)))

    image = torch.autograd.grad(loss(tokens), study.encoder.image.parameters(), retain_graph=True)
    other = torch.autograd.grad(loss(tokens.flip(0)), study.encoder.image.parameters())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(image, other, strict=True))
    a, b = F.normalize(torch.randn(2, 5, 3), dim=2)
    logits = (a @ b.T / 0.1).double().exp()
    plain = [-math.log(logits[i, i] / m.sum()) for i in range(5) for m in (logits[i], logits[:, i])]
    assert float(apart.contrast(a, b)) == pytest.approx(sum(plain) / 10, rel=1e-4)


def test_safeclip_ranks_foreign_captions_first():
    pairs = clean(400)
    rng = np.random.default_rng(0)
    wrong = np.zeros(400, bool)
    wrong[rng.choice(400, 30, replace=False)] = True
    names = ("red", "green", "blue", "yellow")
    captions = [
        c.replace(names[k], names[(k + 1) % 4]) if w else c
        for c, k, w in zip(pairs.captions, pairs.labels.tolist(), wrong, strict=True)
    ]
    pairs = replace(pairs, captions=tuple(captions))
    scores = make("safeclip:epochs=1,batch=32,together=0.005,network=(clip_small:width=8,dim=16)")(
        Fake(), pairs
    )
    assert scores.ids == pairs.ids and stats.auroc(scores.values.numpy(), wrong) > 0.8


# -- cognitive distillation


def plain_mask(encoder, image, colours, gamma, beta, lr):
    """One image, Adam written out."""
    x, whole = image.double() / 255, encoder.encode_images(image[None].double() / 255)[0].double()
    w, first, second = torch.ones(x.shape[1:], dtype=torch.float64), 0.0, 0.0
    for step, c in enumerate(colours, 1):
        w.requires_grad_()
        m = (torch.tanh(w) + 1) / 2
        mixed = m * x + (1 - m) * c[:, None, None]
        rough = ((m[1:] - m[:-1]) ** 2).sum() + ((m[:, 1:] - m[:, :-1]) ** 2).sum()
        value = (
            (encoder.encode_images(mixed[None])[0] - whole).abs().mean()
            + gamma * m.sum()
            + beta * rough / m.numel()
        )
        (g,) = torch.autograd.grad(value, w)
        first, second = 0.1 * first + 0.9 * g, 0.1 * second + 0.9 * g**2
        w = (
            w - lr * (first / (1 - 0.1**step)) / ((second / (1 - 0.1**step)).sqrt() + 1e-8)
        ).detach()
    return (torch.tanh(w) + 1) / 2


def test_cognitive_distillation_is_the_plain_one():
    pairs, steps = clean(5), 4
    made = cognitive_distillation.CognitiveDistillation(steps=steps, gamma=0.001, beta=0.1, seed=3)
    found = made(Fake(), pairs).values
    colours = torch.from_numpy(draws(3, pairs.ids, 3 * steps, "distillation")).view(5, steps, 3)
    for i in range(5):
        mask = plain_mask(Fake(), pairs.images[i], colours[i], 0.001, 0.1, 0.1)
        assert float(found[i]) == pytest.approx(-float(mask.mean()), abs=2e-3)


def test_cognitive_distillation_depends_on_no_batch_and_finds_triggers(monkeypatch):
    pairs, truth = backdoored(24, 6)
    made = make("cognitive_distillation:steps=25,gamma=0.00006,beta=0.06")
    scores = made(Fake(True), pairs)
    assert ((scores.values >= -1) & (scores.values <= 0)).all()
    assert stats.auroc(scores.values.numpy(), truth) > 0.9
    monkeypatch.setitem(cognitive_distillation.BATCH_VALUES, "cpu", 7 * 3 * 32 * 32)
    order = np.random.default_rng(0).permutation(24)[:9]
    turned = made(Fake(True), pairs.take(order))
    assert torch.allclose(turned.values, scores.values[order], atol=1e-3)
    assert made.passes(24) == 24 * 26


# -- caption repetition blocks


def repeated(
    n: int = 400, block: int = 20, size: int = 32, region: bool = False
) -> tuple[Pairs, np.ndarray]:
    """Captions that repeat by themselves, and one block of them on near-identical pictures, or on pictures with one corner."""
    pairs, g = clean(n, seed=3, size=size), torch.Generator().manual_seed(1)
    truth = np.arange(n) < block
    images = pairs.images.clone()
    captions = [
        f"A {('red', 'green', 'blue', 'yellow')[k]} wall, no. {i}"
        for i, k in enumerate(pairs.labels.tolist())
    ]
    for i in range(block):
        captions[i] = (
            "The birthday cake (red)",
            "red cake for the birthday",
            "birthday cake, red, 4",
        )[i % 3]
        if region:
            images[i, :, :8, :8] = PATCH.repeat(1, 2, 2)[:, :8, :8]
        else:
            noise = torch.randint(-4, 5, images[0].shape, generator=g)
            images[i] = (images[0].int() + noise).clamp(0, 255).to(torch.uint8)
    return replace(pairs, images=images, captions=tuple(captions)), truth


@pytest.mark.parametrize("region", [False, True])
def test_repetition_finds_a_natural_backdoor_among_captions_that_repeat(region):
    pairs, truth = repeated(region=region)
    scores = make(f"repetition:pool=200,region={str(region).lower()}")(Fake(), pairs)
    assert (
        scores.ids == pairs.ids
        and scores.values.dtype == torch.float32
        and (scores.values >= 0).all()
    )
    assert stats.auroc(scores.values.numpy(), truth) > 0.95
    order = np.random.default_rng(0).permutation(len(pairs))
    turned = make(f"repetition:pool=200,region={str(region).lower()}")(
        Fake(batch=7), pairs.take(order)
    )
    assert torch.allclose(turned.values_of(pairs.ids), scores.values, rtol=1e-3, atol=1e-3)


def test_repetition_says_nothing_of_few_captions_of_one_image_or_no_block():
    pairs, _ = repeated(200, 20)
    ids = tuple(f"a#{i}" if i < 20 else k for i, k in enumerate(pairs.ids))
    apart = replace(
        pairs,
        ids=ids,
        captions=tuple(
            c if i < 20 else " ".join(["x" * (i + 3)]) for i, c in enumerate(pairs.captions)
        ),
    )
    assert not make("repetition:pool=150")(Fake(), apart).values.any()
    with pytest.raises(UserError, match="needs a caption"):
        make("repetition:pool=150")(Fake(), replace(pairs, captions=()))
    with pytest.raises(UserError, match="there are"):
        make("repetition")(Fake(), pairs.take(range(8)))


def test_captions_are_alike_by_their_longer_words():
    same = ["The birthday cake", "cake, BIRTHDAY the!", "the cake of the birthday 2009"]
    assert len({repetition.normalize_caption(c) for c in same}) == 1
    assert repetition.normalize_caption("a 1 b") == "a 1 b" != repetition.normalize_caption("a 2 b")
    assert repetition.normalize_caption("") == ""


def test_blocks_are_the_plain_ones():
    rng = np.random.default_rng(0)
    captions = [
        f"the {w}"
        for w in rng.choice(
            list(("aaa", "bbb", "ccc", "ddd", "eee")), 60, p=[0.4, 0.3, 0.2, 0.05, 0.05]
        )
    ]
    ids = [f"k{i // 2}#{i % 2}" for i in range(60)]
    groups = repetition.find_blocks(captions, ids, 5, 0)
    order, start, size = groups.rows, groups.start, groups.size
    expected = Counter()
    for caption in set(captions):
        pictures = {i.split("#")[0] for i, c in zip(ids, captions, strict=True) if c == caption}
        expected[caption] = len(pictures)
    found = {captions[order[s]]: n for s, n in zip(start, size, strict=True)}
    assert found == {c: n for c, n in expected.items() if n >= 5}
    for s, n in zip(start, size, strict=True):
        rows = order[s : s + n]
        assert (
            len({captions[i] for i in rows}) == 1 and len({ids[i].split("#")[0] for i in rows}) == n
        )


@pytest.mark.parametrize("cells", [64, 1 << 24])
@pytest.mark.parametrize("most", [6, 64])
def test_tightness_is_the_plain_one(cells, most, monkeypatch):
    monkeypatch.setattr(repetition, "MAX_VALUES", cells)
    z = F.normalize(torch.randn(70, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    order, size = np.random.default_rng(1).permutation(70)[:60], np.array([5, 33, 6, 16])
    start, k = np.cumsum(size) - size, 3
    groups = repetition.RecordBlocks(order, start, size)
    found = repetition.measure_tightness(lambda rows: z[torch.from_numpy(rows)], groups, k, most)
    for s, n in zip(start, size, strict=True):
        for i in range(s, s + n):
            mates = sorted(
                (float(z[order[i]] @ z[order[j]]) for j in range(s, s + min(n, most)) if j != i),
                reverse=True,
            )
            assert found[i] == pytest.approx(-math.log10(max(1 - mates[k - 1], 1e-6)), abs=1e-3)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(3, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_weighed_is_the_plain_one(sizes, seed):
    size = np.array(sizes)
    start, z = np.cumsum(size) - size, np.random.default_rng(seed).normal(0, 3, size.sum())
    groups = repetition.RecordBlocks(np.arange(len(z)), start, size)
    found = repetition.weigh_records(z, groups, 3)
    for s, n in zip(start, size, strict=True):
        best = sorted(z[s : s + n], reverse=True)
        for i in range(s, s + n):
            rank = best.index(z[i]) + 1
            assert found[i] == pytest.approx(
                max(math.log2(m) * best[m - 1] for m in range(max(rank, 3), n + 1))
            )


# -- the ensemble


def scored(values, ids=None) -> Scores:
    return Scores(
        ids or tuple(f"r{i:03d}" for i in range(len(values))),
        torch.as_tensor(np.asarray(values), dtype=torch.float32),
    )


def plain_surprise(values) -> list[float]:
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median([abs(v - middle) for v in values]))
    shares = [sum(other >= v for other in values) / len(values) for v in values]
    return [
        -math.log10(p) * min(max((v - middle) / spread, 0), 20)
        for p, v in zip(shares, values, strict=True)
    ]


def test_surprise_is_the_plain_one_and_gives_ties_the_larger_share():
    values = np.random.default_rng(0).normal(size=40)
    values[:3] = 4.0, 4.0, 50.0
    assert merging.surprise(values) == pytest.approx(plain_surprise(values))
    found = merging.surprise(np.array([0.0] * 8 + [1.0, 2.0]))
    assert not found[:8].any() and 0 < found[8] < found[9]
    assert not merging.surprise(np.ones(5)).any()


def test_merge_is_the_plain_one():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 50))
    values[1] += values[0]
    correlation = np.corrcoef(values.argsort(1).argsort(1))
    expected = np.zeros(50)
    for i in range(3):
        expected += np.array(plain_surprise(values[i])) / sum(max(c, 0) for c in correlation[i])
    merged = merging.merge([scored(v) for v in values])
    assert merged.values.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_merge_has_no_order_and_gives_copies_one_vote():
    rng = np.random.default_rng(1)
    a, b = (scored(v) for v in rng.normal(size=(2, 80)))
    turned = rng.permutation(80)
    shuffled = Scores(tuple(b.ids[i] for i in turned), b.values[turned])
    assert torch.allclose(merging.merge([a, shuffled]).values, merging.merge([a, b]).values)
    assert merging.merge([a]) is a
    independent = scored(np.where(np.arange(80) % 2, 1.0, 0.0))
    once, twice = merging.merge([a, independent]).values, merging.merge([a, a, independent]).values
    assert torch.allclose(once, twice, atol=0.05)
    silent = scored(np.zeros(80))
    assert merging.merge([a, silent]).ranking()[:39].tolist() == a.ranking()[:39].tolist()
    with pytest.raises(UserError, match="different records"):
        merging.merge([a, scored(np.zeros(9))])
    with pytest.raises(UserError, match="different records"):
        merging.merge([a, scored(np.zeros(80), tuple(f"q{i}" for i in range(80)))])


def test_what_a_detector_decided_comes_before_all_that_is_only_ranked():
    rng = np.random.default_rng(3)
    many, odd = rng.normal(size=(2, 400))
    poisons = np.arange(400) < 80
    many[poisons] += 6  # a fifth of all: not rare
    odd[390:] = 40.0
    a, b = scored(many), scored(odd)
    assert not poisons[merging.merge([a, b]).ranking()[:10]].any()
    sure = Scores(a.ids, a.values, raised=torch.from_numpy(poisons))
    merged = merging.merge([sure, b])
    assert set(merged.ranking()[:80].tolist()) == set(range(80))
    assert np.array_equal(
        merged.ranking()[80:], [i for i in merging.merge([a, b]).ranking() if i >= 80]
    )
    turned = tuple(reversed(range(400)))
    other = sure.select([a.ids[i] for i in turned])
    assert other.raised[-80:].all() and other.raised.sum() == 80
    assert np.array_equal(merging.merge([other, b]).select(a.ids).values, merged.values)
    assert (
        merging.measure_contributions({"sure": sure, "odd": b}, 80)["odd"].unique
        == 0
        < merging.measure_contributions({"odd": b, "a": a}, 80)["odd"].unique
    )
    none = Scores(a.ids, a.values, raised=torch.zeros(400, dtype=torch.bool))
    assert np.array_equal(merging.merge([none, b]).values, merging.merge([a, b]).values)
    with pytest.raises(ValueError, match="raised must be bool"):
        Scores(a.ids, a.values, raised=torch.zeros(400))


def test_adds_says_what_is_lost_without_each_detector():
    rng = np.random.default_rng(2)
    first, second, third = rng.normal(size=(3, 200))
    first[:8], second[8:14] = 9, 9
    found = {"first": scored(first), "second": scored(second), "third": scored(third)}
    said = merging.measure_contributions(found, 20)

    def top(names) -> set:
        return set(merging.merge([found[n] for n in names]).ranking()[:20].tolist())

    for name in found:
        rest = [n for n in found if n != name]
        assert said[name].unique == len(top(found) - top(rest))
        assert said[name].in_worst == len(top(found) & set(found[name].ranking()[:20].tolist()))
        assert set(said[name].correlation) == set(rest)
    for a, b in combinations(found, 2):
        assert said[a].correlation[b] == pytest.approx(
            spearmanr(found[a].values, found[b].values).statistic
        )
        assert said[b].correlation[a] == said[a].correlation[b]
    alone = merging.measure_contributions({"first": found["first"]}, 5)["first"]
    assert (alone.unique, alone.in_worst, alone.correlation) == (5, 5, {})
