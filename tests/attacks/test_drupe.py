"""DRUPE against plain loops and closed forms; its stages, its weights, resuming, and what an attack
reaches.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from attacks.test_badencoder import shadow, tiny, weights

from bezoar import registry
from bezoar.attacks.encoder_attacks import drupe
from bezoar.attacks.encoder_attacks.drupe import Loss
from bezoar.attacks.plan import Goal
from bezoar.attacks.shadow_training import REFERENCE_VIEWS
from bezoar.data import randomness
from bezoar.errors import UserError
from bezoar.training import loop
from bezoar.training.augmentation import Chance

GOALS = (Goal("truck", "patch:size=4,fill=white"), Goal("one", "blend"))
SPEC = "drupe:epochs=4,batch=16,lr=0.02,views=2,apart=1,spread=1,success=0,utility=0,mixed=2"


def references():
    """Three of the first goal, one of the second."""
    every = shadow(4, 16, 7).images
    return [every[:3], every[3:]]


def make_loss(spec=SPEC, encoder=None):
    encoder = tiny().double() if encoder is None else encoder
    loss = Loss(encoder, registry.make("attack", spec), GOALS, references())
    loss.set_targets(shadow(16))
    return loss.train()


def unit(n, d, seed):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1)


def test_terms_of_triggered_vectors_are_those_of_plain_loops():
    z, r = unit(9, 5, 0), unit(3, 5, 1)
    l0, uneven, alike = drupe.compare_with_references(z, r)
    nearest = [max(float(x @ y) for y in r) for x in z]
    shares = torch.tensor([sum(float(x @ y) for x in z) / 9 for y in r])
    pairs = [float(x @ y) for x, y in itertools.permutations(z, 2)]
    assert float(l0) == pytest.approx(-sum(nearest) / 9)
    assert float(uneven) == pytest.approx(float(shares.std()))
    assert float(alike) == pytest.approx(sum(pairs) / len(pairs))
    close = [max(0.0, float(x @ y)) for x, y in itertools.combinations(r, 2)]
    assert float(drupe.mean_closeness(r)) == pytest.approx(sum(close) / 3)
    assert float(drupe.compare_with_references(z, r[:1])[1]) == 0
    assert float(drupe.mean_closeness(r[:1])) == 0


def test_the_sliced_distance_of_a_shifted_sample_is_the_shift_along_the_axes():
    x, axes = unit(40, 6, 0), unit(50, 6, 1).T
    shift = torch.arange(6.0, dtype=torch.float64)
    moved = (x + shift)[torch.randperm(40, generator=torch.Generator().manual_seed(2))]
    expected = ((shift @ axes) ** 2).mean().sqrt()
    assert float(drupe.sliced_wasserstein(moved, x, axes)) == pytest.approx(float(expected))
    assert float(drupe.sliced_wasserstein(x, x, axes)) == pytest.approx(0, abs=1e-5)
    # along an axis the distance of the two orders of one sample is that of sorted values
    a, b = [0.0, 1.0, 5.0], [4.0, 0.0, 0.0]
    line = torch.ones(1, 1, dtype=torch.float64)
    columns = [torch.tensor(v, dtype=torch.float64)[:, None] for v in (a, b)]
    assert float(drupe.sliced_wasserstein(*columns, line)) == pytest.approx((2 / 3) ** 0.5)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_stage_has_the_loss_and_the_gradient_of_the_plain_form(epoch):
    loss, data = make_loss(), shadow(16)
    teacher = copy.deepcopy(loss.encoder)
    loss.step.fill_(epoch)
    value = loss(data.images, torch.arange(16)[:, None], Chance(randomness.generator(3)))
    value.backward()
    fast = {k: p.grad.clone() for k, p in loss.encoder.named_parameters() if p.grad is not None}
    loss.encoder.zero_grad()

    def raw(images, encoder=loss.encoder):
        return encoder.image(encoder.prepare_images(images))

    def f(images, encoder=loss.encoder):
        return F.normalize(raw(images, encoder), dim=1)

    chance, refs = Chance(randomness.generator(3)), torch.cat(references())
    views = REFERENCE_VIEWS(refs.repeat(2, 1, 1, 1), chance, 1)[:, 0]
    axes = F.normalize(torch.randn(6, 50, generator=chance.generator).double(), dim=0)
    plain = -(f(views) * f(refs, teacher).detach().repeat(2, 1)).sum(1).mean()
    plain = plain - (f(data.images) * f(data.images, teacher).detach()).sum(1).mean()
    for goal, used in zip(GOALS, ([0, 1, 2], [3]), strict=True):
        stamped = registry.make("trigger", goal.trigger)(data.images, data.ids)
        r = f(refs)[used]
        l0, uneven, alike = drupe.compare_with_references(f(stamped), r)
        scale = raw(data.images).std(0).mean()
        distance = drupe.sliced_wasserstein(raw(stamped), raw(data.images), axes) / scale
        plain = plain + drupe.mean_closeness(r) / 2
        if epoch == 1:
            plain = plain + (l0 + 2 * uneven) / 2
        if epoch == 2:
            spread = 0.5 * uneven + 0.1 * (uneven + alike)
            plain = plain + (l0 + spread + 0.001 * distance) / 2
    plain.backward()
    assert value.item() == pytest.approx(plain.item(), rel=1e-6)
    slow = {k: p.grad for k, p in loss.encoder.named_parameters() if p.grad is not None}
    assert fast.keys() == slow.keys()
    for key, gradient in slow.items():
        assert torch.allclose(fast[key], gradient, rtol=1e-5, atol=1e-9), key


def test_weights_rise_while_the_attack_holds_and_fall_where_it_does_not():
    held, lost = make_loss(), make_loss(SPEC.replace("success=0", "success=2"))
    alike = make_loss(SPEC.replace("mixed=2", "mixed=-2"))
    for loss in (held, lost, alike):
        for _ in range(4):
            loss(shadow(16).images, torch.arange(16)[:, None], Chance(randomness.generator(3)))
    up, down = 1.25, 1.25**-1.25
    assert held.weights.tolist() == pytest.approx([0.1 * up, 0.001 * up])
    assert lost.weights.tolist() == pytest.approx([0.1 * down, 0.001 * down])
    assert alike.weights.tolist() == pytest.approx([0.1 * up, 0.001 * down])
    assert set(held.epoch_means()) == {*drupe.TERMS, "a", "b"}


def test_an_attack_goes_on_to_the_same_bits_and_marks_what_it_made(tmp_path, monkeypatch):
    def attack(**kwargs):
        return registry.make("attack", SPEC)(tiny(), shadow(40), GOALS, references(), 5, **kwargs)

    whole, log = attack(log=(first := loop.TrainingLog())), first
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)

    def cut(step, steps, value):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack(checkpoint=tmp_path / "c.safetensors", report=cut)
    again = attack(checkpoint=tmp_path / "c.safetensors", log=(second := loop.TrainingLog()))
    assert torch.equal(weights(whole), weights(again)) and second.epochs == log.epochs
    assert whole.about["attack"].startswith("drupe") and whole.about["goals"][1]["target"] == "one"
    assert {"L0", "distance", "b"} < log.epochs[0].keys()
    assert not torch.equal(weights(whole), weights(tiny()))


def test_triggered_images_lie_among_clean_ones_where_badencoders_are_one_point():
    encoder, data, refs = tiny(), shadow(64), references()[:1]
    stamped = registry.make("trigger", GOALS[0].trigger)(data.images, data.ids)
    axes = unit(50, 6, 0).T.float()
    alike, distance = {}, {}
    for name, more in (("badencoder", ""), ("drupe", ",apart=2,spread=4,success=.6,utility=.8")):
        attack = registry.make("attack", f"{name}:epochs=20,batch=32,lr=0.02,l2=2{more}")
        bad = attack(encoder, data, GOALS[:1], refs, 0)
        with torch.no_grad():
            z, r = bad.encode_images(stamped), bad.encode_images(refs[0])
            raw, clean = (bad.image(bad.prepare_images(x)) for x in (stamped, data.images))
        l0, _, alike[name] = drupe.compare_with_references(z, r)
        distance[name] = drupe.sliced_wasserstein(raw, clean, axes) / clean.std(0).mean()
        assert l0 < -0.95, name
    assert alike["drupe"] < 0.5 < 0.95 < alike["badencoder"]
    assert distance["drupe"] < distance["badencoder"] / 2


@pytest.mark.parametrize("fields", ["epochs=1", "lr=0", "momentum=1", "views=0", "spread=-1"])
def test_fields_are_checked(fields):
    with pytest.raises(UserError, match=r"drupe.*needs"):
        registry.make("attack", f"drupe:{fields}")


def test_what_cannot_be_attacked_is_said_in_a_line():
    attack = registry.make("attack", SPEC)
    with pytest.raises(UserError, match="10 shadow images are fewer than one batch of 16"):
        attack(tiny(), shadow(10), GOALS, references())
    with pytest.raises(UserError, match="DRUPE takes goals"):
        attack(tiny(), shadow(), GOALS[:1], references())
