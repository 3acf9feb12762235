"""The audit that covers whole images: its probes against plain versions, what it reads of planted
towers, what it refuses.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bezoar import registry
from bezoar.auditing.audits.whole_image import KINDS, MESHES, WAVES
from bezoar.auditing.random_probes import common_shift, whitening_matrix
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, Preprocess, embed_images
from bezoar.errors import UserError

SIZE, DIM = 32, 10


class Rough(nn.Module):
    """Random features, and a direction that follows how rough the image is, as far as `strength`
    goes.
    """

    def __init__(self, seed: int, strength: float) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.filters = nn.Parameter(torch.randn(DIM, 3, SIZE, SIZE, generator=g) / 40)
        self.direction = nn.Parameter(torch.randn(DIM, generator=g))
        self.strength = strength

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rough = (x[..., 1:] - x[..., :-1]).square().mean((1, 2, 3))
        return (
            torch.einsum("nchw,dchw->nd", x, self.filters)
            + self.strength * rough[:, None] * self.direction
        )


def encoder(seed: int = 0, strength: float = 0.0) -> Encoder:
    return Encoder(Rough(seed, strength), Preprocess(SIZE), about={"network": "rough"}).eval()


@pytest.fixture(scope="module")
def clean() -> Pairs:
    """Smooth images in the middle of the range."""
    g = torch.Generator().manual_seed(1)
    small = torch.rand(40, 3, 4, 4, generator=g)
    images = (60 + nn.functional.interpolate(small, (SIZE, SIZE), mode="bilinear") * 130).byte()
    return Pairs(images, ids=tuple(f"i{k}" for k in range(40)))


AUDIT = registry.make("audit", "whole_image")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0, 3])
def test_a_probe_is_one_for_all_images_and_repeats_itself(clean, kind, number):
    out = AUDIT.apply_probe(clean.images, kind, number, 3)
    assert out.dtype == torch.uint8 and out.shape == clean.images.shape
    assert torch.equal(
        out, torch.cat([AUDIT.apply_probe(part, kind, number, 3) for part in clean.images.split(7)])
    )
    assert not torch.equal(out, AUDIT.apply_probe(clean.images, kind, number, 4))
    assert not torch.equal(out, AUDIT.apply_probe(clean.images, kind, number + 1, 3))
    assert (out != clean.images).float().mean() > 0.5, "it covers the image"


def test_noise_is_a_blend_of_one_pattern_in_grains_that_grow_with_the_image(clean):
    out = AUDIT.apply_probe(clean.images, "noise", 0, 0).double()
    pattern = (out - 0.8 * clean.images) / (0.2 * 255)
    assert (pattern - pattern[:1]).abs().max() < 0.03, "rounding alone"
    assert 0.45 < pattern.mean() < 0.55 and pattern.var() == pytest.approx(1 / 12, rel=0.1)
    large = torch.zeros(1, 3, 96, 64, dtype=torch.uint8)
    fine, coarse = (AUDIT.apply_probe(large, "noise", i, 0)[0] for i in (0, 1))
    cells = coarse.unflatten(2, (32, 2)).unflatten(1, (48, 2))
    assert (
        torch.equal(cells, cells[:, :, :1, :, :1].expand_as(cells)) and len(fine[0].unique()) > 40
    )
    assert not torch.equal(fine[:, ::2, ::2], fine[:, 1::2, 1::2])


@pytest.mark.parametrize("number", range(4))
def test_waves_are_sines_of_the_periods_named(number):
    gray = torch.full((2, 3, SIZE, SIZE), 128, dtype=torch.uint8)
    out = AUDIT.apply_probe(gray, "wave", number, 5)[0, 0].double().numpy() - 128
    g = torch.Generator().manual_seed(5 * 1_000_003 + number * 3 + KINDS.index("wave"))
    turn, phase = (2 * math.pi * torch.rand(2, generator=g)).tolist()
    turn = turn if number % 2 else 0.0
    for row in range(0, SIZE, 5):
        for column in range(0, SIZE, 3):
            along = WAVES[number] * (column * math.cos(turn) + row * math.sin(turn)) / SIZE
            assert out[row, column] == pytest.approx(
                20 * math.sin(2 * math.pi * along + phase), abs=0.51
            )


@pytest.mark.parametrize("number", range(4))
def test_warps_move_pixels_by_what_is_asked_on_the_mean_of_their_mesh(number):
    ramp = (torch.arange(SIZE, dtype=torch.float32) * 8).expand(1, 3, SIZE, SIZE)
    along = AUDIT.apply_probe(ramp.byte(), "warp", number, 0)[0, 0].double() / 8 - torch.arange(
        SIZE
    )
    across = (
        AUDIT.apply_probe(ramp.transpose(2, 3).byte(), "warp", number, 0)[0, 0].double() / 8
        - torch.arange(SIZE)[:, None]
    )
    inner = [d[4:-4, 4:-4].abs().mean() for d in (along, across)]
    assert np.mean(inner) == pytest.approx(1.0 if MESHES[number] == SIZE else 0.85, rel=0.25), (
        "pixels of an image of 32"
    )
    assert not torch.equal(along, across.T)


def test_the_value_is_the_mean_whitened_common_shift(clean):
    model, audit = encoder(0, 3.0), registry.make("audit", "whole_image:probes=2,images=30")
    images = clean.images[:30]
    z = embed_images(model, [images]).double()
    axes, plain = whitening_matrix(z, 0.1), {}
    for kind in KINDS:
        shifts = [
            (embed_images(model, [audit.apply_probe(images, kind, i, 7)]).double() - z) @ axes
            for i in range(2)
        ]
        plain[kind] = [float(s.mean(0).norm()) for s in shifts]
        assert plain[kind] == pytest.approx([common_shift(s)[0] for s in shifts])
    verdict = audit(model, clean, 7)
    assert verdict.value == pytest.approx(
        np.mean([v for lengths in plain.values() for v in lengths]), rel=1e-5
    )
    assert verdict.evidence["shift_wave"].value == pytest.approx(np.mean(plain["wave"]), rel=1e-5)
    assert (
        verdict == audit(model, clean, 7)
        and verdict.notes["images"] == 30
        and verdict.notes["limits"]
    )


def test_towers_that_read_roughness_stand_out(clean):
    audit = registry.make("audit", "whole_image:probes=2")
    values = {s: [audit(encoder(k, s), clean, 0).value for k in range(4)] for s in (0.0, 30.0)}
    assert max(values[0.0]) < min(values[30.0])


def test_what_it_cannot_read_is_said(clean):
    with pytest.raises(UserError, match="at least two clean images of 8 pixels"):
        AUDIT(encoder(), clean.take([0]), 0)
    for fields in ("probes=0", "images=1", "shrink=0", "alpha=1.5", "delta=0", "strength=0"):
        with pytest.raises(UserError, match="needs"):
            registry.make("audit", f"whole_image:{fields}")
