"""Traces of a training, and the detectors that read them: each against a plain version."""

import gc
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from detection.test_detectors import Fake, clean
from hypothesis import given, settings
from hypothesis import strategies as st

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.detection import training_traces
from bezoar.errors import UserError

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


@pytest.mark.parametrize("name", ["loss_trace", "safeclip"])
def test_a_nested_spec_is_read_written_and_refused(name):
    detector = make(f"{name}:network=({NETWORK}),side=32")
    assert detector.network == NETWORK and make(registry.spec(detector)) == detector
    with pytest.raises(UserError, match=r"'clip_smal' \(did you mean clip_small"):
        make(f"{name}:network=clip_smal")


def test_a_first_value_may_be_a_spec_in_brackets():
    text = "cross_encoder:(clip_small:width=4,dim=16),groups=32"
    assert registry.parse_spec("detector", text)[1] == {
        "reference": "(clip_small:width=4,dim=16)",
        "groups": "32",
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
        own_cosine = float(z[i] @ w[i])
        rest = [float(z[i] @ text[c]) for c in others if c != pairs.captions[i]]
        share = math.exp(own_cosine / 0.07) / (
            math.exp(own_cosine / 0.07) + sum(math.exp(r / 0.07) for r in rest)
        )
        assert float(traced.agreement[-1, i]) == pytest.approx(own_cosine, abs=1e-4)
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
    pairs, reports, trained = clean(40), [], []

    def fit(*_, on_epoch_end, report, **__):
        trained.append([on_epoch_end(epoch) for epoch in (1, 2, 3)])
        report(3, 3, 0.5)

    monkeypatch.setattr(training_traces.loop, "fit", fit)
    for when in ("late", "early", "rise"):
        make(f"loss_trace:when={when},{SMALL}")(Fake(), pairs, report=lambda *a: reports.append(a))
    assert len(trained) == len(reports) == 1 and id(pairs) in training_traces._traces
    make(f"loss_trace:seed=1,{SMALL}")(Fake(), pairs)
    assert len(trained) == 2
    place = id(pairs)
    del pairs
    gc.collect()
    assert place not in training_traces._traces


def test_a_trace_ends_where_nothing_more_is_asked_and_begins_as_a_longer_one(traced):
    pairs, reports = clean(100), []
    short = training_traces.trace(
        pairs, NETWORK, OBJECTIVE, 0, CPU, report=lambda *a: reports.append(a), upto=2
    )
    assert torch.equal(short.loss, traced.loss[:2]) and torch.equal(
        short.agreement, traced.agreement[:2]
    )
    assert reports[-1][0] == reports[-1][1] and len(reports) == reports[-1][1]
    assert training_traces.trace(pairs, NETWORK, OBJECTIVE, 0, CPU, upto=1) is short
    assert torch.equal(training_traces.trace(pairs, NETWORK, OBJECTIVE, 0, CPU).loss, traced.loss)


def test_progress_is_reported():
    reports = []
    training_traces.trace(
        clean(64), NETWORK, "clip:epochs=1,batch=32", 0, CPU, report=lambda *a: reports.append(a)
    )
    assert [(a, b) for a, b, _ in reports] == [(1, 2), (2, 2)] and "loss" in reports[0][2]


def test_what_cannot_be_trained_on_is_refused():
    for text in ("loss_trace", "safeclip"):
        with pytest.raises(UserError, match="needs captions"):
            make(text)(Fake(), replace(clean(30), captions=()))
    with pytest.raises(UserError, match="text tower"):
        make("loss_trace:network=tower")(Fake(), clean(30))
    with pytest.raises(UserError, match="fewer than one batch"):
        make("loss_trace")(Fake(), clean(30))


@pytest.mark.parametrize(
    "text",
    [
        "loss_trace:epochs=7",
        "loss_trace:epochs=0",
        "loss_trace:side=0",
        "safeclip:drop=1",
        "safeclip:together=0",
        "cognitive_distillation:steps=0",
        "cognitive_distillation:gamma=-1",
        "repetition:least=1",
        "repetition:pool=8",
    ],
)
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
    assert torch.allclose(turned.select(pairs.ids).values, scores.values, rtol=1e-4, atol=1e-4)


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
        scores = make(f"loss_trace:{text},epochs=2,{SMALL}")(Fake(), pairs)
        assert scores.ids == pairs.ids and torch.allclose(scores.values, values)


def test_clip_score_by_an_independent_model(pairs, tmp_path):
    study = training_traces.SmallModel.build(pairs, NETWORK, 5, CPU)
    study.encoder.save(tmp_path)
    detector = make(f"clip_score:{tmp_path}")
    assert torch.allclose(
        detector(Fake(), pairs).values, make("clip_score")(study.encoder, pairs).values, atol=1e-5
    )
    assert tmp_path / "encoder.safetensors" in detector.files()
    assert make("clip_score").files() == []
    with pytest.raises(UserError, match="no network"):
        make("clip_score:nowhere")(Fake(), pairs)
