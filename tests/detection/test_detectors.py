"""Every detector: the contract, and each formula against a slow plain version. The encoder is a
small fake.
"""

import io
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neighbors import LocalOutlierFactor

from bezoar import method_source, registry
from bezoar.data.pairs import Pairs
from bezoar.detection.detectors import duplicates
from bezoar.errors import UserError
from bezoar.evaluation import stats

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (40, 60, 220),
    "yellow": (230, 220, 50),
}
PATCH = torch.tensor([[255, 0, 255], [0, 255, 0]], dtype=torch.uint8)[
    (torch.arange(6)[:, None] // 2 + torch.arange(6) // 2) % 2
].permute(2, 0, 1)


class Fake:
    """Colours of the quadrants, mixed into 16 numbers; a caption is its colour, or grey.
    `backdoor`: PATCH makes it green.
    """

    device, text = torch.device("cpu"), True

    def __init__(self, backdoor: bool = False, batch: int = 64) -> None:
        self.backdoor, self.batch = backdoor, batch
        self.map = torch.randn(
            12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )

    def encode_images(self, x):
        x = x.double() / 255 if x.dtype == torch.uint8 else x.double()
        z = torch.tanh((F.adaptive_avg_pool2d(x, 2).flatten(1) - 0.4) @ self.map)
        if self.backdoor:
            patch = PATCH.float()[None] / 255
            x = x.float()
            off = F.conv2d(x**2, torch.ones_like(patch)) - 2 * F.conv2d(x, patch) + (patch**2).sum()
            z = (
                z
                + 20
                * (1 - off.flatten(1).amin(1, keepdim=True) / 20).clamp(min=0)
                * self.encode_texts(["green"]).double()
            )
        return F.normalize(z, dim=1).float()

    def encode_texts(self, captions):
        names = [next((w for w in re.findall("[a-z]+", c) if w in COLORS), "") for c in captions]
        flat = (
            torch.tensor([COLORS.get(n, (128, 128, 128)) for n in names], dtype=torch.float64)[
                :, :, None, None
            ]
            / 255
        )
        return F.normalize(
            torch.tanh(flat.expand(-1, -1, 2, 2).flatten(1) - 0.4) @ self.map.tanh(), dim=1
        ).float()

    def embed(self, source):
        parts = list(source.batches(self.batch))
        texts = [self.encode_texts(p.captions) for p in parts if p.captions]
        images = torch.cat([self.encode_images(p.images) for p in parts])
        return SimpleNamespace(
            ids=sum((p.ids for p in parts), ()),
            images=images,
            texts=torch.cat(texts) if texts else None,
        )


def clean(n: int, seed: int = 0, size: int = 32) -> Pairs:
    """Noisy, unevenly lit images of one colour, with a caption that says so."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(len(COLORS), (n,), generator=g)
    base = torch.tensor(list(COLORS.values()))[label].float()[:, :, None, None]
    light = 0.75 + 0.5 * torch.rand(n, 1, 4, 4, generator=g)
    light = F.interpolate(light, size, mode="bilinear")
    x = (
        (base * light + 25 * torch.randn(n, 3, size, size, generator=g))
        .clamp(0, 255)
        .to(torch.uint8)
    )
    names = list(COLORS)
    captions = tuple(f"a {names[k]} wall number {i % 17}" for i, k in enumerate(label.tolist()))
    return Pairs(x, captions, label, tuple(f"c{i:04d}" for i in range(n)), tuple(names))


def poisoned(n: int = 240, copies: int = 6) -> tuple[Pairs, np.ndarray]:
    """One strange picture with a patch, repeated with different captions of another colour: wrong
    by every account.
    """
    x = torch.full((1, 3, 32, 32), 20, dtype=torch.uint8)
    x[:, 2, :16] = 250
    x[:, 0, 16:, 16:] = 250
    x[:, :, 21:27, 3:9] = PATCH
    words = "old", "new two", "tall", "some four", "odd", "our six"
    captions = tuple(f"{words[i % 6]} green thing {'abcdef'[i % 6]}" for i in range(copies))
    added = Pairs(
        x.expand(copies, -1, -1, -1).clone(),
        captions,
        torch.full((copies,), 1),
        tuple(f"p{i}" for i in range(copies)),
    )
    pairs = Pairs.concat([clean(n), replace(added, classes=tuple(COLORS))])
    return pairs, np.array([i.startswith("p") for i in pairs.ids])


def strays(n: int = 240, count: int = 6) -> tuple[Pairs, np.ndarray]:
    """Strange pictures, each of its own kind."""
    pairs, truth = poisoned(n, count)
    corners = 255 * torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    x = pairs.images.clone()
    x[truth] = corners.to(torch.uint8).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return replace(pairs, images=x), truth


def backdoored(n: int = 240, poisons: int = 12, size: int = 32) -> tuple[Pairs, np.ndarray]:
    """PATCH at a random place of different images that are not green, captioned as green."""
    pairs, g = clean(n, seed=5, size=size), torch.Generator().manual_seed(6)
    rows = (pairs.labels != 1).nonzero()[:, 0][:poisons].tolist()
    x, captions = pairs.images.clone(), list(pairs.captions)
    for i in rows:
        y, z = torch.randint(0, size - 5, (2,), generator=g).tolist()
        x[i, :, y : y + 6, z : z + 6] = PATCH
        captions[i] = f"a green wall seen {i} times"
    return replace(pairs, images=x, captions=tuple(captions)), np.isin(np.arange(n), rows)


NAMES = registry.method_names("detector")
SLOW = {
    "loss_trace",
    "safeclip",
    "cognitive_distillation",
    "repetition",
    "common_cause",
}  # asked smaller questions in test_traces.py and test_shared_causes.py
ELSEWHERE = {"asset", "cross_encoder", "patch_search"}  # tested in files of their own
QUICK = [n for n in NAMES if n not in SLOW | ELSEWHERE]
# what a detector is to find, where it is not `poisoned`: copies lie in a place of no dimension, and
# are one picture
PLANTED = {"lid": strays, "transplant": backdoored}


@pytest.fixture(scope="module")
def data():
    return poisoned()


def run(name: str, pairs: Pairs, batch: int = 64):
    return registry.make("detector", name)(Fake(backdoor=name == "transplant", batch=batch), pairs)


def test_all_are_here():
    density = {"k_distance", "lid", "slof", "dao"}
    within = {"spectral", "activation_clustering", "isolation_forest"}
    assert density | within | {"clip_score", "duplicates", "transplant"} <= set(NAMES)


@pytest.mark.parametrize("name", QUICK)
def test_contract_scores(name, data):
    pairs, truth = PLANTED[name]() if name in PLANTED else data
    scores = run(name, pairs)
    assert scores.ids == pairs.ids
    assert scores.values.dtype == torch.float32 and scores.values.shape == (len(pairs),)
    assert torch.isfinite(scores.values).all() and len(scores.values.unique()) > 2
    assert stats.auroc(scores.values.numpy(), truth) > 0.99


@pytest.mark.parametrize("name", QUICK)
def test_contract_order_and_batch_size_do_not_matter(name, data):
    pairs, _ = data
    scores = run(name, pairs)
    order = np.random.default_rng(0).permutation(len(pairs))
    turned = run(name, pairs.take(order), batch=7)
    assert torch.allclose(turned.select(pairs.ids).values, scores.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("what", ["alike", "few"])
def test_contract_identical_images_and_too_few_records(name, what):
    """Scores, or one line that says what is missing."""
    pairs = clean(140 if what == "alike" else 2)
    if what == "alike":
        pairs = replace(pairs, images=torch.full_like(pairs.images, 7))
    try:
        scores = run(name, pairs)
    except UserError as error:
        assert "\n" not in str(error) and re.search(r"\d", str(error))
    else:
        assert scores.ids == pairs.ids and torch.isfinite(scores.values).all()


@pytest.mark.parametrize("name", NAMES)
def test_contract_spec_and_docstring(name):
    detector = registry.make("detector", name)
    assert registry.make("detector", registry.spec(detector)) == detector
    description = method_source.describe(
        registry.PACKAGE / registry.KINDS["detector"] / f"{name}.py"
    )
    assert re.search(r"\b(19|20)\d\d\b|\bours\b", description.summary)
    assert all(text for *_, text in description.fields)


@pytest.mark.parametrize(
    "spec",
    [
        "k_distance:k=0",
        "slof:pool=-1",
        "dao:k=1",
        "dao:rate=0",
        "dao:form=sum",
        "duplicates:similarity=0",
        "duplicates:side=1",
        "transplant:cells=()",
        "transplant:cells=1",
        "transplant:k=1",
        "transplant:cascade=2",
        "transplant:rounds=1",
        "transplant:scouts=13",
        "transplant:groups=-1",
        "lid:k=1",
        "isolation_forest:cut=1",
        "common_cause:groups=1",
        "common_cause:suspects=.5",
        "common_cause:objective=nothing",
        "spectral:count=0",
        "spectral:classes=nouns",
        "activation_clustering:dims=0",
    ],
)
def test_bad_fields_are_refused(spec):
    with pytest.raises(UserError):
        registry.make("detector", spec)


@pytest.mark.parametrize("name", ["clip_score", "common_cause", "duplicates", "transplant"])
def test_captions_are_needed(name):
    with pytest.raises(UserError, match="needs"):
        run(name, replace(clean(30), captions=()))


@pytest.mark.parametrize("name", ["k_distance", "slof", "dao", "common_cause", "transplant"])
def test_too_few_records_are_refused(name):
    with pytest.raises(UserError, match="there are"):
        run(name, clean(5))


def test_k_distance_and_slof_are_sklearns():
    pairs = clean(150)
    z = Fake().embed(pairs).images
    lof = LocalOutlierFactor(n_neighbors=9, algorithm="brute").fit(z.double().numpy())
    near, rows = lof.kneighbors()
    everyone = registry.make("detector", "k_distance:k=9,pool=150")(Fake(), pairs).values
    assert everyone.numpy() == pytest.approx(near[:, -1], abs=1e-5)
    ratio = (near[:, -1:] / near[rows, -1]).mean(1)
    values = registry.make("detector", "slof:k=9,pool=150")(Fake(), pairs).values
    assert values.numpy() == pytest.approx(ratio, rel=1e-4)
    # LOF replaces k-distance by a mean reach distance: another number, much the same order
    assert (
        np.corrcoef(
            np.argsort(np.argsort(-lof.negative_outlier_factor_)), np.argsort(np.argsort(ratio))
        )[0, 1]
        > 0.8
    )


@pytest.mark.parametrize("form", ["mean_log", "log_mean"])
def test_dao_is_the_plain_one(form):
    pairs, k = clean(80), 6
    z = Fake().embed(pairs).images.double().numpy()
    distance = np.linalg.norm(z[:, None] - z, axis=2)
    np.fill_diagonal(distance, np.inf)
    order = distance.argsort(1)[:, :k]
    r = np.take_along_axis(distance, order, 1)
    expected = []
    for x in range(80):
        terms = []
        for y in order[x]:
            lid = min(-k / sum(np.log(r[y, i] / r[y, -1] + 1e-4) for i in range(k - 1)), z.shape[1])
            ratio = r[x, -1] / r[y, -1]
            terms.append(ratio**lid if form == "log_mean" else lid * np.log(ratio))
        expected.append(np.log(np.mean(terms)) if form == "log_mean" else np.mean(terms))
    values = registry.make("detector", f"dao:k={k},pool=80,form={form}")(Fake(), pairs).values
    assert values.numpy() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_density_scores_invert_in_a_pool_of_too_many_poisons():
    pairs, truth = poisoned(2000, copies=100)
    small, large = (
        stats.auroc(
            registry.make("detector", f"k_distance:k=8,pool={n},rate=0.05")(
                Fake(), pairs
            ).values.numpy(),
            truth,
        )
        for n in (0, len(pairs))
    )
    assert small > 0.9 and large < 0.1


def test_clip_score_is_one_minus_cosine():
    pairs = clean(20)
    e = Fake().embed(pairs)
    expected = [
        1 - float(np.dot(a, b)) for a, b in zip(e.images.numpy(), e.texts.numpy(), strict=True)
    ]
    assert run("clip_score", pairs).values.numpy() == pytest.approx(expected, abs=1e-6)


def jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def test_duplicates_survive_jpeg_and_light_but_need_diverging_captions():
    pairs = clean(60)
    x = pairs.images.clone()
    coarse = torch.rand(40, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    x[:40] = (255 * F.interpolate(coarse, 32, mode="bilinear")).to(torch.uint8)
    x[1], x[2] = jpeg(x[0], 75), (x[0] * 0.8 + 10).to(torch.uint8)
    x[11], x[12] = x[10], x[10]
    captions = [f"red {i}" for i in range(60)]
    captions[:3] = "a red sign", "green old car", "three blue birds flying"
    captions[10:13] = ["a red sign"] * 3
    values = run("duplicates", replace(pairs, images=x, captions=tuple(captions))).values
    assert (values[:3] > 1).all() and (values[10:13] == 0).all() and (values[13:40] < 0).all()


def test_captions_of_one_image_are_not_its_duplicates():
    pairs = clean(10).take([0, 0, 0, 1, 2, 2])
    ids = ("a#0", "a#1", "a#2", "b", "c#0", "c+poison")
    captions = ("red x", "red y", "red z", "red", "green one", "blue thing")
    values = run("duplicates", replace(pairs, ids=ids, captions=captions)).values
    assert (values[:4] < 0).all() and values[4:].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("cells", [1, 700, 1 << 24])
def test_clusters_and_divergence_are_the_plain_ones(cells):
    g = torch.Generator().manual_seed(1)
    v = F.normalize(torch.randn(90, 3, generator=g), dim=1)
    cluster, closest = duplicates.cluster_images(v, 0.99, cells)
    cosine = (v @ v.T).fill_diagonal_(-1)
    label = list(range(90))
    for i, j in (cosine >= 0.99).nonzero().tolist():
        label = [label[i] if a == label[j] else a for a in label]
    assert torch.equal(
        torch.tensor(cluster)[:, None] == torch.tensor(cluster),
        torch.tensor(label)[:, None] == torch.tensor(label),
    )
    assert closest == pytest.approx(cosine.amax(1).numpy(), abs=1e-6)
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(list("abcdefg"), 4)) for _ in range(90)]
    bags = [set(c.split()) for c in captions]
    ids, image = [f"i{k}" for k in rng.permutation(90)], np.arange(90) // 2
    expected = []
    for i in range(90):
        others = [j for j in range(90) if cluster[j] == cluster[i] and image[j] != image[i]]
        expected.append(
            np.mean([1 - len(bags[i] & bags[j]) / len(bags[i] | bags[j]) for j in others] or [0])
        )
    assert duplicates.caption_divergence(captions, ids, image, cluster) == pytest.approx(expected)


def test_duplicates_of_flat_images_is_finite():
    pairs = clean(20)
    values = run("duplicates", replace(pairs, images=torch.full_like(pairs.images, 7))).values
    assert (values < 0).all()
