"""Cognitive distillation against a plain version, one image at a time."""

import numpy as np
import pytest
import torch
from detection.test_detectors import Fake, backdoored, clean

from bezoar import registry
from bezoar.data.randomness import draws
from bezoar.detection.detectors import cognitive_distillation
from bezoar.evaluation import stats


def make(text: str):
    return registry.make("detector", text)


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
    detector = cognitive_distillation.CognitiveDistillation(
        steps=steps, gamma=0.001, beta=0.1, seed=3
    )
    scores = detector(Fake(), pairs).values
    colours = torch.from_numpy(draws(3, pairs.ids, 3 * steps, "distillation")).view(5, steps, 3)
    for i in range(5):
        mask = plain_mask(Fake(), pairs.images[i], colours[i], 0.001, 0.1, 0.1)
        assert float(scores[i]) == pytest.approx(-float(mask.mean()), abs=2e-3)


def test_cognitive_distillation_depends_on_no_batch_and_finds_triggers(monkeypatch):
    pairs, truth = backdoored(24, 6)
    detector = make("cognitive_distillation:steps=25,gamma=0.00006,beta=0.06")
    scores = detector(Fake(True), pairs)
    assert ((scores.values >= -1) & (scores.values <= 0)).all()
    assert stats.auroc(scores.values.numpy(), truth) > 0.9
    monkeypatch.setitem(cognitive_distillation.BATCH_VALUES, "cpu", 7 * 3 * 32 * 32)
    order = np.random.default_rng(0).permutation(24)[:9]
    turned = detector(Fake(True), pairs.take(order))
    assert torch.allclose(turned.values, scores.values[order], atol=1e-3)
    assert detector.passes(24) == 24 * 26
