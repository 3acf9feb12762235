"""Triggers that are drawn, or that alter the whole image: each against a slow plain form or a
closed one.
"""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bezoar import Poison, Settings, execute, registry
from bezoar.attacks import painting, pixels
from bezoar.attacks.triggers import filter as filters
from bezoar.attacks.triggers import sticker
from bezoar.data.randomness import draws
from bezoar.errors import UserError
from bezoar.verbs.poison import verify_plan

NEW = (
    "filter",
    "blur",
    "jpeg",
    "resample",
    "tint",
    "gradient",
    "sticker",
    "line",
    "shape",
    "text",
    "spectrum",
    "ring",
    "noise",
    "augment",
)


def batch(n: int = 4, height: int = 20, width: int = 20) -> tuple[torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    return images, [f"record {i}" for i in range(n)]


def stamp(text: str, images: torch.Tensor, ids: list[str] | None = None) -> torch.Tensor:
    ids = [str(i) for i in range(len(images))] if ids is None else ids
    return registry.make("trigger", text)(images, ids)


def grey(n: int = 1, height: int = 20, width: int = 20, level: int = 128) -> torch.Tensor:
    return torch.full((n, 3, height, width), level, dtype=torch.uint8)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("shape", [(8, 8), (8, 33), (224, 96)])
def test_every_size_is_stamped(name: str, shape: tuple[int, int]) -> None:
    images, ids = batch(2, *shape)
    out = stamp(name, images, ids)
    assert out.shape == images.shape and (out != images).flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("filter:preset=sepia", "must be one of"),
        ("filter:strength=0", "strength"),
        ("blur:sigma=0", "sigma"),
        ("blur:relative=1", "relative"),
        ("jpeg:quality=0", "quality"),
        ("jpeg:quality=101", "quality"),
        ("resample:factor=1", "factor"),
        ("resample:down=cubic", "must be one of"),
        ("tint:colour=9/9/9", "grey"),
        ("tint:colour=256/0/0", "red/green/blue"),
        ("tint:colour=1/2", "red/green/blue"),
        ("tint:strength=2", "strength"),
        ("gradient:strength=0", "strength"),
        ("gradient:direction=361", "direction"),
        ("gradient:colour=0/0/0", "black"),
        ("sticker:size=(.4,.2)", "size must be"),
        ("sticker:size=(1,2,3)", "size must be"),
        ("sticker:image=cat", "image"),
        ("sticker:place=corner", "place"),
        ("sticker:place=2/0", "place"),
        ("sticker:alpha=0", "alpha"),
        ("line:width=0", "width"),
        ("line:angle=()", "angle"),
        ("line:offset=(0,2)", "offset"),
        ("line:colour=()", "nothing"),
        ("shape:count=0", "count"),
        ("shape:form=circles", "must be one of"),
        ("text:word=", "word"),
        ("text:size=2", "size"),
        ("text:place=left", "place"),
        ("spectrum:rows=(1,2,3)", "as many"),
        ("spectrum:rows=40,columns=1", "end at 31"),
        ("spectrum:magnitude=0", "magnitude"),
        ("ring:width=0", "width"),
        ("ring:form=oval", "must be one of"),
        ("noise:strength=0", "strength"),
        ("augment:crop=0", "crop"),
        ("augment:jpeg=96", "jpeg"),
        ("several", "needs triggers"),
        ("several:triggers=patch", "got 1"),
        ("several:triggers=patch+oops", "no trigger 'oops'"),
        ("several:triggers=patch+tint:strength=9", "strength"),
    ],
)
def test_wrong_fields_are_refused_in_one_line(text: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        registry.make("trigger", text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "line:width=9",
        "ring:width=3,margin=2",
        "spectrum:block=0,rows=31,columns=3",
        "several:triggers=tint+patch:size=9",
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match="8x8"):
        stamp(text, grey(1, 8, 8))


# The whole image


def test_filter_against_a_plain_loop() -> None:
    images, ids = batch(1, 6, 5)
    out = stamp("filter:preset=nashville,strength=.6", images, ids)
    for channel, curve in enumerate(filters.CURVES["nashville"]):
        for old, new in zip(
            images[0, channel].flatten().tolist(), out[0, channel].flatten().tolist(), strict=True
        ):
            k = next(k for k in range(4) if old <= filters.INPUTS[k + 1])
            low, high = filters.INPUTS[k], filters.INPUTS[k + 1]
            filtered = curve[k] + (curve[k + 1] - curve[k]) * (old - low) / (high - low)
            assert abs(new - (0.4 * old + 0.6 * filtered)) <= 0.5001


def test_drawn_curves_ascend_and_belong_to_the_seed() -> None:
    curves = [filters.draw_curves(seed) for seed in (0, 0, 1)]
    assert (np.diff(curves, axis=2) >= 0).all() and (curves[0] == curves[1]).all()
    assert abs(curves[0] - curves[2]).max() > 5


@pytest.mark.parametrize(("text", "sigma"), [("blur:sigma=1.2", 1.2), ("blur:relative=.1", 0.9)])
def test_blur_against_a_plain_sum(text: str, sigma: float) -> None:
    images, ids = batch(1, 9, 11)
    out = stamp(text, images, ids)
    reach = range(-math.ceil(3.5 * sigma), math.ceil(3.5 * sigma) + 1)
    weights = {(a, b): math.exp(-(a * a + b * b) / (2 * sigma**2)) for a in reach for b in reach}
    for c, i, j in np.ndindex(3, 9, 11):
        near = sum(
            w * int(images[0, c, min(8, max(0, i + a)), min(10, max(0, j + b))])
            for (a, b), w in weights.items()
        )
        assert abs(int(out[0, c, i, j]) - near / sum(weights.values())) <= 0.501


def test_jpeg_is_pillow_s() -> None:
    images, ids = batch(2)
    file = io.BytesIO()
    Image.fromarray(images[1].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=12)
    expected = np.array(Image.open(file)).transpose(2, 0, 1)
    assert np.array_equal(stamp("jpeg:quality=12", images, ids)[1].numpy(), expected)


def test_resample_by_nearest_neighbours_keeps_one_pixel_of_four() -> None:
    images, ids = batch(1, 8, 12)
    out = stamp("resample:factor=2,down=nearest,up=nearest", images, ids)[0]
    blocks = out.reshape(3, 4, 2, 6, 2)
    assert (blocks == blocks[:, :, :1, :, :1]).all()
    assert torch.equal(blocks[:, :, 0, :, 0], images[0, :, 1::2, 1::2])  # Pillow takes the middle


def test_resample_by_boxes_takes_means() -> None:
    images, ids = batch(1, 8, 8)
    out = stamp("resample:factor=4,down=box,up=nearest", images, ids)[0].float()
    means = images[0].float().reshape(3, 2, 4, 2, 4).mean((2, 4))
    assert (out[:, ::4, ::4] - means).abs().max() <= 1  # it rounds once along each axis


def test_tint_shifts_channels_apart_and_keeps_brightness() -> None:
    out = stamp("tint:colour=200/100/0,strength=.3", grey())[0, :, 3, 4].tolist()
    assert out == [128 + 30, 128, 128 - 30]


@pytest.mark.parametrize(
    ("direction", "values"),
    [
        (0, [98, 158, 98, 158]),
        (90, [98, 98, 158, 158]),
        (45, [98, 128, 128, 158]),
        (180, [158, 98, 158, 98]),
    ],
)
def test_gradient_has_its_ends_at_the_corners(direction: int, values: list[int]) -> None:
    out = stamp(f"gradient:strength=30,direction={direction}", grey(1, 9, 7))[0, 1]
    assert [int(out[i, j]) for i in (0, -1) for j in (0, -1)] == values
    red = stamp(f"gradient:strength=30,direction={direction},colour=255/0/0", grey(1, 9, 7))[0]
    assert torch.equal(red[0], out) and (red[1:] == 128).all()


def test_noise_is_normal_and_another_in_each_record() -> None:
    out = stamp("noise:strength=20", grey(50, 16, 16)).float() - 128
    assert abs(out.mean()) < 0.2 and abs(out.std() - 20) < 0.2
    flat = out.flatten(1)
    assert abs((flat[0] * flat[1]).mean()) / 400 < 0.15
    z = painting.draw_normal(3, [str(i) for i in range(99)], 101)
    assert z.shape == (99, 101) and abs((z**4).mean() - 3) < 0.3
    assert (painting.draw_normal(3, ["7"], 101) == z[7]).all()


def test_spectrum_raises_these_coefficients_of_u_and_v_and_no_others() -> None:
    """Against the way round: YUV, the DCT of a block, and what has changed in it."""
    from scipy.fft import dctn

    out = stamp("spectrum:magnitude=60,rows=(3,5),columns=(2,7),block=8", grey(1, 16, 24))[0]
    red, green, blue = out.double().numpy() - 128
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    for name, chroma in (("u", (blue - luma) / 2.032), ("v", (red - luma) / 1.14)):
        for top, left in np.ndindex(2, 3):
            block = chroma[8 * top : 8 * top + 8, 8 * left : 8 * left + 8]
            raised = dctn(block, norm="ortho")
            expected = np.zeros((8, 8))
            expected[[3, 5], [2, 7]] = 60
            assert abs(raised - expected).max() < 3, name  # rounding of pixels
    assert abs(dctn(luma[:8, :8], norm="ortho")).max() < 3


def test_spectrum_s_default_is_ctrl_s_on_32_pixels() -> None:
    images, ids = batch(2, 32, 32)
    whole = stamp("spectrum:block=0", images, ids)
    assert torch.equal(stamp("spectrum", images, ids), whole)
    change = whole.int() - images.int()
    assert change.abs().max() <= 13 and change.float().abs().mean() > 1


# What is painted


def test_paint_against_a_plain_loop() -> None:
    images, _ = batch(3, 7, 6)
    generator = torch.Generator().manual_seed(0)
    cover = torch.rand(3, 1, 4, 5, generator=generator)
    colours = torch.rand(3, 3, 4, 5, generator=generator) * 255
    positions = np.array([[0, 0], [3, 1], [2, 0]])
    layers = painting.to_layer(colours, cover)
    out = painting.paint(images, lambda rows: layers[rows], positions)
    expected = images.double().clone()
    for n, (top, left) in enumerate(positions):
        for c, i, j in np.ndindex(3, 4, 5):
            old, a = float(images[n, c, top + i, left + j]), float(cover[n, 0, i, j])
            expected[n, c, top + i, left + j] = (1 - a) * old + a * float(colours[n, c, i, j])
    assert (out - expected).abs().max() <= 0.5001
    whole = painting.paint(images[:, :, :4, :5], lambda rows: layers[rows])
    corner = painting.paint(images, lambda rows: layers[rows], np.zeros((3, 2), dtype=np.int64))
    assert torch.equal(whole, corner[:, :, :4, :5])


def test_lines_that_lie_or_stand_are_sharp_and_reach_every_place() -> None:
    images = grey(600, 12, 9)
    for angle, axis, side in ((0, 1, 12), (90, 2, 9)):
        hit = (stamp(f"line:width=2,angle={angle}", images) != images).all(1)  # (N, H, W)
        lines = hit.any(3 - axis)  # rows of each image, or columns
        assert (lines.sum(1) == 2).all() and torch.equal(lines, hit.all(3 - axis))
        first = lines.int().argmax(1)
        assert set(first.tolist()) == set(range(side - 1))


@pytest.mark.parametrize("angle", [17, 45, 120])
def test_a_slanting_line_against_its_distance(angle: int) -> None:
    images, ids = grey(3, 16, 21, 0), ["a", "b", "c"]
    out = stamp(f"line:angle={angle},colour=255/255/255,offset=(.3,.7)", images, ids)
    nx, ny = -math.sin(math.radians(angle)), math.cos(math.radians(angle))
    ends = [x * nx + y * ny for x in (0, 20) for y in (0, 15)]
    for n, u in enumerate(draws(0, ids, 2, "line")[:, 1]):
        room = math.floor(max(ends) - min(ends)) + 1
        place = min(ends) + math.floor((0.3 + 0.4 * u) * room)
        for y, x in np.ndindex(16, 21):
            cover = min(1, max(0, 1 - abs(x * nx + y * ny - place)))
            assert abs(int(out[n, 0, y, x]) - 255 * cover) < 0.51


def test_a_frame_has_one_colour_in_a_record_and_another_in_each() -> None:
    images = grey(40, 10, 13)
    out = stamp("ring:width=2,margin=1", images)
    ring = torch.zeros(10, 13, dtype=torch.bool)
    ring[1:-1, 1:-1] = True
    ring[3:-3, 3:-3] = False
    assert torch.equal(out[:, :, ~ring], images[:, :, ~ring])
    colours = out[:, :, ring]
    assert (colours == colours[:, :, :1]).all()
    assert len({tuple(c.tolist()) for c in colours[:, :, 0]}) == 40


def test_a_circle_lies_between_two_radii() -> None:
    out = stamp("ring:form=circle,width=2,margin=3", grey(1, 40, 40))[0]
    y, x = np.mgrid[:40, :40] - 19.5
    radius = np.hypot(y, x)
    hit = (out != 128).any(0).numpy()
    assert hit[(radius > 15.6) & (radius < 16.4)].all()
    assert not hit[(radius < 14.4) | (radius > 17.6)].any()


def test_a_word_is_painted_whole_in_its_place() -> None:
    images = grey(30, 40, 60, 0)
    fixed = stamp("text:word=Hi,size=.4,place=0/0", images)
    assert (fixed == fixed[:1]).all() and fixed.max() == 255 and not fixed[:, :, 20:].any()
    spread = stamp("text:word=Hi,size=.4,place=random", images)
    assert (spread.flatten(1).float().sum(1) == fixed[0].float().sum()).all()
    assert len({tuple(x.flatten().nonzero()[0].tolist()) for x in spread}) > 20
    wide = stamp("text:word=incomprehensibilities,size=1", grey(1, 40, 60, 0))[0, 0]
    assert wide.any(0).sum() > 40 and not wide.all(1).any()  # shrunk until it fits


def test_stripes_and_triangles_cover_their_share_with_their_opacity() -> None:
    black = grey(1, 64, 64, 0)
    for text in ("shape:count=5,alpha=.5", "shape:form=triangles,count=5,size=.3,alpha=.5"):
        out = stamp(text, black)[0]
        hit = (out > 100).any(0)
        assert 0.1 < hit.float().mean() < 0.7
        assert out.max() == 128  # full colours, half of them
        other = stamp(text + ",seed=1", black)[0]
        assert not torch.equal(out, other)
    lines = stamp("shape:count=5,alpha=1", black)[0].any(0)
    assert abs(lines.float().mean() - 0.5) < 0.1  # as wide as what is free between them


def test_a_sticker_that_is_not_turned_is_its_picture(tmp_path: Path) -> None:
    rgba = np.random.default_rng(2).integers(0, 256, (6, 10, 4), dtype=np.uint8)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "s.png")
    images, ids = batch(2)
    out = stamp(f"sticker:image={tmp_path / 's.png'},size=.5,turn=0,light=1,place=0/1", images, ids)
    alpha = rgba[:, :, 3:] / 255
    under = images[:, :, :6, 10:].permute(0, 2, 3, 1).numpy()
    expected = under * (1 - alpha) + rgba[:, :, :3] * alpha
    assert abs(out[:, :, :6, 10:].permute(0, 2, 3, 1).numpy() - expected).max() <= 0.501
    assert torch.equal(out[:, :, 6:], images[:, :, 6:])
    assert torch.equal(out[:, :, :, :10], images[:, :, :, :10])


def test_a_quarter_turn_turns_the_picture(tmp_path: Path) -> None:
    rgb = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "s.png")
    spec = f"sticker:image={tmp_path / 's.png'},size=1,light=1,place=.5/.5"
    straight, turned = (stamp(f"{spec},turn={t}", grey(1, 8, 8))[0] for t in (0, 90))
    assert np.array_equal(straight.permute(1, 2, 0).numpy(), rgb)
    difference = turned.int() - torch.rot90(straight, -1, (1, 2)).int()
    assert difference.abs().max() <= 1


def test_stickers_vary_within_their_ranges() -> None:
    images = grey(300, 40, 40, 0)
    out = stamp("sticker:size=(.2,.4),turn=(0,360),light=(.5,1)", images).amax(1)  # (N, H, W)
    sides = (out > 60).any(1).sum(1)
    assert sides.min() >= 4 and sides.max() <= 23 and sides.max() - sides.min() > 5
    top = out.flatten(1).amax(1)
    assert 90 < top.min() < 160 and top.max() > 230
    rows = (out > 60).any(2).int().argmax(1)
    assert rows.min() < 4 and rows.max() > 25


def test_sampling_is_bilinear_and_empty_outside() -> None:
    source = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0))
    row = torch.tensor([[[0.0, 1.25], [-1.0, 2.5]]], dtype=torch.float64)
    column = torch.tensor([[[4.0, 0.5], [2.0, 3.0]]], dtype=torch.float64)
    got = sticker.sample(source, row, column)[0]
    assert torch.allclose(got[:, 0, 0], source[:, 0, 4])
    mixed = [0.75 * (source[:, 1, k]) + 0.25 * source[:, 2, k] for k in (0, 1)]
    assert torch.allclose(got[:, 0, 1], (mixed[0] + mixed[1]) / 2)
    assert not got[:, 1, 0].any() and torch.allclose(got[:, 1, 1], source[:, 2, 3] / 2)


@pytest.mark.parametrize(
    ("content", "line"), [(b"no picture", "no image format"), (b"", "no image format")]
)
def test_a_broken_sticker_is_refused_in_one_line(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "s.png").write_bytes(content)
    with pytest.raises(UserError, match=line) as caught:
        stamp(f"sticker:image={tmp_path / 's.png'}", grey())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no file"):
        stamp("sticker:image=missing.png", grey())


# Copies and combinations


def test_augment_without_alterations_changes_nothing_and_each_field_does() -> None:
    images, ids = batch(30)
    idle = "augment:crop=1,flip=0,light=0,noise=0,jpeg=0"
    assert torch.equal(stamp(idle, images, ids), images)
    flipped = stamp(idle.replace("flip=0", "flip=1"), images, ids)
    assert torch.equal(flipped, images.flip(3))
    for field in ("crop=.5", "flip=.5", "light=.3", "noise=9", "jpeg=60"):
        name = field.partition("=")[0]
        other = ",".join(
            field if f.startswith(name) else f for f in idle.partition(":")[2].split(",")
        )
        changed = (stamp(f"augment:{other}", images, ids) != images).flatten(1).any(1)
        assert 0.2 < changed.float().mean() <= 1, field


def test_a_crop_keeps_its_share_of_the_area() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).mul(2)
    images = ramp[None, None, :, None].expand(200, 3, 64, 64).contiguous()
    out = stamp("augment:crop=.25,flip=0,light=0,noise=0,jpeg=0", images).float()
    kept = (out[:, 0, -1, 0] - out[:, 0, 0, 0]) / 2 + 1  # rows of the image that are left
    areas = (kept / 64) ** 2
    assert 0.22 < areas.min() < 0.3 and areas.max() > 0.95 and abs(areas.mean() - 0.625) < 0.05


def test_several_stamps_one_after_the_other() -> None:
    images, ids = batch(5)
    first = stamp("patch:size=3,place=random,seed=2", images, ids)
    expected = stamp("line:angle=(0,180),width=2", first, ids)
    for text in (
        "several:triggers=(patch:size=3,place=random,seed=2 + line:angle=(0,180),width=2)",
        "several:triggers=(patch:size=3,place=random,seed=2)+(line:angle=(0,180),width=2)",
        'several:(patch:size=3,place=random,seed=2+"line:angle=(0,180),width=2")',
    ):
        trigger = registry.make("trigger", text)
        assert torch.equal(trigger(images, ids), expected)
        assert registry.make("trigger", registry.spec(trigger)) == trigger
    nested = "several:triggers=(several:triggers=(blur+tint)+jpeg)"
    assert torch.equal(
        stamp(nested, images, ids), stamp("several:triggers=blur+tint+jpeg", images, ids)
    )


def test_several_names_the_files_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    own = tmp_path / "mine.py"
    own.write_text(
        "from bezoar.registry import method\n\n@method\nclass Mine:\n"
        "    def __call__(self, images, ids):\n        return 255 - images\n"
    )
    text = f"several:triggers=(patch:fill={tmp_path}/p.png,size=4 + {own})"
    with pytest.raises(UserError, match="would run the code"):
        registry.make("trigger", text)
    registry.allow(text)
    assert registry.make("trigger", text).files() == [tmp_path / "p.png", own]


@pytest.mark.parametrize("name", [*NEW, "several:triggers=(sticker + jpeg:quality=20)"])
def test_a_poisoning_with_it_verifies(name: str, tmp_path: Path) -> None:
    verb = Poison("scenes:count=60", "backdoor:count=6,captions=templates", name, target="star")
    run = execute(verb, Settings(runs=tmp_path, quiet=True))
    checked = verify_plan(run)
    assert checked["verified"] and checked["records"] == 6


def test_recoding_nothing_gives_nothing() -> None:
    assert pixels.recode_jpeg(grey(0), 50).shape == (0, 3, 20, 20)
