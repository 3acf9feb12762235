"""PatchCleanser: masks that cover every patch, double masking against a plain version, the
certificate by brute force.
"""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.errors import UserError
from bezoar.evaluation.probes.patch_cleanser import DoubleMasking, PatchCleanser


class Blocks(nn.Module):
    """The mean colour of the image, of which no small part decides; `lever`: how much the brightest
    pixel of red adds.
    """

    def __init__(self, lever=0.0):
        super().__init__()
        self.scale, self.lever = nn.Parameter(torch.ones(1)), lever

    def forward(self, x):
        z = x.mean((2, 3)) * self.scale
        return z + self.lever * torch.tensor([1.0, 0, 0]) * x[:, :1].amax((2, 3))


def toy(lever=0.0):
    encoder = Encoder(
        Blocks(lever),
        Preprocess(8, (0.5,) * 3, (1.0,) * 3),
        about={"classes": ["red", "green", "blue"]},
    )
    encoder.head = nn.Identity()
    return encoder


def images(n=24, size=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = 90 + 40 * torch.rand(n, 3, size, size, generator=draw)
    x[torch.arange(n), labels] += torch.linspace(0, 90, n)[:, None, None]
    return Pairs(
        x.to(torch.uint8), (), labels, tuple(f"i{k}" for k in range(n)), ("red", "green", "blue")
    )


def masked(probe, encoder, size=8):
    return DoubleMasking(
        lambda x: encoder.head(encoder.image(encoder.prepare_images(x))).argmax(1),
        probe.mask_rectangles((size, size)),
        encoder,
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 40), st.integers(5, 40), st.integers(1, 12), st.integers(2, 8))
def test_every_patch_lies_whole_under_a_mask(height, width, patch, masks):
    if patch >= min(height, width):
        return
    rectangles = PatchCleanser(patch=patch, masks=masks).mask_rectangles((height, width))
    assert len(rectangles) <= masks**2 and len({tuple(r) for r in rectangles.tolist()}) == len(
        rectangles
    )
    top, left, tall, wide = rectangles.T
    assert (
        (top >= 0).all()
        and (top + tall <= height).all()
        and (left >= 0).all()
        and (left + wide <= width).all()
    )
    for y in range(height - patch + 1):
        rows = (top <= y) & (top + tall >= y + patch)
        assert all(
            (rows & (left <= x) & (left + wide >= x + patch)).any()
            for x in range(width - patch + 1)
        )


def test_the_masks_are_the_papers():
    rectangles = PatchCleanser(patch=32, masks=6).mask_rectangles(
        (224, 224)
    )  # ceil(193 / 6) = 33, 32 + 33 - 1 = 64
    assert rectangles[:, 0].unique().tolist() == [0, 33, 66, 99, 132, 160] and set(
        rectangles[:, 2:].flatten().tolist()
    ) == {64}


def plain(one, two):
    """Algorithm 1 for one image. one: (M,) readings, two: (M, M)."""
    counts = Counter(one)
    majority = min(c for c in counts if counts[c] == max(counts.values()))
    for i, reading in enumerate(one):
        if reading != majority and all(again == reading for again in two[i]):
            return reading
    return majority


def test_double_masking_is_the_plain_algorithm():
    encoder, probe, pairs = toy(3.0), PatchCleanser(patch=3, masks=3), images(30)
    x = pairs.images.clone()
    x[::2, 0, 2:5, 4:7] = 255  # a lever on every second image
    defence = masked(probe, encoder)
    m = len(defence.masks)
    read, right = defence.predict(x, pairs.labels)
    outcomes = set()
    for i in range(len(x)):
        row = torch.full((m * m,), i)
        first, second = torch.arange(m).repeat_interleave(m), torch.arange(m).repeat(m)
        two = defence.read_through(x, row, first, second).view(m, m)
        one = two.diagonal().tolist()
        assert int(read[i]) == plain(one, two.tolist())
        assert bool(right[i]) == all(r == int(pairs.labels[i]) for r in one)
        outcomes.add((len(set(one)) > 1, int(read[i]) == Counter(one).most_common(1)[0][0]))
    assert {(False, True), (True, False)} <= outcomes  # agreed, and saved by a second mask


def test_certified_is_read_right_through_every_two_masks():
    encoder, pairs = toy(0.2), images(40)
    defence = masked(PatchCleanser(patch=3, masks=3), encoder)
    m = len(defence.masks)
    _, right = defence.predict(pairs.images, pairs.labels)
    certified = defence.certify(pairs.images, pairs.labels, right)
    every = torch.stack(
        [
            defence.read_through(
                pairs.images, torch.arange(40), torch.full((40,), i), torch.full((40,), j)
            )
            == pairs.labels
            for i, j in itertools.product(range(m), repeat=2)
        ]
    ).all(0)
    assert (
        torch.equal(certified, every)
        and 0 < int(certified.sum()) < 40
        and bool((right & ~certified).any())
    )


@pytest.mark.parametrize("lever", [0.0, 2.0])
def test_no_patch_changes_how_a_certified_image_is_read(lever):
    encoder, pairs, size = toy(lever), images(45), 3
    probe = PatchCleanser(patch=size, masks=2)
    defence = masked(probe, encoder)
    _, right = defence.predict(pairs.images, pairs.labels)
    certified = defence.certify(pairs.images, pairs.labels, right)
    assert 0 < int(certified.sum()) < 45
    patches = (
        torch.randint(0, 2, (6, 3, size, size), generator=torch.Generator().manual_seed(1)).to(
            torch.uint8
        )
        * 255
    )
    solid = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]], dtype=torch.uint8)[
        :, :, None, None
    ]
    patches = torch.cat([patches, solid.expand(-1, -1, size, size)])
    changed = torch.zeros(45, dtype=torch.bool)
    for y, x, patch in itertools.product(range(8 - size + 1), range(8 - size + 1), patches):
        stamped = pairs.images.clone()
        stamped[:, :, y : y + size, x : x + size] = patch
        changed |= defence.predict(stamped, pairs.labels)[0] != pairs.labels
    assert not bool((changed & certified).any()) and bool((changed & ~certified).any())


def test_the_probe_takes_a_backdoor_away_and_says_what_it_certifies():
    pairs, goal = images(60), Goal("red", trigger="patch:size=2,fill=white,margin=0")
    measures = registry.make("probe", "patch_cleanser:patch=2,masks=3,head=own")(
        toy(3.0), None, pairs, (goal,)
    )
    bare = registry.make("probe", "own")(toy(3.0), None, pairs, (goal,))
    assert (
        bare["own.attack_success"].value == 1
        and measures["patch_cleanser.attack_success"].value < 0.5
    )
    m = measures["patch_cleanser.certified_accuracy"]
    assert (
        m.n == 60
        and 0 < m.value <= measures["patch_cleanser.clean_accuracy"].value
        and "2 px" in m.how
    )
    names = (
        "certified_accuracy clean_accuracy attack_success attack_success_without_trigger "
        "poisoned_accuracy"
    )
    assert set(measures) == {f"patch_cleanser.{name}" for name in names.split()}


def test_a_fitted_head_a_sample_and_images_without_labels():
    pairs = images(60)
    assert pairs.labels is not None
    some = replace(pairs, labels=torch.where(torch.arange(60) < 10, -1, pairs.labels))
    probe = registry.make("probe", "patch_cleanser:patch=2,masks=2,head=linear,limit=20")
    assert probe.needs == ("train", "report") and "train" not in PatchCleanser().needs
    other = images(60, seed=1)
    shuffled = replace(other, labels=(other.labels + 1) % 3, classes=("blue", "red", "green"))
    reports = []
    measures = probe(toy(), shuffled, some, report=lambda *a: reports.append(a))
    assert (
        measures["patch_cleanser.clean_accuracy"].n == 20
        and measures["patch_cleanser.clean_accuracy"].value > 0.8
        and reports
    )
    everything = registry.make("probe", "patch_cleanser:patch=2,masks=2,head=own,limit=none")(
        toy(), None, some
    )
    assert everything["patch_cleanser.clean_accuracy"].n == 50


def test_what_cannot_be_certified_is_said():
    pairs = images(6)
    probe = registry.make("probe", "patch_cleanser:patch=8,head=own")
    with pytest.raises(UserError, match="smaller"):
        probe(toy(), None, pairs)
    with pytest.raises(UserError, match="classes and labels"):
        probe(toy(), None, replace(pairs, labels=None))
    with pytest.raises(UserError, match="no class 'pink'"):
        registry.make("probe", "patch_cleanser:patch=2")(
            toy(), None, replace(pairs, classes=("red", "green", "pink"))
        )
    bare = toy()
    del bare.head
    with pytest.raises(UserError, match="head=linear"):
        registry.make("probe", "patch_cleanser:patch=2")(bare, None, pairs)
    for text in ("patch=0", "masks=1", "limit=0"):
        with pytest.raises(UserError):
            registry.make("probe", f"patch_cleanser:{text}")


def test_the_sample_belongs_to_the_records():
    pairs, probe = (
        images(40),
        registry.make("probe", "patch_cleanser:patch=2,masks=2,head=own,limit=15"),
    )
    order = np.random.default_rng(0).permutation(40)
    assert probe(toy(0.2), None, pairs) == probe(toy(0.2), None, pairs.take(order))
