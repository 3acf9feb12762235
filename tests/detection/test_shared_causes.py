"""Discriminants and features against slow plain versions; causes on drawn numbers."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from bezoar import Poison, Scan, Settings, Train, execute, registry
from bezoar.detection import shared_causes, tower_features, training_traces
from bezoar.detection.shared_causes import Cause, Discriminants, Support
from bezoar.encoders.encoder import PIXELS_AT_ONCE, Encoder, Preprocess


def draw_records(n=6000, groups=20, features=60, poisons=60, seed=0):
    """Records whose group shifts some features, and poisons of group 0 that are like any others but
    for a shift of their own. Most poisons are mismatched, and a few of the others.
    """
    random = np.random.default_rng(seed)
    group = random.integers(0, groups, n)
    content = random.integers(0, groups, n)
    is_poison = (group == 0) & (np.cumsum(group == 0) <= poisons)
    content[~is_poison] = group[~is_poison]
    centres = 0.3 * random.normal(size=(groups, features))
    x = centres[content] + random.normal(size=(n, features))
    x[is_poison, :2] += 4
    mismatched = np.where(is_poison, random.random(n) < 0.8, random.random(n) < 0.1)
    x = (x - x.mean(0)) / x.std(0)
    tensors = torch.from_numpy(x).float(), torch.from_numpy(group), torch.from_numpy(mismatched)
    return (*tensors, torch.from_numpy(is_poison), torch.arange(n) % 2)


def test_scores_are_those_of_a_plain_discriminant():
    x, group, mismatched, _, half = draw_records(n=600, groups=3)
    scores = Discriminants.fit(x, group, half).score(mismatched)
    readings = {}
    for number in (0, 1):
        training = x[half != number].double().numpy()
        mean, covariance = training.mean(0), np.cov(training.T, bias=True)
        covariance += 0.05 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        for k in range(3):
            positives = (mismatched & (group == k) & (half != number)).numpy()
            difference = x.double().numpy()[positives].mean(0) - mean
            weights = np.linalg.solve(covariance, difference)
            weights /= np.sqrt(difference @ weights)
            readings[number, k] = (x.double().numpy() - mean) @ weights
    for k in range(3):
        reading = np.where(half == 0, readings[0, k], readings[1, k])
        threshold = np.quantile(reading[group != k], 0.99)
        member = (group == k).numpy()
        expected = reading[member] / threshold
        assert scores[member].numpy() == pytest.approx(expected, rel=1e-3, abs=1e-3)


def draw_misread(mismatched, is_poison, seed=1):
    """What a model misreads that saw no poison: most poisons, and a few of the others."""
    random = np.random.default_rng(seed)
    share = torch.from_numpy(random.random(len(mismatched)))
    return torch.where(is_poison, share < 0.85, share < 0.1)


def test_a_planted_cause_is_believed_and_no_other():
    x, group, mismatched, is_poison, half = draw_records()
    discriminants = Discriminants.fit(x, group, half)
    causes = shared_causes.find_causes(discriminants, mismatched)
    misread = draw_misread(mismatched, is_poison)
    supports = shared_causes.measure_support(causes, misread)
    believed = shared_causes.believe_causes(supports)
    assert [support.cause.group for support in believed] == [0]
    [cause] = shared_causes.sharpen_causes(discriminants, believed, misread)
    shown = torch.zeros(len(x), dtype=torch.bool)
    shown[cause.shown] = True
    assert (shown & is_poison).sum() >= 0.8 * is_poison.sum()
    assert (shown & ~is_poison).sum() <= 10


def test_a_faint_likeness_to_a_clear_cause_is_not_shown():
    x, group, _, is_poison, half = draw_records(poisons=20)
    rows = (group == 0).nonzero()[:, 0]
    faint = torch.zeros(len(x), dtype=torch.bool)
    faint[rows[20:60]] = True
    x[is_poison, :2] += 20
    x[faint, :2] += 4
    discriminants = Discriminants.fit(x, group, half)
    assert (discriminants.score(is_poison)[faint] >= 1).sum() >= 20
    cause = Cause(0, 0.9, rows, 2 * is_poison[rows].float())
    [cause] = shared_causes.sharpen_causes(discriminants, [Support(cause, 0.9, 0.9)], is_poison)
    assert is_poison[cause.shown].sum() == 20
    assert faint[cause.shown].sum() <= 4


def test_nothing_is_believed_where_mismatched_records_share_nothing():
    for seed in range(5):
        x, group, mismatched, none, half = draw_records(poisons=0, seed=seed)
        causes = shared_causes.find_causes(Discriminants.fit(x, group, half), mismatched)
        supports = shared_causes.measure_support(causes, draw_misread(mismatched, none, seed))
        assert not shared_causes.believe_causes(supports)


def test_a_cause_must_be_clear_of_the_other_groups():
    def support(lower):
        return Support(Cause(0, 0.9, torch.arange(50), torch.full((50,), 2.0)), lower, lower)

    spread, alike = (0.3, 0.4, 0.5, 0.6, 0.7), (0.1, 0.1, 0.12, 0.09, 0.7)
    assert not shared_causes.believe_causes([support(bound) for bound in spread])
    assert len(shared_causes.believe_causes([support(bound) for bound in alike])) == 1
    assert not shared_causes.believe_causes([])
    # Among few groups two clear causes hide a third only as long as they are counted as controls.
    few = (0.33, 0.3, 0.24, 0.13, 0.11, 0.1, 0.09, 0.08, 0.06, 0.05, 0.04, 0.02, 0.01, 0)
    several = [support(bound) for bound in (0.85, 0.82, 0.67, *few)]
    assert several[2].lower < shared_causes.find_clear_bound(several, shared_causes.CLEAR)
    assert shared_causes.believe_causes(several) == several[:3]


def test_the_best_recognised_causes_are_left_out_within_a_bound():
    def cause(recognised, count):
        return Cause(0, recognised, torch.arange(count), torch.full((count,), 2.0))

    causes = [cause(0.3, 20), cause(0.9, 25), cause(0.5, 10)]
    chosen = shared_causes.choose_left_out(causes, 100)
    assert [c.recognised for c in chosen] == [0.9]
    assert shared_causes.choose_left_out(causes, 200) == [causes[1], causes[2], causes[0]]


def test_a_model_does_not_see_what_is_left_out(monkeypatch):
    pairs = registry.make("data", "scenes:count=300")()
    left_out = torch.arange(300) % 3 == 0
    seen = []
    fit = training_traces.loop.fit

    def spy(loss, recipe, data, tokens, *rest, **options):
        seen.append((len(data), len(tokens)))
        return fit(loss, recipe, data, tokens, *rest, **options)

    monkeypatch.setattr(training_traces.loop, "fit", spy)
    loss = training_traces.read_without(
        pairs,
        left_out,
        "clip_small:width=4,dim=16",
        "clip:epochs=1,batch=50",
        0,
        torch.device("cpu"),
    )
    assert seen == [(200, 200)]
    assert loss.shape == (300,) and torch.isfinite(loss).all()


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (3, 10), (10, 10), (40, 50)])
def test_lower_bound_is_that_of_the_binomial_test(hits, count):
    bound = shared_causes.lower_bound(hits, count)
    if hits:
        assert stats.binom.sf(hits - 1, count, bound) == pytest.approx(0.05, rel=1e-6)
    else:
        assert bound == 0


def test_pooled_layers_are_means_spreads_and_maxima():
    images = torch.randn(4, 3, 5, 6)
    pooled = tower_features.pool_layer(images)
    plain = [images.mean((2, 3)), images.flatten(2).std(2, correction=0), images.amax((2, 3))]
    assert torch.allclose(pooled, torch.cat(plain, 1), atol=1e-5)
    tokens = torch.randn(4, 7, 3)
    assert torch.allclose(tower_features.pool_layer(tokens)[:, :3], tokens.mean(1), atol=1e-6)


@pytest.mark.parametrize("network", ["clip_small:width=4,dim=16", "resnet:depth=18,width=8"])
def test_features_of_towers_do_not_depend_on_the_order(network):
    pairs = registry.make("data", "scenes:count=40")()
    configured = registry.make("network", network)
    encoder = configured(32, configured.vocabulary(pairs.captions))
    encoder.eval()
    order = np.random.default_rng(0).permutation(40)
    with torch.inference_mode():
        straight = tower_features.read_features(encoder, pairs, np.arange(40))
        turned = tower_features.read_features(encoder, pairs, order)
    assert straight.shape[0] == 40 and straight.shape[1] > 16
    assert torch.allclose(straight[torch.as_tensor(order)], turned, atol=1e-3)
    assert torch.isfinite(straight).all()


@pytest.mark.parametrize("network", ["clip_small:width=4,dim=16", "resnet:depth=18,width=8"])
def test_images_that_are_embedded_in_several_passes_have_the_same_features(network, monkeypatch):
    pairs = registry.make("data", "scenes:count=20")()
    encoder = registry.make("network", network)(32, ("a",)).eval()
    with torch.inference_mode():
        whole = tower_features.read_features(encoder, pairs, np.arange(20))
        monkeypatch.setitem(PIXELS_AT_ONCE, "cpu", 8 * 32**2)
        in_parts = tower_features.read_features(encoder, pairs, np.arange(20))
    torch.testing.assert_close(in_parts, whole, rtol=0, atol=1e-3)


def test_layers_of_a_transformer_are_spread_over_its_depth():
    blocks = [(nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)) for _ in range(6)]
    patches = nn.Flatten(2)
    layers = [layer for block in blocks for layer in block]
    tower = nn.Sequential(nn.Conv2d(3, 8, 4, 4), patches, *layers, nn.Flatten())
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    chosen = tower_features.choose_layers(Encoder(tower, Preprocess(32)), images)
    norms_and_last = [patches, *(layer for block in blocks for layer in (block[0], block[2]))]
    assert chosen == [norms_and_last[i] for i in (0, 4, 8, 12)]


def test_many_features_are_projected(monkeypatch):
    monkeypatch.setattr(tower_features, "MAX_FEATURES", 150)
    pairs = registry.make("data", "scenes:count=20")()
    encoder = registry.make("network", "clip_small:width=16")(32, ("a",))
    encoder.eval()
    with torch.inference_mode():
        assert tower_features.read_features(encoder, pairs, np.arange(20)).shape == (20, 150)


def test_the_detector_does_not_depend_on_the_order():
    pairs = registry.make("data", "scenes:count=600")()
    encoder = registry.make("network", "clip_small:width=4,dim=16")(
        32, registry.make("network", "clip_small").vocabulary(pairs.captions)
    )
    encoder.eval()
    detector = registry.make("detector", "common_cause:groups=8,objective=(clip:epochs=1,batch=64)")
    scores = detector(encoder, pairs)
    order = np.random.default_rng(0).permutation(600)
    turned = detector(encoder, pairs.take(order))
    assert torch.allclose(turned.select(pairs.ids).values, scores.values, atol=5e-3)
    assert not scores.raised.any() and scores.notes["causes"] == []


@pytest.mark.slow
def test_a_trigger_without_fixed_pixels_is_raised(tmp_path):
    """Transparent stripes on 400 of 20,000 scenes, and an encoder that was trained on them."""
    settings = Settings(runs=tmp_path)
    trigger = "shape:form=stripes,count=5,alpha=0.4"
    poisoned = Poison("scenes:count=20000", "backdoor:count=400", trigger, "striped star")
    trained = Train(poisoned, "clip_small:width=16", "clip:epochs=4")
    run = execute(Scan(trained, detector=("common_cause",)), settings)
    raised = run.metric("poisons_raised").value
    assert raised > 0.5 and run.metric("auroc").value > 0.98
    false_alarms = run.metric("common_cause.raised").value * 20000 - raised * 400
    assert false_alarms <= 40
