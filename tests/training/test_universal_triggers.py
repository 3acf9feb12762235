"""Universal triggers: what they stamp by their formulas, their ascent within bounds, their age."""

import torch

from bezoar.data import randomness
from bezoar.training.augmentation import Chance
from bezoar.training.universal_triggers import ALPHA, LIFE, PIXEL_STEP, REACH, UniversalTriggers


def chance(step=0):
    return Chance(randomness.generator(0, step))


def triggers(count=9):
    return UniversalTriggers(count, 32, 32, torch.device("cpu"))


def test_images_are_stamped_as_the_formulas_say():
    ours, x = triggers(), torch.rand(18, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    stamped = ours(x, chance())
    for i in range(18):
        number = i % 9
        if number < 6:  # three patches, three patterns: (1 - m) x + m p
            mask, pattern = ours.masks[number], ours.patterns[number]
            wanted = (1 - mask) * x[i] + mask * pattern
        else:  # A x + b of every pixel, clipped
            change = ours.colours[number - 6]
            wanted = (change[:, :3] @ x[i].flatten(1) + change[:, 3:]).view(3, 32, 32).clamp(0, 1)
        torch.testing.assert_close(stamped[i], wanted)
    masks = ours.masks.flatten(1)
    sides = masks[:3].sum(1).sqrt()
    assert ((masks[:3] == 0) | (masks[:3] == 1)).all() and (masks[3:] == ALPHA).all()
    assert (sides == sides.round()).all() and sides.min() >= 4 and sides.max() <= 12
    assert torch.equal(triggers()(x, chance()), stamped)
    assert not torch.equal(triggers()(x, chance(1)), stamped)


def test_fewer_images_than_triggers_and_one_kind_alone():
    assert triggers(1)(torch.rand(4, 3, 32, 32), chance()).shape == (4, 3, 32, 32)
    assert triggers()(torch.rand(2, 3, 32, 32), chance()).shape == (2, 3, 32, 32)


def test_they_ascend_within_their_bounds_and_are_drawn_anew():
    ours, x, losses = triggers(), torch.rand(9, 3, 32, 32), []
    first = None
    for step in range(LIFE):
        stamped = ours(x, chance(step))
        first = ours.patterns.detach().clone() if first is None else first
        before = ours.patterns.detach().clone()
        loss = stamped.square().mean()  # largest where everything is white
        loss.backward()
        losses.append(loss.item())
        change = ours.patterns - before
        assert change.min() >= 0 and change.max() <= PIXEL_STEP + 1e-6
        assert ours.patterns.max() <= 1 and ours.patterns.grad is None
        assert (ours.colours - torch.eye(3, 4)).abs().max() <= REACH + 1e-6
    assert sum(losses[-5:]) > sum(losses[:5])
    ours(x, chance(LIFE))
    assert all(not torch.equal(a, b) for a, b in zip(first, ours.patterns, strict=True))
