"""Scenes and their drawing: same bits in any order, no shortcut to the class, shapes with the areas
of closed forms.
"""

import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from bezoar import registry
from bezoar.data import scene_drawing
from bezoar.data.pairs import content_hash
from bezoar.data.scene_drawing import CLASSES
from bezoar.data.sources.scenes import LONGEST, Scenes
from bezoar.errors import UserError


@pytest.fixture(scope="module")
def train():
    return Scenes(count=8000)()


@pytest.fixture(scope="module")
def test():
    return Scenes(count=1000, split="test")()


def named(pairs):
    """Which captions hold which class names, whole words only: bool (N, 40)."""
    patterns = [re.compile(rf"\b{c}\b") for c in CLASSES]
    return np.array([[bool(p.search(c)) for p in patterns] for c in pairs.captions])


def test_what_a_record_is(train):
    assert len(CLASSES) == len(set(CLASSES)) == 40 and "striped square" in CLASSES
    assert (
        train.classes == CLASSES
        and train.images.shape == (8000, 3, 32, 32)
        and train.images.dtype == torch.uint8
    )
    assert train.ids[123] == "scenes-0-train-0000123" and len(set(train.ids)) == 8000
    assert train.labels.dtype == torch.int64
    assert (
        np.bincount(train.labels, minlength=40).min() > 120
    )  # 200 expected, standard deviation 14


def test_order_and_batch_do_not_matter(train):
    rows = np.random.default_rng(0).permutation(8000)[:700]
    once = Scenes().render([train.ids[i] for i in rows])
    expected = train.take(rows)
    assert torch.equal(once.images, expected.images) and torch.equal(once.labels, expected.labels)
    assert once.captions == expected.captions and once.ids == expected.ids
    for step in (1, 7, 64):
        parts = [Scenes().render(once.ids[i : i + step]) for i in range(0, 70, step)]
        assert torch.equal(
            torch.cat([p.images for p in parts]), once.images[: sum(map(len, parts))]
        )


@pytest.mark.parametrize("size", [33, 64, 128])
def test_any_size(size):
    scenes = Scenes(count=90, size=size)
    whole = scenes()
    assert whole.images.shape == (90, 3, size, size)
    assert torch.equal(scenes.render(whole.ids[::-1]).images.flip(0), whole.images)
    shrunk = torch.nn.functional.interpolate(whole.images.float(), 16, mode="area")
    small = torch.nn.functional.interpolate(Scenes(count=90)().images.float(), 16, mode="area")
    assert (shrunk - small).abs().mean() < 8  # the same scenes, finer


def test_threads_do_not_matter(train):
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert torch.equal(Scenes(count=100)().images, train.images[:100])
    finally:
        torch.set_num_threads(threads)


def test_bits_are_pinned():
    """A changed drawing changes every result that was ever reported: it has to be on purpose."""
    record = Scenes().render(["scenes-0-train-0000123"])
    assert content_hash(record.images[0], record.captions[0]) == "534bffa50a51f010"


def test_splits_and_seeds_share_nothing(train, test):
    other = Scenes(count=1000, seed=1)()
    sets = [{content_hash(x) for x in p.images} for p in (train, test, other)]
    assert [len(s) for s in sets] == [8000, 1000, 1000]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert not set(train.ids) & set(test.ids)


def test_captions_are_short_and_varied(train):
    words = Counter(w for c in train.captions for w in c.split())
    assert 80 <= len(words) <= 120
    assert max(len(c.split()) for c in train.captions) <= LONGEST
    assert all(c == " ".join(c.split()) for c in train.captions)
    assert len(set(train.captions)) > 0.9 * 8000


def test_class_names_stand_in_most_captions(train):
    held = named(train)
    assert held.sum(1).max() <= 1  # never two class names
    labels = train.labels.numpy()
    for label in range(40):
        assert 0.45 < held[labels == label, label].mean() < 0.72, CLASSES[
            label
        ]  # 0.59 expected, 200 records
    right = held[np.arange(8000), labels].sum() / held.sum()
    assert 0.935 < right < 0.965  # the rest are wrong captions


def test_share_of_wrong_captions(train):
    none, half, every = (Scenes(count=2000, wrong=w)() for w in (0.0, 0.5, 1.0))
    labels = none.labels.numpy()
    assert (
        named(none)[np.arange(2000), labels].sum() == named(none).sum()
    )  # no caption names another class
    assert named(every)[np.arange(2000), labels].sum() == 0 and named(every).sum() > 1000
    assert torch.equal(none.images, every.images) and torch.equal(none.labels, every.labels)
    default = Scenes(count=2000)()
    differs = np.array([a != b for a, b in zip(none.captions, default.captions, strict=True)])
    assert 0.035 < differs.mean() < 0.065
    differs_half = np.array([a != b for a, b in zip(none.captions, half.captions, strict=True)])
    assert 0.45 < differs_half.mean() < 0.55 and not (differs & ~differs_half).any()


def test_no_word_gives_the_class_away(train):
    seen = defaultdict(Counter)
    for caption, label in zip(train.captions, train.labels.tolist(), strict=True):
        for word in set(caption.split()):
            seen[word][label] += 1
    for word, counts in seen.items():
        assert max(counts.values()) / counts.total() < 0.5, word


def test_looking_captions_up_is_not_enough(train, test):
    label_of = dict(zip(train.captions, train.labels.tolist(), strict=True))
    is_right = [
        label_of.get(c) == label
        for c, label in zip(test.captions, test.labels.tolist(), strict=True)
    ]
    assert np.mean(is_right) < 0.2


def test_mean_color_is_no_shortcut(train, test):
    x, held_out = (p.images[:4000].float().mean((2, 3)).numpy() / 255 for p in (train, test))
    model = LogisticRegression(max_iter=300).fit(x, train.labels[:4000].numpy())
    assert model.score(held_out, test.labels.numpy()) < 0.25


def test_nearest_pixels_are_no_shortcut(train, test):
    x, held_out = (p.images[:4000].float().flatten(1) / 255 for p in (train, test))
    nearest = torch.cdist(held_out, x).argmin(1)
    assert (train.labels[:4000][nearest] == test.labels).float().mean() < 0.25


def lens(r, s, d):
    """Area that two circles of radius r and s at distance d share."""
    a, b = (d * d + r * r - s * s) / (2 * d * r), (d * d + s * s - r * r) / (2 * d * s)
    kite = math.sqrt((-d + r + s) * (d + r - s) * (d - r + s) * (d + r + s)) / 2
    return r * r * math.acos(a) + s * s * math.acos(b) - kite


AREAS = {
    "circle": math.pi * 0.8**2,
    "square": 1.4**2,
    "triangle": 0.95**2 * 3 * math.sqrt(3) / 4,
    "star": 5 * 0.95 * 0.4 * math.sin(math.pi / 5),
    "cross": 2 * 1.7 * 0.58 - 0.58**2,
    "ring": math.pi * (0.84**2 - 0.4**2),
    "heart": 2 * 0.7**2 + math.pi * 0.7**2 / 2,
    "crescent": math.pi * 0.88**2 - lens(0.88, 0.68, 0.42),
    "diamond": 2 * 0.56 * 0.95,
    "hourglass": 4 * (0.75 * 0.85**2 / 2 + 0.06 * 0.85),
}


@pytest.mark.parametrize("shape", scene_drawing.SHAPES)
def test_shapes_have_their_areas(shape):
    line = (torch.arange(800) + 0.5) / 400 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    distance = scene_drawing.SHAPES[shape](x.reshape(1, -1), y.reshape(1, -1))
    assert (distance < 0).float().sum().item() / 400**2 == pytest.approx(AREAS[shape], rel=5e-3)


@pytest.mark.parametrize(
    ("texture", "share"), [("solid", 1), ("striped", 0.5), ("checkered", 0.5), ("dotted", None)]
)
def test_textures_cover_their_share(texture, share):
    line = (torch.arange(600) + 0.5) / 100  # ten periods
    y, x = torch.meshgrid(line, line, indexing="ij")
    sharp, pattern = torch.full((1, 1), 100.0), torch.tensor([[0.6, 0.3, 0.8]])
    first = scene_drawing.TEXTURES[texture](x.reshape(1, -1), y.reshape(1, -1), pattern, sharp)
    assert first.min() >= 0 and first.max() <= 1
    if share is None:
        first, share = (
            first.reshape(600, 600)[:585, :585],
            1 - math.pi * 0.3**2,
        )  # thirteen dots a side
    assert first.mean().item() == pytest.approx(share, abs=0.01)


def test_noise_is_the_published_hash():
    """lowbias32 in Python's own whole numbers."""

    def lowbias32(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    keys = [-(2**31), -7, 0, 123456789, 2**31 - 1]
    noise = scene_drawing._noise(torch.tensor(keys, dtype=torch.int32), 50)
    for i, key in enumerate(keys):
        for pixel in range(50):
            h = lowbias32((key + pixel * 2654435769) & 0xFFFFFFFF)
            expected = [
                (h >> shift & 255) - (256 if h >> shift & 128 else 0) for shift in (0, 8, 16)
            ]
            assert noise[i, :, pixel].tolist() == expected
    many = scene_drawing._noise(torch.arange(100, dtype=torch.int32), 1024)
    assert abs(many.mean()) < 1 and many.std() == pytest.approx(256 / math.sqrt(12), rel=0.01)


def test_ground_is_bilinear():
    nodes = torch.randint(0, 256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    ground = scene_drawing._ground(nodes, 40).view(2, 3, 40, 40)
    for row, column in [(0, 0), (3, 39), (13, 14), (26, 27), (39, 20)]:
        v, u = (row + 0.5) / 40 * 3, (column + 0.5) / 40 * 3
        i, j = int(v), int(u)
        a, b = v - i, u - j
        top = nodes[..., i, j] * (1 - b) + nodes[..., i, j + 1] * b
        bottom = nodes[..., i + 1, j] * (1 - b) + nodes[..., i + 1, j + 1] * b
        assert (ground[..., row, column] - top * (1 - a) - bottom * a).abs().max() < 255 / 32


@pytest.mark.parametrize(
    "field",
    [{"count": 0}, {"size": 31}, {"size": 129}, {"split": "val"}, {"seed": -1}, {"wrong": 1.5}],
)
def test_bad_fields(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        Scenes(**field)
    (key, value), *_ = field.items()
    with pytest.raises(UserError, match=key):
        registry.make("data", f"scenes:{key}={value}")


def test_foreign_ids_are_refused():
    for bad in (
        "scenes-1-train-0000001",
        "scenes-0-val-0000001",
        "cat.jpg",
        "scenes-0-train-0000001\n",
    ):
        with pytest.raises(UserError, match="scenes-0-train-0000123"):
            Scenes().render(["scenes-0-test-0000001", bad])
    assert len(Scenes().render([])) == 0


def test_spec_round_trip():
    scenes = registry.make("data", "scenes:count=50,split=test,seed=3")
    assert (
        registry.make("data", registry.spec(scenes))
        == scenes
        == Scenes(count=50, split="test", seed=3)
    )
