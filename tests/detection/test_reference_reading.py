"""Contents read through a reference: the map against scikit-learn's, what is left out, and a
scan.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.linear_model import Ridge

from bezoar import Scan, Settings, Train, execute, registry
from bezoar.detection import reference_reading, training_traces
from bezoar.detection.detectors.common_cause import CommonCause
from bezoar.detection.reference_reading import (
    Comparison,
    NearestCaptions,
    Reading,
    ReferenceReader,
    RidgeSums,
    measure_content,
)
from bezoar.detection.shared_causes import Discriminants
from bezoar.errors import UserError
from bezoar.reports.run_page import build_page


def test_the_map_is_scikit_learns_ridge():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(80, 6)) * [3, 1, 1, 1, 2, 1] + 2, random.normal(size=(80, 3))
    y[:, :2] += x[:, :2]
    more = random.normal(size=(30, 6)), random.normal(size=(30, 3))
    everything = (torch.from_numpy(np.concatenate(both)) for both in zip((x, y), more, strict=True))
    others = RidgeSums.of(*map(torch.from_numpy, more))
    weights, bias = (RidgeSums.of(*everything) - others).fit_ridge()
    penalty = 0.5 * ((x - x.mean(0)) ** 2).sum(0).mean()
    model = Ridge(alpha=penalty).fit(x, y)
    assert np.allclose(weights.T, model.coef_, atol=1e-9)
    assert np.allclose(bias, model.intercept_, atol=1e-9)


def test_caption_losses_are_those_of_a_plain_softmax():
    generator = torch.Generator().manual_seed(0)
    images, texts, rivals = (
        F.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (6, 6, 4)
    )
    rival_of = torch.tensor([-1, 2, -1, 0, -1, -1])
    losses = training_traces.caption_losses(images, texts, rivals, rival_of)
    for i in range(6):
        others = [rivals[j] for j in range(4) if j != rival_of[i]]
        fits = torch.stack([images[i] @ w for w in [texts[i], *others]]) / 0.07
        assert float(losses[i]) == pytest.approx(float(-fits.softmax(0)[0].log()), abs=1e-4)


def draw_reader(n=2400, groups=6, seed=0):
    """Images of a content each, captions that name it, and 100 captions of group 0 whose images are
    of anything; and which these are.
    """
    random = np.random.default_rng(seed)
    content = torch.from_numpy(random.integers(0, groups, n))
    caption = content.clone()
    poisons = torch.from_numpy(random.choice(n, 100, replace=False))
    caption[poisons] = 0
    centres = torch.from_numpy(random.normal(size=(groups, 12))).float()
    names = torch.from_numpy(random.normal(size=(groups, 24))).float()
    images = centres[content] + 0.5 * torch.from_numpy(random.normal(size=(n, 12))).float()
    texts = names[caption] + 0.15 * torch.from_numpy(random.normal(size=(n, 24))).float()
    captions = [f"caption {i}" for i in range(n)]
    half = torch.arange(n) % 2
    reader = ReferenceReader.build(images, texts, captions, half, torch.arange(n))
    return reader, caption, poisons


def show_captions(reader, group, poisons):
    """The reader with other images of group 0 in place of the poisons': their captions are true."""
    images = reader.images.clone()
    like = (group == 0).nonzero()[:, 0]
    like = like[~torch.isin(like, poisons)]
    images[poisons] = images[like[: len(poisons)]]
    return replace(reader, images=images)


def test_no_record_has_a_part_in_its_own_reading():
    reader, _, poisons = draw_reader()
    left_out = torch.zeros(len(reader.half), dtype=torch.bool)
    left_out[poisons] = True
    reading = reader.read(left_out)
    assert torch.allclose(reading.captions.norm(dim=1), torch.ones(len(reader.half)), atol=1e-4)
    # Of half 0, what half 0 is captioned as changes nothing, nor what is left out of half 1.
    changed = reader.captions.clone()
    changed[(reader.half == 0) | left_out] *= -1
    again = replace(reader, captions=changed).read(left_out)
    first = reader.half == 0
    assert torch.allclose(reading.captions[first], again.captions[first], atol=1e-5)
    assert not torch.allclose(reading.captions[~first], again.captions[~first], atol=0.1)
    fitted = ((reader.half == 1) & ~left_out).nonzero()[:, 0]
    weights, bias = RidgeSums.of(reader.images[fitted], reader.captions[fitted]).fit_ridge()
    plain = F.normalize(reader.images[first] @ weights + bias, dim=1)
    assert torch.allclose(reading.captions[first], plain, atol=1e-4)


def test_records_are_read_without_their_own_piece():
    reader, group, poisons = draw_reader()
    features = torch.randn(len(group), 60, generator=torch.Generator().manual_seed(2))
    features[poisons, :3] += 6
    pieces = reference_reading.split_groups(features - features.mean(0), group, 0)
    assert set(pieces.tolist()) == {0, 1, 2, 3}
    common = pieces[poisons].mode().values
    assert (pieces[poisons] == common).float().mean() > 0.95
    loss = reader.read_pieces(pieces)
    for number in range(4):
        inside = pieces == number
        assert torch.equal(loss[inside], reader.read(inside).loss[inside])


def test_contents_count_by_their_place_among_other_groups():
    reader, group, poisons = draw_reader()
    left_out = torch.zeros(len(group), dtype=torch.bool)
    left_out[poisons] = True
    reading = reader.read(left_out)
    members = (group == 0).nonzero()[:, 0]
    others = members[~left_out[members]]

    like = Comparison.by_captions(reader.nearest, poisons, left_out)
    assert set(like.others.tolist()) <= set(others.tolist()) and not like.alone.any()

    def bound(compared):
        return measure_content(reading.captions, reader, group, compared, left_out).bound()

    def measure(rows):
        return bound(Comparison.with_rest(rows, others))

    half_alone = replace(like, alone=torch.arange(100) < 50)
    assert bound(like) < 0.4 < bound(half_alone) < 0.8
    assert measure(poisons) < 0.4 and measure(others[::7]) > 0.9
    direction = reader.captions[others].mean(0) - reader.captions[~left_out].mean(0)
    values = (reading.captions @ direction).numpy()
    foreign = values[((group != 0) & ~left_out).numpy()]

    def chance_of_above(rows):
        return stats.mannwhitneyu(values[rows], foreign).statistic / (len(rows) * len(foreign))

    upper = chance_of_above(poisons.numpy()) + 1.645 / np.sqrt(12 * 100)
    plain = (upper - 0.5) / (chance_of_above(others.numpy()) - 0.5)
    assert measure(poisons) == pytest.approx(plain, abs=1e-3)


def test_nothing_is_said_of_a_group_whose_contents_are_not_read():
    reader, group, _ = draw_reader()
    noise = F.normalize(torch.randn(reader.captions.shape, generator=torch.Generator()), dim=1)
    reading = Reading(noise, torch.zeros(len(group)))
    members = (group == 0).nonzero()[:, 0]
    left_out = torch.zeros(len(group), dtype=torch.bool)
    for others in (members[1::3], members[:0]):
        compared = Comparison.with_rest(members[::3], others)
        content = measure_content(reading.captions, reader, group, compared, left_out)
        assert content == reference_reading.UNREAD and content.bound(3) == 1


def test_the_others_are_those_with_the_most_like_captions():
    captions = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2], [0, 1], [-1, 0]]), dim=1)
    captions = captions.repeat_interleave(40, 0)
    left_out = torch.arange(200) < 20
    left_out[160:] = True
    suspects = left_out.nonzero()[:, 0]
    like = Comparison.by_captions(NearestCaptions(captions), suspects, left_out)
    assert set(like.others.tolist()) == set(range(20, 80))  # of 50 nearest, equal ones first
    assert (torch.bincount(like.others, minlength=200)[20:40] == 20).all()
    assert like.alone.tolist() == [False] * 20 + [True] * 40


@pytest.mark.parametrize("is_attacked", [True, False])
def test_a_planted_trigger_is_believed_and_no_natural_cause(is_attacked):
    reader, group, poisons = draw_reader(n=6000, groups=20)
    if not is_attacked:  # what they share is natural: their captions are those of their images
        reader = show_captions(reader, group, poisons)
    random = torch.Generator().manual_seed(1)
    content = group.clone()
    content[poisons] = torch.arange(len(poisons)) % 20
    features = torch.randn(len(group), 40, generator=random)
    features += 0.2 * torch.randn(20, 40, generator=random)[content]  # natural causes, to compare
    features[poisons, :2] += 6
    discriminants = Discriminants.fit(features, group, reader.half)
    causes, tested, loss = CommonCause().judge_by_reference(reader, discriminants)
    assert {cause.group for cause in causes} == ({0} if is_attacked else set())
    assert tested >= len(causes) and loss.shape == group.shape
    if is_attacked:
        assert torch.isin(causes[0].shown, poisons).float().mean() > 0.8


class Counting(torch.nn.Module):
    """Stands for an encoder, and counts what passes through it."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.passed = 0

    def encode_images(self, images):
        self.passed += len(images)
        return images.float().mean((2, 3))


def test_equal_images_pass_through_the_reference_once():
    pairs = registry.make("data", "scenes:count=40")()
    twice = replace(
        pairs,
        images=torch.cat([pairs.images, pairs.images]),
        captions=pairs.captions * 2,
        ids=tuple(f"r{i}" for i in range(80)),
        labels=torch.cat([pairs.labels, pairs.labels]),
    )
    encoder = Counting()
    vectors, pictures = reference_reading.embed_distinct(encoder, twice)
    assert encoder.passed == 40
    assert pictures.tolist() == [*range(40), *range(40)]
    assert torch.allclose(vectors, twice.images.float().mean((2, 3)))


def test_a_scan_with_a_reference(tmp_path):
    """Its files are part of the question, its absence is one line, and no training is run for
    it.
    """
    settings = Settings(runs=tmp_path)
    small = ("clip_small:width=4,dim=16", "clip:epochs=1,batch=64")
    suspect = Train("scenes:count=400", *small)
    other = execute(Train("scenes:count=200,seed=5", *small), settings)
    scan = Scan(suspect, detector=("common_cause",), reference=str(other.path))
    assert [path.name for path in scan.files()] == ["encoder.safetensors"]
    run = execute(scan, settings)
    assert run.metric("common_cause.raised").value == 0
    assert str(other.path) in run.manifest["notes"]["detectors"][0]
    write = build_page(run).steps[-1].command  # the same question, but for what is written
    assert "--write shards" in write and f"--reference {other.path}" in write
    spelt = Scan(suspect, detector=(f"common_cause:reference={other.path}",))
    scores = [(execute(s, settings).path / "scores.csv").read_text() for s in (scan, spelt)]
    assert scores[0] == scores[1]
    start = other.name[:9]
    assert execute(replace(scan, reference=start), settings).path == run.path
    named = Scan(suspect, detector=(f"common_cause:reference={start}",))
    assert execute(named, settings).path == execute(spelt, settings).path
    with pytest.raises(UserError, match="no detector that is asked for takes a reference"):
        execute(Scan(suspect, detector=("clip_score",), reference=str(other.path)), settings)
    with pytest.raises(UserError, match="no-such-encoder"):
        execute(Scan(suspect, reference="no-such-encoder"), settings)
    own = execute(suspect, settings)
    with pytest.raises(UserError, match="was trained on these data"):
        execute(Scan(suspect, reference=str(own.path)), settings)
