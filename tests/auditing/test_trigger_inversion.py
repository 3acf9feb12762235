"""The inversion engine against a slow plain form, and its parts against what they are defined
as.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from bezoar import registry
from bezoar.auditing import norm_outliers, trigger_inversion, trigger_search
from bezoar.auditing.trigger_search import InversionRecipe
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.encoders import folded_norms
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.errors import UserError


def images(n: int = 20, size: int = 32) -> Pairs:
    x = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    x = (F.interpolate(x, size, mode="bilinear") * 255).byte()
    return Pairs(x, (), None, tuple(map(str, range(n))))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = registry.make("network", "tower:width=4,dim=8")(32, ())
        for m in encoder.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 2)
                nn.init.uniform_(m.weight, 0.5, 1.5)
    return encoder.double().eval()


def towards(z: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inversion i is to turn images to axis i; success is the share of them that are there."""
    loss = -z.log_softmax(2).gather(2, indices[:, None, None].expand(*z.shape[:2], 1)).mean((1, 2))
    return loss, (z.argmax(2) == indices[:, None]).to(z.dtype).mean(1)


def one_by_one(
    encoder: Encoder, clean: Pairs, index: int, recipe: InversionRecipe, seed: int
) -> tuple[torch.Tensor, int, bool]:
    """One inversion, as its papers write it: torch's Adam, Python's counters, gradients of all
    weights.

    -> mask and pattern (4, H, W), the steps taken, and whether the goal was reached.
    """
    start = trigger_search.initial_parameters(8, clean.size, clean.size, seed)[index]
    u = start.double().requires_grad_()
    adam = torch.optim.Adam([u], recipe.lr[0], betas=trigger_search.ADAM_BETAS)
    weight, successes, failures, idle = recipe.weight, 0, 0, 0
    raised = lowered = False
    best, best_norm, best_success = u.detach().clone(), float("inf"), -1.0
    for step in range(recipe.steps):
        shuffled = torch.randperm(len(clean), generator=generator(seed, 12, step))
        x = clean.images[shuffled[: recipe.batch].sort().values].double() / 255
        mask, pattern = (torch.tanh(u[:1]) + 1) / 2, (torch.tanh(u[1:]) + 1) / 2
        z = encoder.image(encoder.prepare_images((1 - mask) * x + mask * pattern))
        z = z / z.norm(dim=1, keepdim=True)
        success = float((z.argmax(1) == index).double().mean())
        norm = float(mask.detach().sum())
        loss = F.cross_entropy(z, torch.full((len(z),), index)) + weight * mask.sum()
        adam.zero_grad()
        loss.backward()
        idle += 1
        if success >= recipe.goal:
            idle = 0 if norm < trigger_search.PROGRESS_SHARE * best_norm else idle
            if norm < best_norm:
                best, best_norm = u.detach().clone(), norm
            successes, failures = successes + 1, 0
        else:
            if best_norm == float("inf") and success >= best_success:
                best, best_success = u.detach().clone(), success
            successes, failures = 0, failures + 1
        if successes >= recipe.patience:
            weight, successes, raised = weight * recipe.up, 0, True
        if failures >= recipe.patience:
            weight, failures, lowered = max(weight / recipe.down, recipe.floor), 0, True
        adam.step()
        checked = (step + 1) % trigger_inversion.CHECK_EVERY == 0
        finished = idle >= recipe.wait and raised and lowered and best_norm < float("inf")
        if checked and finished:
            break
    return (torch.tanh(best) + 1) / 2, step + 1, best_norm < float("inf")


@pytest.mark.parametrize("folded", [True, False])
def test_a_batch_of_inversions_is_what_they_are_one_by_one(encoder, folded, monkeypatch):
    if not folded:
        monkeypatch.setattr(folded_norms, "BatchNorm", type("Nothing", (), {}))
    recipe = InversionRecipe(45, 4, weight=3e-2, patience=2, goal=0.8, wait=4)
    clean = images()
    with trigger_inversion.freeze_tower(encoder) as tower:
        triggers = trigger_inversion.invert_triggers(
            tower, clean, towards, torch.arange(5), recipe, 5
        )
    for i in range(5):
        plain, steps, reached = one_by_one(copy.deepcopy(encoder), clean, i, recipe, 5)
        assert (int(triggers.steps[i]), bool(triggers.reached[i])) == (steps, reached)
        assert torch.allclose(triggers.masks[i], plain[:1], atol=1e-6) and torch.allclose(
            triggers.patterns[i], plain[1:], atol=1e-6
        )
    assert len(set(triggers.steps.tolist())) > 1, (
        "some should have left the batch earlier than others"
    )
    assert bool(triggers.reached.any())


def test_gradient_of_the_mask_with_and_without_those_of_the_weights(encoder):
    clean = images(5).images.double() / 255
    start = trigger_search.initial_parameters(8, 32, 32, 0).double()
    search = trigger_search.TriggerSearch(start, InversionRecipe(1, 5, weight=0.01))
    with trigger_inversion.freeze_tower(encoder) as tower:
        assert not any(p.requires_grad for p in encoder.parameters())
        grad, success, norm = trigger_inversion.compute_gradients(search, clean, tower, towards)
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())
    plain, free = copy.deepcopy(encoder), start.clone().requires_grad_()
    for i in range(8):
        mask, pattern = (free[i, :1].tanh() + 1) / 2, (free[i, 1:].tanh() + 1) / 2
        pixels = plain.prepare_images((1 - mask) * clean + mask * pattern)
        z = F.normalize(plain.image(pixels), dim=1)
        (F.cross_entropy(z, torch.full((5,), i)) + 0.01 * mask.sum()).backward()
        assert float(success[i]) == pytest.approx(float((z.argmax(1) == i).double().mean()))
        assert float(norm[i]) == pytest.approx(float(mask.detach().sum()))
    assert all(p.grad is not None for p in plain.image.parameters())
    assert torch.allclose(grad, free.grad, rtol=1e-8, atol=1e-12)


def test_a_cell_is_a_block_of_pixels(encoder):
    """The gradient by a cell is the sum of those by its pixels; norms are of cells until the
    end.
    """
    clean = images(5)
    x = clean.images.double() / 255
    recipe = InversionRecipe(1, 5, weight=0.01, cells=8)
    assert recipe.grid_size(32, 32) == (8, 8) and recipe.grid_size(4, 32) == (4, 8)
    cells = trigger_search.initial_parameters(2, 8, 8, 0).double()
    pixels = cells.repeat_interleave(4, 2).repeat_interleave(4, 3)
    with trigger_inversion.freeze_tower(encoder) as tower:
        coarse, fine = (
            trigger_inversion.compute_gradients(
                trigger_search.TriggerSearch(u.clone(), InversionRecipe(1, 5, weight=weight)),
                x,
                tower,
                towards,
            )
            for u, weight in ((cells, 0.16), (pixels, 0.01))
        )
        blocks = fine[0].unfold(2, 4, 4).unfold(3, 4, 4).sum((4, 5))
        assert torch.allclose(coarse[0], blocks, rtol=1e-8, atol=1e-12)
        assert torch.equal(coarse[1], fine[1]) and torch.allclose(16 * coarse[2], fine[2])
        recipe = InversionRecipe(20, 5, weight=0.01, goal=0.1, cells=8, starts=2)
        aims = trigger_inversion.embed_clean(tower, clean.images).argmax(1).unique()
        found = trigger_inversion.invert_triggers(tower, clean, towards, aims, recipe, 0)
    assert found.masks.shape[2:] == found.patterns.shape[2:] == (32, 32)
    assert torch.equal(found.masks[:, :, ::4, ::4], found.masks[:, :, 3::4, 3::4])
    assert torch.allclose(found.norms, found.masks.sum((1, 2, 3)))
    reached = found.starts.isfinite()
    assert reached.any() and torch.allclose(found.norms[found.reached].min(), found.starts.min())


def test_the_mask_of_a_blend_has_one_value(encoder):
    recipe = InversionRecipe(20, 5, weight=0.01, goal=0.1, even=True)
    clean = images(8)
    with trigger_inversion.freeze_tower(encoder) as tower:
        aims = trigger_inversion.embed_clean(tower, clean.images).argmax(1).unique()
        blends = trigger_inversion.invert_triggers(tower, clean, towards, aims, recipe, 0)
    shares = blends.masks.mean((1, 2, 3))
    assert torch.allclose(blends.masks, shares[:, None, None, None].expand_as(blends.masks))
    assert (shares < 0.5).all() and blends.patterns.std((2, 3)).min() > 0.1, "starts from a half"


def test_blends_by_hand():
    """Shares .02, .2, .2, .2 and one of .9 that counts as .2; a target that was not reached has no
    part.
    """
    shares = [0.2, 0.2, 0.02, 0.2, 0.9, 0.01]
    blends = results(range(6), shares, [1.0] * 6, [True] * 5 + [False])
    blends = replace(blends, masks=torch.tensor(shares)[:, None, None, None].expand(6, 1, 4, 4))
    names = [f"kind {i}" for i in range(6)]
    facts, least = norm_outliers.blend_evidence(blends, names, 50)
    assert least == 2 and facts["least_blend"].value == pytest.approx(0.02)
    assert facts["blend_ratio"].value == pytest.approx(math.log(10))
    # the others are all .2, and the least deviation .1; three degrees of freedom, two times six
    # targets
    distance = math.log(10) / (0.1 * math.sqrt(1.25))
    assert facts["blend_p"].value == pytest.approx(12 * stats.t.sf(distance, 3), rel=1e-5)
    few = replace(blends, reached=torch.arange(6) < 2)
    assert norm_outliers.blend_evidence(few, names, 50) == ({}, 0)


def test_slices_change_nothing_but_rounding(encoder, monkeypatch):
    clean, recipe = images(16), InversionRecipe(12, 16, weight=1e-2, goal=0.6, patience=2)
    parts: list[int] = []

    def invert() -> trigger_inversion.InvertedTriggers:
        with trigger_inversion.freeze_tower(encoder) as tower:
            parts.append(len(list(trigger_inversion.inversion_slices(5, 16, tower))))
            return trigger_inversion.invert_triggers(
                tower, clean, towards, torch.arange(5), recipe, 0
            )

    whole = invert()
    monkeypatch.setattr(folded_norms, "CHUNKS", {"cpu": (1, 32), "cuda": (1, 32)})
    monkeypatch.setattr(folded_norms, "FEWEST", 16)
    single = invert()
    assert parts == [2, 5], "four inversions on 16 images are 64 rows; one is 16"
    assert torch.allclose(whole.masks, single.masks, atol=1e-9) and torch.equal(
        whole.steps, single.steps
    )


def test_anomaly_index_by_hand():
    # median 10, deviations 8 1 0 1 2 -> their median 1; only what lies below 10 counts
    index = norm_outliers.anomaly_index(torch.tensor([2.0, 9.0, 10.0, 11.0, 12.0]))
    assert index.tolist() == pytest.approx([8 / 1.4826, 1 / 1.4826, 0, 0, 0])
    x = np.random.default_rng(0).lognormal(3, 0.5, 24)
    middle = np.median(x)
    expected = np.where(
        x < middle, np.abs(x - middle) / (1.4826 * np.median(np.abs(x - middle))), 0
    )
    assert norm_outliers.anomaly_index(torch.tensor(x)).tolist() == pytest.approx(expected.tolist())
    assert float(norm_outliers.anomaly_index(torch.full((12,), 5.0)).max()) == 0


def test_the_weight_follows_the_published_schedule():
    r = InversionRecipe(10, 2, weight=1e-3, up=5, down=5, patience=2, floor=1e-4, resets=2)
    search, seen = (
        trigger_search.TriggerSearch(trigger_search.initial_parameters(1, 4, 4, 0), r),
        [],
    )
    for hit in (1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0):
        search.update_weights(torch.tensor([bool(hit)]))
        seen.append(float(search.weights[0]))
    # up, up; down, down, down; at the floor twice: back to the start
    assert seen[1::2] == pytest.approx([5e-3, 25e-3, 5e-3, 1e-3, 2e-4, 1e-4, 1e-3])


def test_halvings_keep_the_best_of_each_aim(encoder):
    recipe = InversionRecipe(30, 4, weight=1e-2, goal=0.6, patience=2, wait=99, starts=4)
    clean, aims = images(8), torch.tensor([6, 2])
    with trigger_inversion.freeze_tower(encoder) as tower:
        every = trigger_inversion.invert_triggers(tower, clean, towards, aims, recipe, 0)
        some = trigger_inversion.invert_triggers(
            tower, clean, towards, aims, replace(recipe, halvings=2), 0
        )
    assert every.steps.tolist() == [30] * 8 and some.steps.tolist() == [30] * 2, (
        "4, 2 and at last 1 for each aim"
    )
    assert every.aims.tolist() == [6] * 4 + [2] * 4 and some.aims.tolist() == [6, 2]
    for aim, mask in zip(some.aims, some.masks, strict=True):
        of_aim = every.masks[every.aims == aim]
        assert torch.isclose(of_aim, mask, atol=1e-3).all((1, 2, 3)).any()


def test_halving_by_hand():
    """Aims 0 0 0 1 1: norms 5, inf, 3 and 7, 6; of three searches two stay, of two one."""
    start = trigger_search.initial_parameters(5, 4, 4, 0)
    search = trigger_search.TriggerSearch(start, InversionRecipe(9, 2, growing=True, halvings=1))
    search.aims = torch.tensor([0, 0, 0, 1, 1])
    search.best_norm = torch.tensor([5.0, torch.inf, 3.0, 7.0, 6.0])
    search.halve()
    assert search.survived.tolist() == [True, False, True, False, True]
    assert search.indices.tolist() == [0, 2, 4] and search.running_aims.tolist() == [0, 0, 1]
    assert [search.recipe.batch_size(h) for h in (0, 1, 2)] == [2, 4, 8]


def test_large_towers_compute_in_bfloat16_while_they_are_frozen(encoder, monkeypatch):
    monkeypatch.setattr(trigger_inversion, "precision_for", lambda device: "bf16")
    for least, precision in ((1e3, "bf16"), (1e12, "fp32")):
        monkeypatch.setattr(trigger_inversion, "LARGE", least)
        with trigger_inversion.freeze_tower(encoder) as tower:
            assert encoder.precision == precision and 1e3 < tower.cost.operations < 1e12
        assert encoder.precision == "fp32"


def test_a_lucky_step_does_not_count(encoder):
    """Success on a step's images alone is no success where it must be confirmed on others."""
    start = trigger_search.initial_parameters(3, 32, 32, 0).double()
    search = trigger_search.TriggerSearch(start, InversionRecipe(9, 2, goal=0.9, confirm=5))
    clean, norm = images(5).images.double() / 255, torch.tensor([9.0, 8.0, 7.0]).double()
    confirmed = torch.tensor([0.2, 0.95, 0.1]).double()

    def objective(z, aims):
        return confirmed[aims], confirmed[aims]

    with trigger_inversion.freeze_tower(encoder) as tower:
        luck = torch.tensor([1.0, 1.0, 0.5]).double()
        trigger_inversion.confirm_triggers(search, luck, norm, clean, tower, objective)
    assert search.best_norm.tolist() == [torch.inf, 8.0, torch.inf]
    assert search.best_success.tolist() == pytest.approx([0.2, 0.95, 0.5])


def results(aims, norms, success, reached):
    n = len(aims)
    return trigger_inversion.InvertedTriggers(
        aims=torch.tensor(aims),
        masks=torch.arange(n).double().view(n, 1, 1, 1).expand(n, 1, 2, 2),
        patterns=torch.zeros(n, 3, 2, 2),
        norms=torch.tensor(norms),
        success=torch.tensor(success),
        reached=torch.tensor(reached),
        steps=torch.ones(n),
        starts=torch.ones(n, 2),
    )


def test_the_best_of_each_aim_by_hand():
    first = results([1, 0, 1], [5.0, 4.0, 6.0], [0.9, 0.3, 1.0], [False, False, True])
    best = first.best_of_aims()
    assert best.aims.tolist() == [0, 1] and best.norms.tolist() == [4.0, 6.0]
    again = first.best_of_aims(results([0], [9.0], [0.95], [True]))
    assert again.norms.tolist() == [9.0, 6.0] and again.reached.tolist() == [True, True]


def test_outlier_p_value_holds_under_its_null():
    """Against the t-test of one number and the others; of normal numbers p is uniform below."""
    x = np.random.default_rng(0).normal(0, 1, (4000, 10))
    p = np.array([norm_outliers.outlier_p_value(torch.tensor(row)) for row in x])
    row, least = x[0], int(x[0].argmin())
    others = np.delete(row, least)
    t, two_sided = stats.ttest_ind([row[least]], others)
    assert t < 0 and p[0] == pytest.approx(min(1, 10 * two_sided / 2))
    for level in (0.05, 0.01):
        assert abs((p <= level).mean() - level) < 4 * (level / 4000) ** 0.5
    assert norm_outliers.outlier_p_value(torch.tensor([0.0, 3.0, 3.0, 3.0, 3.0])) < 1e-3


def test_concentration_by_hand():
    """A patch in a corner is in one window of a quarter of the sides; a uniform mask in none."""
    masks = torch.zeros(3, 1, 16, 8)
    masks[0, 0, 12:, 6:] = 0.5
    masks[1] = 0.3
    masks[2, 0, 0, 0], masks[2, 0, 15, 7] = 1.0, 3.0
    shares = norm_outliers.measure_concentration(masks)
    assert shares.tolist() == pytest.approx([1.0, 1 / 16, 0.75])


def test_an_inversion_starts_where_its_number_says():
    assert torch.equal(
        trigger_search.initial_parameters(5, 8, 6, 3)[2],
        trigger_search.initial_parameters(3, 8, 6, 3)[2],
    )
    assert not torch.equal(
        trigger_search.initial_parameters(2, 8, 6, 3),
        trigger_search.initial_parameters(2, 8, 6, 4),
    )
    mask = trigger_search.mask_and_pattern(
        trigger_search.initial_parameters(1, 8, 8, 0, centred=True)
    )[0][0, 0]
    assert torch.equal(mask > 0.5, F.pad(torch.ones(4, 4, dtype=torch.bool), (2, 2, 2, 2)))
    starts = [trigger_search.initial_parameters(n, 16, 8, 0, window=0.25) for n in (20, 3)]
    assert torch.equal(starts[0][:3], starts[1])
    windows = trigger_search.mask_and_pattern(starts[0])[0][:, 0] > 0.5  # (20, 16, 8)
    assert windows.sum((1, 2)).tolist() == [4 * 2] * 20, (
        "a quarter of the rows, a quarter of the columns"
    )
    assert windows.any(2).sum(1).tolist() == [4] * 20 and windows.any(0).float().mean() > 0.5


def test_networks_that_nothing_can_be_folded_of():
    """A tower that is a matrix; one whose batch norm keeps no statistics is said not to have an
    output without a batch.
    """
    plain = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8)), Preprocess(8))
    plain.train()
    with trigger_inversion.freeze_tower(plain) as tower:
        triggers = trigger_inversion.invert_triggers(
            tower, images(8, 8), towards, torch.arange(2), InversionRecipe(5, 4), 0
        )
    assert triggers.masks.shape == (2, 1, 8, 8) and all(m.training for m in plain.modules())
    batch = Encoder(
        nn.Sequential(
            nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8, track_running_stats=False)
        ),
        Preprocess(8),
    )
    with pytest.raises(UserError, match="without a batch"), trigger_inversion.freeze_tower(batch):
        pass
    assert all(p.requires_grad for p in batch.parameters())
    with (
        pytest.raises(UserError, match="image tower"),
        trigger_inversion.freeze_tower(nn.Linear(2, 2)),
    ):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"lr": (0.1, 0.1)},
        {"lr": ()},
        {"weight": 0.0},
        {"goal": 1.5},
        {"halvings": -1},
        {"starts": 0},
        {"confirm": -1},
    ],
)
def test_recipes_that_make_no_sense(wrong):
    with pytest.raises(ValueError):
        InversionRecipe(**{"steps": 5, "batch": 2, **wrong})
