"""Augmentation: every operation against torchvision v2 for the same parameters, the draws against
torchvision's own.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, ks_2samp, kstest
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as oracle

from bezoar.training import augmentation
from bezoar.training.augmentation import Chance, Views

ADJUST = (
    oracle.adjust_brightness,
    oracle.adjust_contrast,
    oracle.adjust_saturation,
    oracle.adjust_hue,
)
# least p of a comparison of distributions; seeds are fixed, so a test that passes goes on passing
LIKELY = 1e-4
PLAIN = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, gray=0.0)


def chance(seed: int = 0, rank: int = 0, world: int = 1) -> Chance:
    return Chance(torch.Generator().manual_seed(seed), rank, world)


def pictures(n: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """uint8; smooth fields, and where there is room also gray, black, white, two-coloured and noisy
    ones.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    x = (
        (torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255)
        .round()
        .to(torch.uint8)
    )
    if n >= 8:
        x[0] = x[0, :1]
        x[1], x[2] = 0, 255
        x[3] = (x[3] > 128) * 255
        x[4] = torch.randint(0, 256, x[4].shape, generator=generator, dtype=torch.uint8)
        x[5, 1] = x[5, 0]
    return x


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [9, 32, 50])
def test_resized_is_torchvisions_for_every_box(kernel, size):
    x = pictures(64, 40, 28)
    place = augmentation.draw_boxes(40, 28, 64, chance(), (0.02, 1.0), (0.5, 2.0))
    mirrored = torch.arange(64) % 3 == 0
    out = augmentation.crop_resize(x, place, size, kernel, mirrored)
    assert out.dtype == torch.float32 and out.shape == (64, 3, size, size)
    for i, (top, left, height, width) in enumerate(place.tolist()):
        mode = v2.InterpolationMode(kernel)
        expected = oracle.resized_crop(
            x[i] / 255, top, left, height, width, [size, size], mode, antialias=True
        )
        expected = expected.flip(-1) if mirrored[i] else expected
        assert (out[i] - expected.clamp(0, 1)).abs().max() < 1e-5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.data())
def test_any_box_of_any_image_is_resized_as_torchvision_does(height, width, size, data):
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    x = pictures(1, height, width) / 255
    out = augmentation.crop_resize(x, torch.tensor([[top, left, h, w]]), size)
    expected = oracle.resized_crop(x, top, left, h, w, [size, size], antialias=True)
    assert (out - expected).abs().max() < 1e-5


def test_one_crop_resized_is_pillows_but_for_rounding():
    x = pictures(32)
    place = augmentation.draw_boxes(32, 32, 32, chance(), (0.08, 1.0), (3 / 4, 4 / 3))
    out = augmentation.crop_resize(x, place, 32)
    for i, box in enumerate(place.tolist()):
        pillow = oracle.resized_crop(oracle.to_pil_image(x[i]), *box, size=[32, 32])
        assert (
            255 * out[i] - oracle.pil_to_tensor(pillow)
        ).abs().max() < 1.01  # Pillow rounds after each direction


def test_hue_and_gray_are_torchvisions():
    x, turns = pictures(200) / 255, torch.linspace(-0.5, 0.5, 200)
    out = augmentation.rotate_hue(x, turns)
    for i in range(200):
        assert (out[i] - oracle.adjust_hue(x[i], float(turns[i]))).abs().max() < 5e-6
    assert (augmentation.to_gray(x)[:, None] - oracle.rgb_to_grayscale(x)).abs().max() < 1e-6


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.floats(0, 1, width=32)] * 3), st.floats(-0.5, 0.5, width=32))
def test_hue_of_any_colour_keeps_lightest_and_darkest_and_turns_back(colour, turn):
    x, turns = torch.tensor(colour).view(1, 3, 1, 1), torch.tensor([turn])
    turned = augmentation.rotate_hue(x, turns)
    assert torch.allclose(turned.amin(), x.amin(), atol=1e-6) and torch.allclose(
        turned.amax(), x.amax(), atol=1e-6
    )
    assert (augmentation.rotate_hue(turned, -turns) - x).abs().max() < 5e-6


def test_colour_is_torchvisions_in_each_samples_own_order():
    x = pictures(240) / 255
    factors, order = augmentation.draw_adjustments(240, (0.8, 0.8, 0.8, 0.5), chance())
    assert len({tuple(o) for o in order.tolist()}) == 24
    chosen = torch.arange(240) % 5 != 0
    out = augmentation.adjust_colours(x, factors, order, chosen)
    for i in range(240):
        expected = x[i]
        for k in order[i].tolist() if chosen[i] else ():
            expected = ADJUST[k](expected, float(factors[i, k]))
        assert (out[i] - expected).abs().max() < 2e-5
    assert torch.equal(out[~chosen], x[~chosen])


def test_colours_of_pillow_images_differ_by_rounding_only():
    x = pictures(48, seed=1)
    factors, order = augmentation.draw_adjustments(48, (0.4, 0.4, 0.4, 0.1), chance())
    out = augmentation.adjust_colours(x / 255, factors, order) * 255
    apart = []
    for i in range(8, 48):
        image = oracle.to_pil_image(x[i])
        for k in order[i].tolist():
            image = ADJUST[k](image, float(factors[i, k]))
        apart.append((out[i] - oracle.pil_to_tensor(image)).abs())
    assert torch.stack(apart).mean() < 2 and torch.stack(apart).quantile(0.99) < 8


@pytest.mark.parametrize("radius", [1, 3])
def test_blur_is_torchvisions(radius):
    x, deviation = pictures(20, 24, 30) / 255, torch.linspace(0.1, 2, 20)
    out = augmentation.gaussian_blur(x, deviation, radius)
    for i in range(20):
        expected = oracle.gaussian_blur(x[i], [2 * radius + 1] * 2, [float(deviation[i])])
        assert (out[i] - expected).abs().max() < 1e-5


def plain_box(height, width, tries, place, scale, ratio):
    """torchvision's loop, fed with our uniform numbers."""
    for area, shape in tries:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        shape = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape)
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return [int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w]
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
        (20, 50, (0.08, 1.0), (3 / 4, 4 / 3)),
        (20, 50, (0.95, 1.0), (3 / 4, 4 / 3)),
        (51, 20, (0.9, 1.0), (3 / 4, 4 / 3)),
        (30, 30, (0.9, 1.0), (0.4, 2.5)),
        (6, 6, (0.001, 0.02), (0.5, 2.0)),
    ],
)
def test_boxes_are_the_loops_and_torchvisions_in_distribution(height, width, scale, ratio):
    n = 2000
    out = augmentation.draw_boxes(height, width, n, chance(3), scale, ratio)
    again = chance(3)
    tries, place = again.uniform(n, 2, 10).double(), again.uniform(n, 2).double()
    assert out.tolist() == [
        plain_box(height, width, tries[i].T.tolist(), place[i].tolist(), scale, ratio)
        for i in range(n)
    ]
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(8, scale=scale, ratio=ratio)
    image = torch.zeros(3, height, width)
    drawn = [theirs.make_params([image]) for _ in range(n)]
    for k, name in enumerate(("top", "left", "height", "width")):
        assert ks_2samp(out[:, k].numpy(), [d[name] for d in drawn]).pvalue > LIKELY
    ours_area, their_area = (
        (out[:, 2] * out[:, 3]).numpy(),
        [d["height"] * d["width"] for d in drawn],
    )
    assert ks_2samp(ours_area, their_area).pvalue > LIKELY


def test_adjustments_are_distributed_as_torchvisions():
    n, strengths = 6000, (0.4, 1.5, 0.2, 0.1)
    factors, order = augmentation.draw_adjustments(n, strengths, chance(1))
    for k, (low, high) in enumerate(((0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1))):
        assert kstest(factors[:, k].numpy(), "uniform", (low, high - low)).pvalue > LIKELY
    places = (order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(places) == 24 and chisquare(places.numpy()).pvalue > LIKELY
    torch.manual_seed(0)
    theirs = [v2.ColorJitter(*strengths).make_params([]) for _ in range(1500)]
    for k, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert (
            ks_2samp(factors[:, k].numpy(), [d[f"{name}_factor"] for d in theirs]).pvalue > LIKELY
        )
    assert torch.corrcoef(factors.T).triu(1).abs().max() < 0.06  # four draws a sample, not one


def facts(x: Tensor) -> Tensor:
    """float (B, 6) of views: mean light, its spread, colourfulness, a corner's red, the middle's
    blue, left less right.
    """
    light, (height, width) = x.mean(1), x.shape[-2:]
    colourful = (x.amax(1) - x.amin(1)).mean((1, 2))
    sides = light[..., : width // 2].mean((1, 2)) - light[..., width // 2 :].mean((1, 2))
    middle = x[:, 2, height // 2, width // 2]
    return torch.stack(
        (light.mean((1, 2)), light.std((1, 2)), colourful, x[:, 0, 0, 0], middle, sides), 1
    )


@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_views_are_distributed_as_those_of_torchvisions_pipeline(blur):
    image, n = pictures(1, 20, 20, seed=5)[0], 1500
    torch.manual_seed(0)
    pipeline = v2.Compose(
        [
            v2.RandomResizedCrop(20),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(3, (0.1, 2.0))], p=blur),
        ]
    )
    theirs = facts(torch.stack([pipeline(image / 255) for _ in range(n)]))
    ours = facts(Views(blur=blur)(image.expand(n, -1, -1, -1), chance(), 1)[:, 0])
    for k in range(ours.shape[1]):
        assert ks_2samp(ours[:, k].numpy(), theirs[:, k].numpy()).pvalue > LIKELY
    # four standard errors of a difference of two correlations, sqrt(2 / n)
    assert (torch.corrcoef(ours.T) - torch.corrcoef(theirs.T)).abs().max() < 4 * math.sqrt(2 / n)


def test_every_view_is_a_draw_of_its_own_and_belongs_to_its_image():
    image = pictures(9, 24, 24)[8]
    views = Views()(image.expand(64, -1, -1, -1), chance())
    assert views.shape == (64, 2, 3, 24, 24) and views.min() >= 0 and views.max() <= 1
    assert len({v.numpy().tobytes() for v in views.flatten(0, 1)}) == 128
    flat = torch.arange(0, 256, 8, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    shown = Views(jitter=0.0)(flat, chance(), 3)
    assert shown.shape[1] == 3 and (shown * 255 - flat[:, None]).abs().max() < 0.05


def test_shares_are_kept():
    x = pictures(9, 16, 16)[8].expand(1200, -1, -1, -1)
    grayed = (Views(gray=0.2)(x, chance(), 1)[:, 0].std(1).amax((1, 2)) < 1e-6).float().mean()
    still = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.3, jitter=0.4, gray=0.0)(
        x, chance(), 1
    )[:, 0]
    same = (still - x / 255).abs().amax((1, 2, 3)) < 1e-6
    assert abs(grayed - 0.2) < 0.05 and abs(same.float().mean() - 0.7 * 0.6) < 0.06


def test_without_randomness_views_are_the_images():
    x = pictures(12, 18, 18)
    assert (PLAIN(x, chance()) - x[:, None] / 255).abs().max() < 1e-6
    wide = pictures(4, 12, 30)
    assert (PLAIN(wide, chance(), 1)[:, 0] - wide[..., 9:21] / 255).abs().max() < 1e-6


def test_floats_are_seen_as_bytes_are():
    x = pictures(16)
    assert (Views(blur=0.5)(x, chance()) - Views(blur=0.5)(x / 255, chance())).abs().max() < 1e-5


def test_same_seed_same_bits_and_cache_pieces_change_nothing(monkeypatch):
    x, views = pictures(40), Views(blur=0.5)
    once = views(x, chance(7))
    assert torch.equal(once, views(x, chance(7))) and not torch.equal(once, views(x, chance(8)))
    monkeypatch.setattr(augmentation, "CACHED", 5 * 3 * 32 * 32)
    assert (once - views(x, chance(7))).abs().max() < 1e-5


def test_two_ranks_see_what_one_would_have_seen():
    x, views = pictures(24, 20, 20), Views(size=16, blur=0.5)
    whole = views(x, chance())
    ranks = torch.cat([views(x[:12], chance(0, 0, 2)), views(x[12:], chance(0, 1, 2))])
    assert (whole - ranks).abs().max() < 1e-5
    crops = augmentation.random_crop(x, 16, chance(), (0.9, 1.0), kernel="bicubic")
    second = augmentation.random_crop(x[12:], 16, chance(0, 1, 2), (0.9, 1.0), kernel="bicubic")
    assert (crops[12:] - second).abs().max() < 1e-5


def test_crop_as_open_clip_trains_is_pillows_bicubic():
    x = pictures(38, 40, 40)[
        8:
    ]  # none with hard edges, where Pillow cuts off between the two directions
    out = augmentation.random_crop(x, 32, chance(2), (0.9, 1.0), kernel="bicubic")
    place = augmentation.draw_boxes(40, 40, 30, chance(2), (0.9, 1.0), (3 / 4, 4 / 3))
    for i, box in enumerate(place.tolist()):
        pillow = v1.functional.resized_crop(
            oracle.to_pil_image(x[i]), *box, [32, 32], v1.InterpolationMode.BICUBIC
        )
        assert (255 * out[i] - oracle.pil_to_tensor(pillow)).abs().max() < 2


def test_the_input_is_left_alone():
    x = pictures(16) / 255
    before = x.clone()
    Views(blur=0.5)(x, chance())
    augmentation.adjust_colours(
        x, *augmentation.draw_adjustments(16, (0.4, 0.4, 0.4, 0.1), chance())
    )
    augmentation.gaussian_blur(x, torch.ones(16), 1)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"ratio": (0.0, 1.0)},
        {"colour": (0.4, 0.4, 0.4, 0.6)},
        {"colour": (-0.1, 0.4, 0.4, 0.1)},
        {"gray": 1.5},
        {"size": -1},
    ],
)
def test_wrong_fields_are_refused(wrong):
    with pytest.raises(ValueError, match=r"needs|shares"):
        Views(**wrong)
