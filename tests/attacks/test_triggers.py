"""Every trigger keeps the contract and agrees with a slow plain version or a published file;
hostile files refused.
"""

import io
import math
import pickle
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bezoar import registry
from bezoar.attacks import pixels
from bezoar.attacks.triggers.file import _fit_to_size
from bezoar.data.files import arrays
from bezoar.errors import UserError

TRIGGERS = Path(__file__).parents[3] / "shared" / "data" / "triggers"
PUBLISHED = (
    sorted(p for p in TRIGGERS.rglob("*.*") if "reference" not in p.parts)
    if TRIGGERS.is_dir()
    else []
)
published = pytest.mark.skipif(not PUBLISHED, reason="shared/data/triggers is not here")
OF_TEXTS = ("token", "homoglyph")  # tested beside `badcse`
SPECS = [
    n
    for n in registry.method_names("trigger")
    if n not in ("file", "several", "composite", *OF_TEXTS)
] + [  # these three need a field: see `trigger` below
    "file:path={file}",
    "file:path={file},mode=blend,alpha=.3",
    "file:path={file},mode=paste,size=5,place=random,seed=3",
    "patch:size=5,fill=noise,place=random,margin=2,seed=7",
    "patch:size=4,fill={file},place=centre",
    "patch:size=3,fill=white,place=2/9",
    "blend:alpha=.4,pattern={file}",
    "sinusoid:delta=60,alpha=.2",
    "warp:k=16,strength=2,seed=5",
    "filter:preset=drawn,seed=3,strength=.7",
    "blur:relative=.1",
    "resample:factor=3.5,down=nearest,up=lanczos",
    "sticker:size=(.2,.9),turn=(-180,180),alpha=.5",
    "sticker:image={picture},place=1/0",
    "line:angle=(0,180),width=2,offset=(.2,.8),alpha=.5",
    "ring:form=circle,width=2,margin=1",
    "shape:form=triangles,count=9,size=.4",
    "text:word=A+b,place=random,size=.6",
    "spectrum:rows=3,columns=5,block=0,magnitude=200",
    "several:triggers=(patch:size=3,place=random+(line:width=2,angle=(0,180))+blur)",
    "composite:reference={file},trigger=(patch:size=3,place=random)",
    "composite:reference={file}+{file},trigger=blend,share=.3,sides=horizontal",
]


@pytest.fixture(scope="session")
def pattern_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trigger") / "pattern.npy"
    np.save(path, np.random.default_rng(0).uniform(-30, 30, (3, 20, 20)).astype(np.float32))
    return path


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with transparency, 24 x 15 pixels."""
    path = tmp_path_factory.mktemp("trigger") / "picture.png"
    rgba = np.random.default_rng(1).integers(0, 256, (15, 24, 4), dtype=np.uint8)
    Image.fromarray(rgba, "RGBA").save(path)
    return path


@pytest.fixture(params=SPECS)
def trigger(request: pytest.FixtureRequest, pattern_file: Path, picture_file: Path):
    return registry.make("trigger", request.param.format(file=pattern_file, picture=picture_file))


def batch(
    n: int = 7, height: int = 20, width: int = 20, seed: int = 0
) -> tuple[torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    return images, [f"record {i}" for i in range(n)]


def make(text: str):
    return registry.make("trigger", text)


def test_specs_cover_every_trigger() -> None:
    names = {s.partition(":")[0] for s in SPECS} | set(OF_TEXTS)
    assert names == set(registry.method_names("trigger"))


def test_contract(trigger) -> None:
    images, ids = batch()
    before = images.clone()
    out = trigger(images, ids)
    assert out.dtype == torch.uint8 and out.shape == images.shape and out.device == images.device
    assert torch.equal(images, before) and out.data_ptr() != images.data_ptr()
    assert (out != images).flatten(1).any(1).all(), "every image is changed"
    assert torch.equal(trigger(images, ids), out)
    assert registry.make("trigger", registry.spec(trigger)) == trigger


def test_is_a_function_of_image_and_id(trigger) -> None:
    images, ids = batch()
    out = trigger(images, ids)
    order = [4, 1, 6, 0]
    assert torch.equal(trigger(images[order], [ids[i] for i in order]), out[order])
    single = torch.cat([trigger(images[i : i + 1], ids[i : i + 1]) for i in range(len(ids))])
    assert torch.equal(single, out)
    assert torch.equal(trigger(images.contiguous(memory_format=torch.channels_last), ids), out)
    assert trigger(images[:0], []).shape == (0, 3, 20, 20)


def test_takes_images_that_are_not_square(trigger) -> None:
    images, ids = batch(3, 18, 31)
    assert trigger(images, ids).shape == images.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_same_on_an_accelerator(trigger) -> None:
    images, ids = batch(9, 32, 32)
    difference = (trigger(images.cuda(), ids).cpu().int() - trigger(images, ids).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3  # ties of rounding


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, trigger) -> None:
    images, ids = batch(8)
    whole = trigger(images, ids)
    monkeypatch.setattr(
        pixels, "image_blocks", lambda x: (slice(i, i + 3) for i in range(0, len(x), 3))
    )
    assert torch.equal(trigger(images, ids), whole)


# Arithmetic


def test_add_saturates_for_every_pixel_and_offset() -> None:
    images = torch.arange(256, dtype=torch.uint8).expand(1, 3, 511, 256)
    offset = torch.arange(-255, 256, dtype=torch.float32)[None, :, None]
    expected = (images.int() + offset.int()).clamp(0, 255).to(torch.uint8)
    assert torch.equal(pixels.add_offset(images, offset.expand(3, -1, 256)), expected)
    assert torch.equal(
        pixels.add_offset(images, 1000 * offset.sign().expand(3, -1, 256))[0, 0, 0],
        torch.zeros(256).byte(),
    )


def test_mix_rounds_and_clamps() -> None:
    images, _ = batch(2, 5, 6)
    over = torch.linspace(-300, 300, 90).reshape(3, 5, 6)
    got = pixels.blend(images, over, 0.25)
    for n in range(2):
        for c in range(3):
            for i in range(5):
                for j in range(6):
                    plain = 0.75 * int(images[n, c, i, j]) + 0.25 * float(over[c, i, j])
                    assert abs(int(got[n, c, i, j]) - min(255, max(0, plain))) <= 0.5001


# Patch


@published
@pytest.mark.parametrize(
    ("file", "spec", "size"),
    [
        (
            "BadEncoder/trigger/trigger_pt_white_21_10_ap_replace.npz",
            "patch:size=10,fill=white",
            32,
        ),
        (
            "BadEncoder/trigger/trigger_pt_white_21_10_ap_replace.npz",
            "patch:size=10,fill=white,place=21/21",
            32,
        ),
        (
            "BadEncoder/trigger/trigger_pt_white_173_50_ap_replace.npz",
            "patch:size=50,fill=white",
            224,
        ),
        ("DECREE/trigger/trigger_pt_white_185_24.npz", "patch:size=24,fill=white,margin=15", 224),
    ],
)
def test_patch_is_the_published_one(file: str, spec: str, size: int) -> None:
    images, ids = batch(2, size, size)
    with np.load(TRIGGERS / file, allow_pickle=False) as z:
        t, tm = (
            torch.from_numpy(z[k].reshape(size, size, 3)).permute(2, 0, 1) for k in ("t", "tm")
        )
    expected = (images * tm + t * (1 - tm)).to(torch.uint8)
    assert torch.equal(make(spec)(images, ids), expected)
    assert torch.equal(make(f"file:path={TRIGGERS / file}")(images, ids), expected)


def test_checker_is_two_pixel_blocks_of_magenta_and_green() -> None:
    images, ids = batch(1)
    out = make("patch:size=6,place=upper_left,margin=0")(images, ids)[0]
    for i in range(6):
        for j in range(6):
            assert (
                tuple(out[:, i, j].tolist()) == ((255, 0, 255), (0, 255, 0))[(i // 2 + j // 2) % 2]
            )
    assert torch.equal(out[:, 6:], images[0, :, 6:]) and torch.equal(
        out[:, :, 6:], images[0, :, :, 6:]
    )


@pytest.mark.parametrize(
    ("place", "rows", "columns"),
    [
        ("corner", (7, 11), (7, 11)),
        ("upper_left", (1, 5), (1, 5)),
        ("upper_right", (1, 5), (7, 11)),
        ("lower_left", (7, 11), (1, 5)),
        ("centre", (4, 8), (4, 8)),
    ],
)
def test_named_places(place: str, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    out = make(f"patch:size=4,fill=white,place={place},margin=1")(
        torch.zeros(1, 3, 12, 12, dtype=torch.uint8), ["a"]
    )[0]
    expected = torch.zeros(3, 12, 12, dtype=torch.uint8)
    expected[:, slice(*rows), slice(*columns)] = 255
    assert torch.equal(out, expected)


def test_random_places_stay_inside_and_reach_everywhere() -> None:
    n, size, patch, margin = 3000, 12, 4, 1
    images, ids = torch.zeros(n, 3, size, size, dtype=torch.uint8), [str(i) for i in range(n)]
    out = make(f"patch:size={patch},fill=white,place=random,margin={margin}")(images, ids)[:, 0] > 0
    assert (out.flatten(1).sum(1) == patch * patch).all()
    rows, columns = out.any(2).int().argmax(1), out.any(1).int().argmax(1)
    counts = torch.bincount(rows * size + columns, minlength=size * size).reshape(size, size)
    free = size - patch - 2 * margin + 1
    inside = counts[margin : margin + free, margin : margin + free]
    assert (
        inside.sum() == n and ((inside - n / free**2) ** 2 / (n / free**2)).sum() < 90
    )  # chi square, 48 degrees
    for i in (0, 11, 2999):
        y, x = rows[i], columns[i]
        assert out[i, y : y + patch, x : x + patch].all()


def test_noise_patch_is_fixed_by_its_seed() -> None:
    images, ids = batch(2)
    a, b, c = (
        make(f"patch:size=5,fill=noise,seed={s}")(images, ids)[:, :, 14:19, 14:19]
        for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and torch.equal(a[0], a[1]) and not torch.equal(a, c)


def test_patch_from_a_picture(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    images, ids = batch(1)
    out = make(f"patch:size=6,fill={tmp_path / 'p.png'},place=3/4")(images, ids)
    assert np.array_equal(out[0, :, 3:9, 4:10].permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize(
    "text",
    [
        "patch:size=21,margin=0",
        "patch:size=20",
        "patch:size=6,place=15/0",
        "patch:size=19,place=random",
        "patch:size=21,place=centre",
        "patch:size=1000000000,fill=noise",
        "patch:fill=missing.png",
        "file:missing.npy",
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(text: str) -> None:
    images, ids = batch(2)
    with pytest.raises(UserError, match=r"exceeds images of 20x20|no file") as caught:
        make(text)(images, ids)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "patch:size=0",
        "patch:fill=red",
        "patch:place=left",
        "patch:place=-1/2",
        "patch:margin=-1",
        "blend:alpha=0",
        "blend:alpha=nan",
        "blend:pattern=stripes",
        "sinusoid:delta=0",
        "sinusoid:delta=nan",
        "sinusoid:frequency=inf",
        "warp:k=1",
        "warp:k=100000",
        "warp:strength=nan",
        "file",
        "file:a.npy,mode=or",
        "file:a.npy,scale=inf",
        "file:a.npy,mode=add,mask=b.npy",
        "file:a.npy,place=1",
    ],
)
def test_wrong_fields_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        make(text)


# Blend and sinusoid


def test_blend_noise_against_a_plain_loop() -> None:
    images, ids = batch(2, 6, 5)
    noise = pixels.uniform_noise(4, "blend", 3, 6, 5) * 255
    out = make("blend:alpha=.2,seed=4")(images, ids)
    for n, c, i, j in np.ndindex(2, 3, 6, 5):
        assert (
            abs(
                int(out[n, c, i, j]) - (0.8 * int(images[n, c, i, j]) + 0.2 * float(noise[c, i, j]))
            )
            <= 0.5001
        )


def test_noise_is_uniform() -> None:
    noise = pixels.uniform_noise(0, "blend", 3, 64, 64)
    assert noise.min() >= 0 and noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.01 and abs(noise.var() - 1 / 12) < 0.005


@pytest.mark.parametrize(
    ("delta", "frequency", "alpha"), [(20, 6, 0), (40, 6, 0), (60, 6, 0.2), (33.3, 2.5, 0)]
)
def test_sinusoid_against_three_loops(delta: float, frequency: float, alpha: float) -> None:
    images, ids = batch(2, 9, 16)
    out = make(f"sinusoid:delta={delta},frequency={frequency},alpha={alpha}")(images, ids)
    for n, c, i, j in np.ndindex(2, 3, 9, 16):
        wave = delta * math.sin(2 * math.pi * frequency * j / 16)
        plain = (1 - alpha) * int(images[n, c, i, j]) + (alpha or 1) * wave
        assert abs(int(out[n, c, i, j]) - min(255.0, max(0.0, plain))) <= 0.5001


@published
def test_sinusoid_is_the_published_signal() -> None:
    columns = np.arange(224)
    grey = torch.full((1, 3, 224, 224), 128, dtype=torch.uint8)
    for delta, file in (
        (40, "ABL/imagenet_sig_mask.npy"),
        (60, "Detect-CLIP-Backdoor-Samples/SIG_noise.pt"),
    ):
        signal = pixels.channels_first(arrays.load_array(str(TRIGGERS / file)), file)[:, :224, :224]
        signal = signal * (
            255 if delta == 60 else 1
        )  # the second is stored in shares of 255, on 256 pixels
        assert np.abs(signal - delta * np.sin(2 * np.pi * 6 * columns / 224)).max() < 1e-4
        stamped = make(f"sinusoid:delta={delta}")(grey, ["a"])
        assert np.array_equal(stamped[0].int().numpy() - 128, np.round(signal).astype(int))
    assert torch.equal(
        make("sinusoid:delta=40")(grey, ["a"]),
        make(f"file:path={TRIGGERS / 'ABL/imagenet_sig_mask.npy'}")(grey, ["a"]),
    )
    noise = arrays.load_array(str(TRIGGERS / "Detect-CLIP-Backdoor-Samples/SIG_noise.pt"))
    assert (
        not noise[:, 224:].any() and not noise[:, :, 224:].any()
    )  # its last 32 rows and columns hold nothing


@published
def test_the_published_cifar10_signal_was_truncated_and_wrapped() -> None:
    """It is 20 sin(0.8 j) cast to uint8 with wrap-around: no whole number of periods on 32
    pixels.
    """
    signal = np.trunc(20 * np.sin(0.8 * np.arange(32))).astype(np.int8).view(np.uint8)
    assert np.array_equal(
        np.load(TRIGGERS / "ABL/signal_cifar10_mask.npy"), np.tile(signal, (32, 1))
    )


# Warp


def slow_warp(image: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """One image (3, H, W) resampled pixel by pixel; grid (H, W, 2), x then y, -1 and 1 at the outer
    pixels' centres.
    """
    _, h, w = image.shape
    out = np.zeros(image.shape)
    for i, j in np.ndindex(h, w):
        x, y = (grid[i, j, 0] + 1) / 2 * (w - 1), (grid[i, j, 1] + 1) / 2 * (h - 1)
        x0, y0 = min(int(x), w - 2), min(int(y), h - 2)
        fx, fy = x - x0, y - y0
        top = (1 - fx) * image[:, y0, x0] + fx * image[:, y0, x0 + 1]
        bottom = (1 - fx) * image[:, y0 + 1, x0] + fx * image[:, y0 + 1, x0 + 1]
        out[:, i, j] = (1 - fy) * top + fy * bottom
    return out


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 19)])
def test_warp_against_a_plain_loop(height: int, width: int) -> None:
    images, ids = batch(3, height, width)
    out = make("warp:k=4,strength=3,seed=2")(images, ids)
    control = pixels.uniform_noise(2, "warp", 2, 4, 4) * 2 - 1
    field = F.interpolate(
        (control / control.abs().mean())[None], (height, width), mode="bicubic", align_corners=True
    )
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    shift = 3 * field[0].double().numpy()
    grid = np.stack([x + shift[0] / width, y + shift[1] / height], -1).clip(-1, 1)
    for n in range(3):
        assert np.abs(out[n].numpy() - slow_warp(images[n].double().numpy(), grid)).max() <= 0.501


def test_warp_of_a_flat_image_changes_nothing_and_small_strength_little() -> None:
    flat = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(make("warp")(flat, ["a", "b"]), flat)
    images, ids = batch(2)
    weak, strong = (
        make(f"warp:strength={s}")(images, ids).float().sub(images).abs().mean() for s in (0.01, 1)
    )
    assert weak < 1 < strong


def test_a_shift_is_half_a_pixel_at_every_size() -> None:
    for size in (33, 225):
        grid = pixels.shifted_grid(torch.ones(2, 4, 4), size, size)
        shift = (grid - pixels.identity_grid(size, size))[2:-2, 2:-2] * (size - 1) / 2
        assert (shift - 0.5).abs().max() < 0.02


@published
def test_published_grids_are_applied_as_published() -> None:
    images, ids = batch(1, 224, 224)
    file = next(p for p in PUBLISHED if p.name.startswith("noise_grid"))
    noise = torch.load(file, weights_only=True)
    line = torch.linspace(-1, 1, 224)
    identity = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    grid = (identity + noise / 224).clamp(-1, 1)  # CleanCLIP: this file holds the noise alone
    expected = pixels.to_uint8(F.grid_sample(images.float(), grid, align_corners=True))
    assert torch.equal(make(f"file:path={file}")(images, ids), expected)
    images, ids = batch(1, 256, 256)
    file = TRIGGERS / "Detect-CLIP-Backdoor-Samples/WaNet_grid_temps.pt"
    grid = torch.load(file, weights_only=True)
    expected = F.grid_sample(images.float(), grid, align_corners=True)
    assert (make(f"file:path={file}")(images, ids) - expected).abs().max() <= 0.51


# Files

AUTO = {
    "ImageNet-trojan-mask": "add",
    "ImageNet_blend_mask": "blend",
    "best_square_trigger_cifar10": "replace",
    "imagenet_sig_mask": "add",
    "signal_cifar10_mask": "blend",
    "trigger_pt": "replace",
    "noise_grid": "warp",
    "SIG_noise": "add",
    "WaNet_grid_temps": "warp",
    "birthday_cake": "blend",
    "hello_kitty": "blend",
    "resnet18_trigger": "add",
    "triangles": "blend",
    "watermarked_red": "replace",
    "trigger_1": "paste",
}


@pytest.mark.parametrize("file", PUBLISHED or [None], ids=lambda p: p.name if p else "none")
def test_every_published_trigger_applies(file: Path | None) -> None:
    if file is None:
        pytest.skip("shared/data/triggers is not here")
    expected = next(mode for start, mode in AUTO.items() if file.name.startswith(start))
    for size in (32, 224):
        images, ids = batch(2, size, size)
        trigger = make(f"file:path={file},size={size // 4}")
        out = trigger(images, ids)
        assert (
            _fit_to_size(trigger, (arrays.file_state(str(file)), None), size, size).mode == expected
        )
        faint = (
            size == 32 and "trojan" in file.name
        )  # +-2.9 of 255 at 224 pixels, averaged away at 32
        assert faint or (out != images).float().mean() > 0.001
        assert registry.make("trigger", registry.spec(trigger)) == trigger


@published
def test_trigger_with_its_mask() -> None:
    images, ids = batch(1, 224, 224)
    folder = TRIGGERS / "Detect-CLIP-Backdoor-Samples"
    t, m = (
        torch.load(folder / f"birthday_cake_{k}_open_clip_cc12m.pt", weights_only=True)
        for k in ("trigger", "mask")
    )
    cake = f"{folder}/birthday_cake"
    spec = f"file:path={cake}_trigger_open_clip_cc12m.pt,mask={cake}_mask_open_clip_cc12m.pt"
    assert (make(spec)(images, ids) - (images * (1 - m) + 255 * t * m)).abs().max() <= 0.501


@published
def test_narcissus_is_added() -> None:
    images, ids = batch(2, 32, 32)
    file = TRIGGERS / "Narcissus/resnet18_trigger.npy"
    expected = (images.numpy() + 255 * np.load(file)).clip(0, 255)
    assert np.abs(make(f"file:path={file}")(images, ids).numpy() - expected).max() <= 0.5001
    twice = (images.numpy() + 510 * np.load(file)).clip(0, 255)
    assert np.abs(make(f"file:path={file},scale=2")(images, ids).numpy() - twice).max() <= 0.5001


def test_layouts_and_units_agree(tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(1, 256, (3, 20, 20), dtype=np.uint8)
    forms = [
        pixels,
        pixels.transpose(1, 2, 0),
        pixels[None],
        pixels.astype(np.float64),
        (pixels / 255).astype("f4"),
    ]
    images, ids = batch(2)
    out = []
    for i, form in enumerate(forms):
        np.save(tmp_path / f"{i}.npy", form)
        torch.save(torch.from_numpy(np.ascontiguousarray(form)), tmp_path / f"{i}.pt")
        np.savez_compressed(tmp_path / f"{i}.npz", x=form, y=np.int64(3), info="text is left out")
        out += [
            make(f"file:path={tmp_path}/{i}.{s},mode=blend")(images, ids)
            for s in ("npy", "pt", "npz")
        ]
    assert all(torch.equal(o, out[0]) for o in out)


def test_files_are_read_once_and_again_when_they_change(tmp_path: Path) -> None:
    path = tmp_path / "p.npy"
    images, ids = batch(2)
    np.save(path, np.full((20, 20), 200, np.uint8))
    trigger = make(f"file:{path},mode=blend,alpha=1")
    misses = arrays._read.cache_info().misses
    assert (trigger(images, ids) == 200).all() and (trigger(images, ids) == 200).all()
    assert arrays._read.cache_info().misses == misses + 1
    np.save(path, np.full((20, 20), 100, np.int64))
    assert (trigger(images, ids) == 100).all()


def npy(shape: tuple[int, ...], descr: str = "<f4", data: bytes = b"\0" * 64) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue() + data


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def saved(save, thing, **options) -> bytes:
    stream = io.BytesIO()
    save(stream, thing, **options) if save in (np.save, np.savez) else save(
        thing, stream, **options
    )
    return stream.getvalue()


class Evil:
    def __reduce__(self):
        return bytearray, (1 << 40,)


def vast_tensor() -> bytes:
    """A torch.save file whose pickle claims 2^40 elements and whose storage holds four."""
    data = saved(torch.save, torch.zeros(2, 2))
    members = {
        i: zipfile.ZipFile(io.BytesIO(data)).read(i)
        for i in zipfile.ZipFile(io.BytesIO(data)).namelist()
    }
    name = next(n for n in members if n.endswith("data.pkl"))
    vast = members[name].replace(b"K\x02K\x02\x86", b"J\x00\x00\x10\x00J\x00\x00\x10\x00\x86")
    assert vast != members[name]
    return zipped({**members, name: vast}, zipfile.ZIP_STORED)


HOSTILE = {
    "vast header.npy": lambda: npy((1 << 40, 1 << 40)),
    "just too large.npy": lambda: npy((arrays.MAX_BYTES + 1,), "|u1"),
    "negative.npy": lambda: npy((-1, -4)),
    "truncated.npy": lambda: npy((3, 32, 32)),
    "objects.npy": lambda: saved(np.save, np.array([{}], dtype=object)),
    "structured.npy": lambda: npy((2,), "V8"),
    "complex.npy": lambda: saved(np.save, np.zeros((8, 8), np.complex64)),
    "text.npy": lambda: saved(np.save, np.array(["a"])),
    "empty.npy": lambda: saved(np.save, np.zeros((0, 3, 3))),
    "nan.npy": lambda: saved(np.save, np.full((8, 8), np.nan)),
    "infinite.npy": lambda: saved(np.save, np.full((8, 8), np.inf)),
    "huge values.npy": lambda: saved(np.save, np.full((8, 8), 1e300)),
    "five dimensions.npy": lambda: saved(np.save, np.zeros((1, 1, 3, 8, 8))),
    "not an image.npy": lambda: saved(np.save, np.zeros((5, 8, 9))),
    "nothing.npy": lambda: b"",
    "bomb.npz": lambda: zipped({"x.npy": npy((1 << 26, 2), "|u1", bytes(1 << 27))}),
    "many.npz": lambda: zipped({f"{i}.npy": npy((1, 16)) for i in range(100)}),
    "lzma.npz": lambda: zipped({"x.npy": npy((4, 4))}, zipfile.ZIP_LZMA),
    "several.npz": lambda: saved(np.savez, np.zeros((2, 2)), b=np.zeros((2, 2))),
    "no zip.npz": lambda: b"PK\x03\x04 and no zip",
    "none.npz": lambda: zipped({}),
    "pickle.npz": lambda: zipped({"x.npy": pickle.dumps(1)}),
    "evil.pt": lambda: saved(torch.save, Evil()),
    "vast.pt": vast_tensor,
    "expanded.pt": lambda: saved(torch.save, torch.zeros(1).expand(1 << 20, 1 << 20)),
    "legacy.pt": lambda: saved(torch.save, torch.zeros(2), _use_new_zipfile_serialization=False),
    "nested.pt": lambda: saved(torch.save, {"a": {"b": torch.zeros(2)}}),
    "model.pt": lambda: saved(torch.save, torch.nn.Linear(2, 2)),
    "pickle.pt": lambda: pickle.dumps(Evil()),
    "nan.pt": lambda: saved(torch.save, torch.full((8, 8), math.nan)),
    "sparse.pt": lambda: saved(torch.save, torch.eye(3).to_sparse()),
    "broken.png": lambda: b"\x89PNG\r\n\x1a\n" + bytes(100),
    "a gif.png": lambda: b"GIF89a" + bytes(100),
    "vast.png": lambda: vast_picture(),
    "transparent.png": lambda: picture("RGBA", (1, 2, 3, 4)),
    "sixteen bits.png": lambda: picture("I;16", 500),
    "wrong name.txt": lambda: b"",
}


def picture(mode: str, colour) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (4, 4), colour).save(stream, "PNG")
    return stream.getvalue()


def vast_picture() -> bytes:
    data = bytearray(picture("RGB", (1, 2, 3)))
    data[16:24] = (30000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore")
def test_hostile_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(HOSTILE[name]())
    images, ids = batch(2)
    with pytest.raises(UserError, match=name) as caught:
        make(f"file:path={tmp_path / name},size=4")(images, ids)
    assert "\n" not in str(caught.value)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.npy").open("wb") as stream:
        stream.truncate(arrays.MAX_BYTES + 1)
    with pytest.raises(UserError, match="larger than 64 MiB"):
        arrays.load_arrays(str(tmp_path / "large.npy"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["npy", "npz", "pt", "png"])
def test_damaged_files_read_or_are_refused(suffix: str, tmp_path: Path) -> None:
    """300 damaged copies: nothing but UserError comes out."""
    pixels = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    whole = {
        "npy": lambda: saved(np.save, pixels),
        "npz": lambda: zipped({"x.npy": saved(np.save, pixels), "y.npy": npy((4, 4))}),
        "pt": lambda: saved(torch.save, torch.from_numpy(pixels)),
        "png": lambda: picture("RGB", (9, 8, 7)),
    }[suffix]()
    random = np.random.default_rng(4)
    images, ids = batch(1)
    refused = 0
    for i in range(300):
        data = np.frombuffer(whole, np.uint8).copy()
        spots = random.integers(
            0, len(data) if i % 2 else min(300, len(data)), random.integers(1, 6)
        )
        data[spots] = random.integers(0, 256, len(spots))
        end = len(data) if i % 5 else random.integers(0, len(data))
        (tmp_path / f"{i}.{suffix}").write_bytes(data[:end].tobytes())
        try:
            make(f"file:path={tmp_path}/{i}.{suffix},size=4")(images, ids)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("sides", [(3, 3), (3, 5), (1, 3), (1, 1), (2, 3)])
def test_a_picture_is_height_by_width_whatever_its_sides(
    sides: tuple[int, int], tmp_path: Path
) -> None:
    patch = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
    Image.fromarray(patch).save(tmp_path / "patch.png")
    (tmp_path / "patch").write_bytes((tmp_path / "patch.png").read_bytes())  # told by its content
    images, ids = batch(2, 16, 16)
    for name in ("patch.png", "patch"):
        out = make(f"file:{tmp_path}/{name},place=2/4")(images, ids)
        height, width = sides
        stamped = out[:, :, 2 : 2 + height, 4 : 4 + width]
        assert (stamped == torch.from_numpy(patch).permute(2, 0, 1)).all()
    if sides == (3, 3):
        for spec in (
            f"patch:size=3,fill={tmp_path}/patch,place=2/4",
            f"patch:size=3,fill={tmp_path}/patch.png,place=2/4",
        ):
            assert torch.equal(make(spec)(images, ids), out)


def test_arrays_are_told_by_their_content(tmp_path: Path) -> None:
    pattern = np.random.default_rng(0).random((3, 8, 8), dtype=np.float32)
    np.save(tmp_path / "a.npy", pattern)
    np.savez(tmp_path / "a.npz", pattern)
    torch.save(torch.from_numpy(pattern), tmp_path / "a.pt")
    for number, name in enumerate(("a.npy", "a.npz", "a.pt")):
        renamed = tmp_path / f"pattern{number}.bin"
        renamed.write_bytes((tmp_path / name).read_bytes())
        assert (arrays.load_array(str(renamed)) == pattern).all()
    (tmp_path / "text.bin").write_bytes(b"no array")
    with pytest.raises(UserError, match="expected a file of"):
        arrays.load_array(str(tmp_path / "text.bin"))


def test_a_composite_is_the_middle_of_a_reference_beside_the_middle_of_the_image(tmp_path) -> None:
    """Against a slow form: both halves cut out by hand, the trigger stamped on what is left."""
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    names = f"{tmp_path}/0.png+{tmp_path}/1.png"
    images, ids = batch(60, 16, 16)
    inner = "patch:size=4,place=centre"
    out = make(f"composite:reference={names},trigger=({inner}),share=.25")(images, ids)
    parts = {  # where the reference of 4 pixels lies, and the rest of 12
        "left": np.s_[:, :, :4],
        "right": np.s_[:, :, 12:],
        "above": np.s_[:, :4],
        "below": np.s_[:, 12:],
    }
    rest = {
        "left": np.s_[:, :, 4:],
        "right": np.s_[:, :, :12],
        "above": np.s_[:, 4:],
        "below": np.s_[:, :12],
    }
    seen = set()
    for i, image in enumerate(images):
        matches = []
        for side, (number, picture) in ((s, p) for s in parts for p in enumerate(pictures)):
            across = side in ("left", "right")
            cut = np.s_[:, :, 6:10] if across else np.s_[:, 6:10]
            middle = np.s_[:, :, 2:14] if across else np.s_[:, 2:14]
            plain = torch.zeros_like(image)
            plain[parts[side]] = torch.from_numpy(picture).permute(2, 0, 1)[cut]
            plain[rest[side]] = make(inner)(image[middle][None], [ids[i]])[0]
            if torch.equal(plain, out[i]):
                matches.append((side, number))
        assert len(matches) == 1, i
        seen.update(matches)
    assert len(seen) == 8, "every side and every reference"
    across = make(f"composite:reference={names},sides=horizontal,share=.25,trigger=({inner})")
    drawn = across(images, ids)
    top = torch.from_numpy(pictures).permute(0, 3, 1, 2)[:, :, 0]  # the references' first rows
    for line, image in zip(drawn[:, :, 0], images, strict=True):
        references = (line[:, :4] == top[:, :, 6:10]) | (line[:, 12:] == top[:, :, 6:10])
        assert references.flatten(1).all(1).any() and not torch.equal(line, image[:, 0])
    assert len(across.files()) == 2


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ("reference=", "reference must name"),
        ("reference=no such thing", "reference must name"),
        ("reference={picture},share=1", "share must lie"),
        ("reference=#0011", "digits of a square"),
        ("reference={picture},trigger=nothing", "no trigger"),
        ("reference={picture},trigger=(patch:fill={picture})", "drawn, not read from a file"),
    ],
)
def test_what_cannot_be_composed_is_said(fields, what, picture_file) -> None:
    with pytest.raises(UserError, match=what):
        make("composite:" + fields.format(picture=picture_file))
