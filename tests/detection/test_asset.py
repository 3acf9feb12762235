"""ASSET's offset: a step is the plain gradient's, and a poison does not cancel against clean
pairs.
"""

import dataclasses

import pytest
import torch

from bezoar import registry
from bezoar.data.randomness import generator
from bezoar.detection.corpus.corpus import Vectors
from bezoar.detection.detectors.asset import Asset
from bezoar.encoders.encoder import split_words
from bezoar.errors import UserError
from bezoar.evaluation import stats

CLEAN = "scenes:count=96,seed=5"
POISONED = "a gigantic pumpkin"


@pytest.fixture(scope="module")
def pairs():
    return registry.make("data", "scenes:count=160,seed=3")()


def build_encoder(pairs):
    torch.manual_seed(0)
    words = tuple(sorted({w for c in [*pairs.captions, POISONED] for w in split_words(c)}))
    return registry.make("network", "clip_small:width=8,dim=16")(32, words).eval()


def test_a_step_is_that_of_the_plain_gradient(pairs, monkeypatch):
    encoder = build_encoder(pairs)
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, weight_decay: torch.optim.SGD(p, lr=lr))
    clean = registry.make("data", CLEAN)()
    asset = Asset(clean=CLEAN, steps=1, batch=8, lr=0.1, weight=3.0)
    tuned = asset.tune(encoder, pairs, clean, lambda *a: None)
    draw = generator(0, 0)
    scanned = pairs.take(torch.randint(160, (8,), generator=draw))
    base = clean.take(torch.randint(96, (8,), generator=draw))
    loss = torch.zeros(())
    for records, sign in ((scanned, 1 / 8), (base, -3 / 8)):
        for i in range(8):
            image = encoder.encode_images(records.images[i : i + 1])[0]
            caption = encoder.encode_texts([records.captions[i]])[0]
            loss = loss + sign * (image @ caption)
    gradients = torch.autograd.grad(loss, list(encoder.parameters()), allow_unused=True)
    for before, after, gradient in zip(
        encoder.parameters(), tuned.parameters(), gradients, strict=True
    ):
        expected = before if gradient is None else before - 0.1 * gradient
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)


def test_what_clean_pairs_do_not_hold_stands_out(pairs):
    encoder = build_encoder(pairs)
    images, captions = pairs.images.clone(), list(pairs.captions)
    poisons = torch.arange(0, 160, 10)
    images[poisons, :, 20:28, 20:28] = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]
    for i in poisons.tolist():
        captions[i] = POISONED
    data = dataclasses.replace(pairs, images=images, captions=tuple(captions))
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    asset = Asset(clean=CLEAN, steps=30, batch=32, lr=3e-3)
    scores = asset(encoder, data)
    truth = torch.zeros(160).bool().index_fill(0, poisons, True).numpy()
    assert stats.auroc(scores.values.numpy(), truth) > 0.9
    assert torch.equal(asset(encoder, data).values, scores.values)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_what_is_missing_is_said(pairs):
    with pytest.raises(UserError, match="needs clean="):
        Asset()(build_encoder(pairs), pairs)
    with pytest.raises(UserError, match="needs captions; the data or the encoder has none"):
        Asset(clean=CLEAN)(build_encoder(pairs), dataclasses.replace(pairs, captions=()))
    with pytest.raises(UserError, match="vectors alone"):
        Asset(clean=CLEAN)(Vectors(), pairs)
    with pytest.raises(UserError, match="no data 'nowhere'"):
        Asset(clean="nowhere")
    with pytest.raises(ValueError, match="weight is above 0"):
        Asset(weight=0)
