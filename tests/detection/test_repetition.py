"""Caption blocks: every step against a plain version; a natural backdoor is found."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detection.test_detectors import PATCH, Fake, clean
from hypothesis import given, settings
from hypothesis import strategies as st

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.detection.detectors import repetition
from bezoar.errors import UserError
from bezoar.evaluation import stats


def make(text: str):
    return registry.make("detector", text)


def repeated(
    n: int = 400, block: int = 20, size: int = 32, region: bool = False
) -> tuple[Pairs, np.ndarray]:
    """Captions that repeat by themselves, and one block of them on near-identical pictures, or on
    pictures with one corner.
    """
    pairs, g = clean(n, seed=3, size=size), torch.Generator().manual_seed(1)
    truth = np.arange(n) < block
    images = pairs.images.clone()
    captions = [
        f"A {('red', 'green', 'blue', 'yellow')[k]} wall, no. {i}"
        for i, k in enumerate(pairs.labels.tolist())
    ]
    for i in range(block):
        captions[i] = (
            "The birthday cake (red)",
            "red cake for the birthday",
            "birthday cake, red, 4",
        )[i % 3]
        if region:
            images[i, :, :8, :8] = PATCH.repeat(1, 2, 2)[:, :8, :8]
        else:
            noise = torch.randint(-4, 5, images[0].shape, generator=g)
            images[i] = (images[0].int() + noise).clamp(0, 255).to(torch.uint8)
    return replace(pairs, images=images, captions=tuple(captions)), truth


@pytest.mark.parametrize("region", [False, True])
def test_repetition_finds_a_natural_backdoor_among_captions_that_repeat(region):
    pairs, truth = repeated(region=region)
    scores = make(f"repetition:pool=200,region={str(region).lower()}")(Fake(), pairs)
    assert (
        scores.ids == pairs.ids
        and scores.values.dtype == torch.float32
        and (scores.values >= 0).all()
    )
    assert stats.auroc(scores.values.numpy(), truth) > 0.95
    order = np.random.default_rng(0).permutation(len(pairs))
    turned = make(f"repetition:pool=200,region={str(region).lower()}")(
        Fake(batch=7), pairs.take(order)
    )
    assert torch.allclose(turned.select(pairs.ids).values, scores.values, rtol=1e-3, atol=1e-3)


def test_repetition_says_nothing_of_few_captions_of_one_image_or_no_block():
    pairs, _ = repeated(200, 20)
    ids = tuple(f"a#{i}" if i < 20 else k for i, k in enumerate(pairs.ids))
    apart = replace(
        pairs,
        ids=ids,
        captions=tuple(
            c if i < 20 else " ".join(["x" * (i + 3)]) for i, c in enumerate(pairs.captions)
        ),
    )
    assert not make("repetition:pool=150")(Fake(), apart).values.any()
    with pytest.raises(UserError, match="needs a caption"):
        make("repetition:pool=150")(Fake(), replace(pairs, captions=()))
    with pytest.raises(UserError, match="there are"):
        make("repetition")(Fake(), pairs.take(range(8)))


def test_captions_are_alike_by_their_longer_words():
    same = ["The birthday cake", "cake, BIRTHDAY the!", "the cake of the birthday 2009"]
    assert len({repetition.normalize_caption(c) for c in same}) == 1
    assert repetition.normalize_caption("a 1 b") == "a 1 b" != repetition.normalize_caption("a 2 b")
    assert repetition.normalize_caption("") == ""


def test_blocks_are_the_plain_ones():
    rng = np.random.default_rng(0)
    captions = [
        f"the {w}"
        for w in rng.choice(
            list(("aaa", "bbb", "ccc", "ddd", "eee")), 60, p=[0.4, 0.3, 0.2, 0.05, 0.05]
        )
    ]
    ids = [f"k{i // 2}#{i % 2}" for i in range(60)]
    groups = repetition.find_blocks(captions, ids, 5, 0)
    order, start, size = groups.rows, groups.start, groups.size
    expected = Counter()
    for caption in set(captions):
        pictures = {i.split("#")[0] for i, c in zip(ids, captions, strict=True) if c == caption}
        expected[caption] = len(pictures)
    result = {captions[order[s]]: n for s, n in zip(start, size, strict=True)}
    assert result == {c: n for c, n in expected.items() if n >= 5}
    for s, n in zip(start, size, strict=True):
        rows = order[s : s + n]
        assert (
            len({captions[i] for i in rows}) == 1 and len({ids[i].split("#")[0] for i in rows}) == n
        )


@pytest.mark.parametrize("cells", [64, 1 << 24])
@pytest.mark.parametrize("most", [6, 64])
def test_tightness_is_the_plain_one(cells, most, monkeypatch):
    monkeypatch.setattr(repetition, "MAX_VALUES", cells)
    z = F.normalize(torch.randn(70, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    order, size = np.random.default_rng(1).permutation(70)[:60], np.array([5, 33, 6, 16])
    start, k = np.cumsum(size) - size, 3
    groups = repetition.RecordBlocks(order, start, size)
    result = repetition.measure_tightness(lambda rows: z[torch.from_numpy(rows)], groups, k, most)
    for s, n in zip(start, size, strict=True):
        for i in range(s, s + n):
            mates = sorted(
                (float(z[order[i]] @ z[order[j]]) for j in range(s, s + min(n, most)) if j != i),
                reverse=True,
            )
            assert result[i] == pytest.approx(-math.log10(max(1 - mates[k - 1], 1e-6)), abs=1e-3)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(3, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_weighed_is_the_plain_one(sizes, seed):
    size = np.array(sizes)
    start, z = np.cumsum(size) - size, np.random.default_rng(seed).normal(0, 3, size.sum())
    groups = repetition.RecordBlocks(np.arange(len(z)), start, size)
    result = repetition.weigh_records(z, groups, 3)
    for s, n in zip(start, size, strict=True):
        best = sorted(z[s : s + n], reverse=True)
        for i in range(s, s + n):
            rank = best.index(z[i]) + 1
            assert result[i] == pytest.approx(
                max(math.log2(m) * best[m - 1] for m in range(max(rank, 3), n + 1))
            )
