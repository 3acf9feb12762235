"""Discriminants and features against slow plain versions; causes on drawn numbers."""

import numpy as np
import pytest
import torch
from scipy import stats

from bezoar import Poison, Scan, Settings, Train, execute, registry
from bezoar.detection import shared_causes, tower_features
from bezoar.detection.shared_causes import Cause, Discriminants


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


def test_a_planted_cause_is_believed_and_no_other():
    x, group, mismatched, is_poison, half = draw_records()
    causes = shared_causes.find_causes(Discriminants.fit(x, group, half), mismatched)
    believed = shared_causes.believed_causes(causes)
    assert [cause.group for cause in believed] == [0]
    shown = torch.zeros(len(x), dtype=torch.bool)
    shown[believed[0].shown] = True
    assert (shown & is_poison).sum() >= 0.9 * is_poison.sum()
    assert (shown & ~is_poison).sum() <= 10


def test_nothing_is_believed_where_mismatched_records_share_nothing():
    for seed in range(5):
        x, group, mismatched, _, half = draw_records(poisons=0, seed=seed)
        causes = shared_causes.find_causes(Discriminants.fit(x, group, half), mismatched)
        assert causes and not shared_causes.believed_causes(causes)


def test_a_cause_must_be_clear_of_the_other_groups():
    def cause(purity):
        return Cause(0, 0.9, torch.arange(50), torch.full((50,), 2.0), purity, purity - 0.1)

    spread, alike = (0.3, 0.4, 0.5, 0.6, 0.7), (0.1, 0.1, 0.12, 0.09, 0.7)
    assert not shared_causes.believed_causes([cause(purity) for purity in spread])
    assert len(shared_causes.believed_causes([cause(purity) for purity in alike])) == 1
    assert not shared_causes.believed_causes([])


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
    assert torch.allclose(turned.values_of(pairs.ids), scores.values, atol=5e-3)
    assert not scores.raised.any() and scores.notes["causes"] == []


@pytest.mark.slow
@pytest.mark.parametrize("trigger", ["filter:preset=kelvin", "line:width=1", "blur:sigma=1.5"])
def test_a_trigger_without_fixed_pixels_is_raised(tmp_path, trigger):
    """Poisons of 12,000 scenes, and an encoder that was trained on them for two epochs."""
    settings = Settings(runs=tmp_path)
    poisoned = Poison("scenes:count=12000", "backdoor:count=300", trigger, "striped star")
    trained = Train(poisoned, "clip_small:width=16", "clip:epochs=3")
    run = execute(Scan(trained, detector=("common_cause",)), settings)
    assert run.metric("poisons_raised") > 0.5 and run.metric("auroc") > 0.98
    false_alarms = run.metric("common_cause.raised") * 12000 - run.metric("poisons_raised") * 300
    assert false_alarms <= 24
