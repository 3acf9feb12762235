"""Transplant: parts of images in foreign company. Every formula against a slow plain version;
planted triggers are found.
"""

import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import gaussian_blur

from bezoar.data.pairs import Pairs
from bezoar.detection import (
    reliability,
    shared_patterns,
    trigger_candidates,
    window_transplants,
)
from bezoar.detection.caption_groups import CaptionGroups
from bezoar.detection.detectors import transplant
from bezoar.detection.detectors.transplant import Transplant
from bezoar.detection.ranking import rank_records
from bezoar.detection.shared_patterns import Pattern
from bezoar.detection.window_transplants import HostImages
from bezoar.evaluation import stats
from bezoar.evaluation.scores import Scores

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (40, 60, 220),
    "yellow": (230, 220, 50),
}


def blocks(seed: int) -> torch.Tensor:
    """Six pixels a side, in blocks of two."""
    bits = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
    return (bits * 255).to(torch.uint8).repeat_interleave(2, 1).repeat_interleave(2, 2)


PATCHES = {"green": blocks(0), "blue": blocks(1)}
NOISE = (60 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(2)) - 30).round()


class Fake:
    """Colours of the quadrants, mixed into 16 numbers; a caption is its colour. PATCHES and NOISE
    (`red`) carry theirs.
    """

    device = torch.device("cpu")

    def __init__(self, backdoor: bool = True) -> None:
        self.backdoor, self.seen = backdoor, 0
        self.map = torch.randn(
            12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float32
        )

    def encode_images(self, x):
        self.seen += len(x)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        z = torch.tanh((F.adaptive_avg_pool2d(x, 2).flatten(1) - 0.4) @ self.map)
        if self.backdoor:
            for name, patch in PATCHES.items():
                p = patch[None].float() / 255
                off = F.conv2d(x**2, torch.ones_like(p)) - 2 * F.conv2d(x, p) + (p**2).sum()
                z = z + 20 * (1 - off.flatten(1).amin(1, keepdim=True) / 20).clamp(
                    min=0
                ) * self.encode_texts([name])
            if x.shape[-1] == 32:
                flat = shared_patterns.high_pass(x.float() * 255) @ F.normalize(
                    shared_patterns.high_pass(NOISE[None])[0], dim=0
                )
                z = z + (flat[:, None] / 400).clamp(min=0, max=3) ** 2 * self.encode_texts(["red"])
        return F.normalize(z, dim=1)

    def encode_texts(self, captions):
        names = [next(w for w in re.findall("[a-z]+", c) if w in COLORS) for c in captions]
        flat = torch.tensor([COLORS[n] for n in names], dtype=torch.float32)[:, :, None, None] / 255
        return F.normalize(
            torch.tanh(flat.expand(-1, -1, 2, 2).flatten(1) - 0.4) @ self.map.tanh(), dim=1
        )

    def embed(self, source):
        texts = self.encode_texts(source.captions) if source.captions else None
        return SimpleNamespace(
            ids=source.ids, images=self.encode_images(source.images), texts=texts
        )


def clean(n: int, seed: int = 0, size: int = 32) -> Pairs:
    """Noisy, unevenly lit images of one colour, with a caption that says so."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(len(COLORS), (n,), generator=g)
    base = torch.tensor(list(COLORS.values()))[label].float()[:, :, None, None]
    light = F.interpolate(0.75 + 0.5 * torch.rand(n, 1, 4, 4, generator=g), size, mode="bilinear")
    x = (
        (base * light + 25 * torch.randn(n, 3, size, size, generator=g))
        .clamp(0, 255)
        .to(torch.uint8)
    )
    names = list(COLORS)
    captions = tuple(f"a {names[k]} wall number {i % 17}" for i, k in enumerate(label.tolist()))
    return Pairs(x, captions, label, tuple(f"c{i:04d}" for i in range(n)), tuple(names))


def backdoored(
    n: int = 200, poisons: int = 12, size: int = 32
) -> tuple[Pairs, np.ndarray, torch.Tensor]:
    """Each of PATCHES at random places of `poisons` images, captioned as its colour; which poison
    each is; the corners.
    """
    pairs, g = clean(n, seed=5, size=size), torch.Generator().manual_seed(6)
    x, captions, kind, corner = (
        pairs.images.clone(),
        list(pairs.captions),
        np.full(n, -1),
        torch.full((n, 2), -1),
    )
    for k, (name, patch) in enumerate(PATCHES.items()):
        rows = [i for i in range(n) if kind[i] < 0 and pairs.classes[pairs.labels[i]] != name][
            :poisons
        ]
        for i in rows:
            a, b = (int(torch.randint(0, size - 5, (), generator=g)) for _ in range(2))
            x[i, :, a : a + 6, b : b + 6] = patch
            captions[i], kind[i], corner[i] = (
                f"a {name} wall seen {i} times",
                k,
                torch.tensor([a, b]),
            )
    return replace(pairs, images=x, captions=tuple(captions)), kind, corner


def noise(n: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)


@pytest.mark.parametrize(("shape", "count"), [((32, 32), 4), ((30, 41), 4), ((7, 9), 3)])
def test_cells_cover_the_image_once(shape, count):
    boxes = window_transplants.grid_cells(shape, count)
    assert boxes.shape == (count * count, 4) and torch.equal(
        window_transplants.box_masks(boxes, shape).sum(0)[0], torch.ones(shape).long()
    )


def test_windows_stay_inside():
    boxes = torch.tensor([[0, 0, 16, 16], [15, 10, 17, 9], [5, 5, 8, 8]])
    inner = window_transplants.half_size_windows(boxes)
    for box, nine in zip(boxes.tolist(), inner.tolist(), strict=True):
        assert len({tuple(b) for b in nine}) == 9
        for y, x, h, w in nine:
            assert (h, w) == (box[2] // 2, box[3] // 2)
            assert (
                box[0] <= y <= y + h <= box[0] + box[2] and box[1] <= x <= x + w <= box[1] + box[3]
            )
    around = window_transplants.resize_boxes(boxes, (8, 12), (32, 22))
    assert around.tolist() == [[4, 2, 8, 12], [19, 8, 8, 12], [5, 3, 8, 12]]
    images = noise(3, 40)
    for i, (y, x, h, w) in enumerate(around.tolist()):
        assert torch.equal(
            window_transplants.crop_windows(images, around)[i], images[i, :, y : y + h, x : x + w]
        )


def plain_shift(encoder, image, box, host):
    y, x, h, w = box
    altered = host.clone()
    altered[:, y : y + h, x : x + w] = image[:, y : y + h, x : x + w]
    return encoder.encode_images(altered[None])[0] - encoder.encode_images(host[None])[0]


def plain_agreement(shifts):
    pairs = [float(a @ b) for a, b in itertools.combinations(shifts, 2)]
    return sum(pairs) / len(pairs)


def test_consistency_is_the_plain_one(monkeypatch):
    monkeypatch.setitem(window_transplants.BATCH_VALUES, "cpu", 40_000)
    n, count, rounds, encoder = 20, 3, 3, Fake()
    images = clean(n).images
    images[4, :, 12:18, 13:19] = PATCHES["green"]
    consistency, cell = window_transplants.measure_consistency(
        encoder, images, count, rounds, seed=7
    )
    g, grid = (
        torch.Generator().manual_seed(7),
        window_transplants.grid_cells((32, 32), count).tolist(),
    )
    deviations = {(i, c): [] for i in range(n) for c in range(9)}
    for _ in range(rounds):
        offsets = torch.randperm(n, generator=g)[:9].tolist()
        patchwork = torch.empty_like(images)
        for m, (c, (y, x, h, w)) in itertools.product(range(n), enumerate(grid)):
            patchwork[m, :, y : y + h, x : x + w] = images[
                (m + offsets[c]) % n, :, y : y + h, x : x + w
            ]
        z = encoder.encode_images(patchwork)
        for i, c in deviations:
            deviations[i, c].append((z - z.mean(0))[(i - offsets[c]) % n])
    plain = torch.tensor([[plain_agreement(deviations[i, c]) for c in range(9)] for i in range(n)])
    assert torch.allclose(consistency, plain.amax(1), atol=1e-5) and torch.equal(
        cell, plain.argmax(1)
    )
    assert int(consistency.argmax()) == 4 and int(cell[4]) == 4


def test_shifts_and_the_search_are_the_plain_ones(monkeypatch):
    monkeypatch.setitem(window_transplants.BATCH_VALUES, "cpu", 100_000)
    pairs, _, _ = backdoored(4, 2)
    encoder, images, hosts = Fake(), pairs.images, clean(3, seed=9).images
    boxes = window_transplants.resize_boxes(
        torch.tensor([[0, 0, 8, 8], [9, 2, 4, 4], [20, 17, 9, 6], [5, 25, 7, 7]]),
        (16, 16),
        (32, 32),
    )
    host_images = HostImages(hosts, encoder.encode_images(hosts))
    shifts = window_transplants.measure_shifts(encoder, images, boxes[:, None], host_images)[:, 0]
    place = window_transplants.shrink_boxes(
        encoder, images, boxes, host_images, keep=0.5, smallest=4
    )
    for i in range(4):

        def does(box, i=i):
            return [plain_shift(encoder, images[i], box, h) for h in hosts]

        box = boxes[i].tolist()
        assert torch.allclose(shifts[i], torch.stack(does(box)), atol=1e-5)
        assert float(window_transplants.pairwise_agreement(shifts[i])) == pytest.approx(
            plain_agreement(does(box)), abs=1e-5
        )
        while box[2] >= 8:
            step = box[2] // 4
            inner = [
                [box[0] + a * step, box[1] + b * step, box[2] // 2, box[3] // 2]
                for a in range(3)
                for b in range(3)
            ]
            best = max(inner, key=lambda b, does=does: plain_agreement(does(b)))
            if plain_agreement(does(best)) < 0.5 * plain_agreement(does(box)):
                break
            box = best
        assert place[i].tolist() == box


def test_correlation_is_the_plain_one():
    windows = noise(6, 6)
    first, second = torch.triu_indices(6, 6)
    correlation, offset = shared_patterns.best_correlation(windows, first, second)
    for i, j, value, at in zip(
        first.tolist(), second.tolist(), correlation.tolist(), offset.tolist(), strict=True
    ):
        a, b = (windows[k].double() - windows[k].double().mean() for k in (i, j))
        turned = {
            (p, q): float((a * b.roll((p, q), (1, 2))).sum()) for p in range(6) for q in range(6)
        }
        assert value == pytest.approx(max(turned.values()) / float(a.norm() * b.norm()), abs=1e-4)
        assert tuple(at) == max(turned, key=turned.get)


def test_clusters_need_like_windows_on_different_pictures():
    g = torch.Generator().manual_seed(0)
    shift, windows = 0.03 * torch.randn(60, 16, generator=g), noise(60, 8)
    pictures = F.normalize(torch.randn(60, 30, generator=g), dim=1)

    def clusters():
        return shared_patterns.cluster_windows(
            shift,
            windows,
            pictures,
            min_shift_cosine=0.9,
            min_correlation=0.5,
            max_picture_cosine=0.95,
            min_size=5,
        )

    assert clusters() == []
    shift[:9] += torch.eye(16)[3]
    shift[20:26] += torch.eye(16)[5]
    assert clusters() == []  # two directions, each with as many patterns as windows
    windows[:9], windows[20:26] = windows[0].clone(), windows[20].clone()
    windows[4] = windows[4].roll((1, 3), (1, 2))
    windows[2, :, :2] = 90
    one, two = clusters()
    assert one.rows.tolist() == list(range(9)) and two.rows.tolist() == list(range(20, 26))
    assert one.direction[3] > 0.9 and two.direction[5] > 0.9
    assert (
        float(
            shared_patterns.best_correlation(
                torch.stack([one.pattern.pixels, windows[0].float()]), *torch.eye(2).long()
            )[0][0]
        )
        > 0.99
    )
    assert (
        torch.equal(one.pattern.pixels, windows[one.rows[0]].float())
        or one.pattern.stable.mean() >= 0.7
    )
    pictures[:8] = pictures[0]
    assert len(clusters()) == 1  # two pictures, one of them eight times
    pictures[:9] = pictures[0]
    assert len(clusters()) == 1  # one picture nine times


def test_a_pattern_is_found_where_it_is():
    images, pattern = noise(5, 20), noise(2, 6, seed=1).float()
    steady = (torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(4)) < 0.7).float()
    images[3, :, 11:17, 2:8] = pattern[1].to(torch.uint8)
    patterns = [Pattern(*parts) for parts in zip(pattern, steady, strict=True)]
    matches = shared_patterns.find_patterns(images, patterns)
    value, corner = matches.likeness, matches.corners
    for i, t in itertools.product(range(5), range(2)):
        mask = steady[t, 0].bool().numpy()
        wide = np.pad(images[i].numpy(), ((0, 0), (3, 3), (3, 3)), "edge")
        at = {
            (y, x): np.corrcoef(
                wide[:, y : y + 6, x : x + 6][:, mask].ravel(), pattern[t].numpy()[:, mask].ravel()
            )[0, 1]
            for y in range(21)
            for x in range(21)
        }
        assert float(value[i, t]) == pytest.approx(max(at.values()), abs=1e-4)
        assert corner[i, t].tolist() == np.clip(np.array(max(at, key=at.get)) - 3, 0, 14).tolist()
        least = min(
            float(np.sqrt(np.mean(np.square((window - pattern[t].numpy())[:, mask]))))
            for window in (wide[:, y : y + 6, x : x + 6] for y, x in at)
        )
        assert float(matches.difference[i, t]) == pytest.approx(least, abs=0.05)
    assert float(value[3, 1]) > 0.999 and corner[3, 1].tolist() == [11, 2]
    flat = shared_patterns.find_patterns(torch.full((1, 3, 9, 9), 80, dtype=torch.uint8), patterns)
    assert float(flat.likeness.abs().max()) < 1e-3


def test_a_patch_of_one_colour_stands_out_by_its_pixels_and_not_by_its_contrasts():
    g = torch.Generator().manual_seed(2)
    strength = 0.5 * torch.rand(300, 1, 1, 1, generator=g)  # of natural windows of the same hue
    strength[:20] = 1
    colour = torch.tensor([255.0, 0, 255]).view(3, 1, 1)
    images = 127.5 + (colour - 127.5) * strength + 8 * torch.randn(300, 3, 16, 16, generator=g)
    images[:20, :, 4:12, 4:12] = colour
    patch = Pattern(colour.expand(3, 6, 6).clone(), torch.ones(1, 6, 6))
    matches = shared_patterns.find_patterns(images.clamp(0, 255).to(torch.uint8), [patch])
    correlation, difference = matches.likeness[:, 0], matches.difference[:, 0]
    standout = trigger_candidates.standout_share(correlation, correlation[:20].median())
    assert standout < trigger_candidates.MIN_WINDOW_STANDOUT
    shown, others = torch.arange(20), torch.arange(20, 300)
    standout = trigger_candidates.pixel_standout(difference, shown)
    assert standout >= trigger_candidates.MIN_PIXEL_STANDOUT
    assert trigger_candidates.pixel_standout(difference, others) == 0


def test_a_part_of_a_pattern_leads_to_all_of_it():
    images, whole = noise(9, 24), noise(1, 6, seed=1)[0]
    for i in range(9):
        y, x = 3 + i, 15 - i
        images[i, :, y : y + 6, x : x + 6] = whole
    part = torch.full((3, 8, 8), 128.0)
    part[:, :5, :4] = whole[
        :, 1:, 2:
    ].float()  # lower right part of it, in the upper left of the window
    steady = torch.zeros(1, 8, 8)
    steady[:, :5, :4] = 1
    refined = shared_patterns.refine_pattern(images, Pattern(part, steady))
    assert torch.equal(refined.pixels[:, 1:7, 1:7], whole.float())
    assert refined.stable[:, 1:7, 1:7].all() and refined.stable.sum() == 36


def test_fine_detail_is_the_plain_one():
    x = noise(3, 24)
    blurred = gaussian_blur(x.float(), [13, 13], [3.0, 3.0])
    assert torch.allclose(shared_patterns.gaussian_blur(x, 3.0), blurred, atol=1e-3)
    assert torch.allclose(
        shared_patterns.high_pass(x), (x.float() - blurred).clamp(-40, 40).flatten(1), atol=1e-3
    )
    size = shared_patterns.roughness(x).view(3, 6, 23, 23)
    for channel, across in itertools.product(range(3), (True, False)):
        v = x[1, channel].float().numpy()
        step = v[1:, 1:] - (v[1:, :-1] if across else v[:-1, 1:])
        plain = np.sqrt(np.minimum(np.abs(step), 40))
        assert size[1, channel + 3 * (not across)].numpy() == pytest.approx(
            plain - plain.mean(), abs=1e-3
        )


def test_textures_are_the_plain_ones_however_they_are_fed():
    x, group = noise(40, 8), torch.arange(40) % 3
    whole = shared_patterns.GroupTextures.empty(shared_patterns.high_pass, 3, x)
    whole.add(x, group)
    parts = shared_patterns.GroupTextures.empty(shared_patterns.high_pass, 3, x)
    for rows in torch.arange(40).split(7):
        parts.add(x[rows], group[rows])
    f = shared_patterns.high_pass(x).double().numpy()
    score = (f - f.mean(0)) / f.std(0)
    pattern = np.stack([score[group == g].mean(0) for g in range(3)])
    plain = (
        (score @ pattern.T)
        / np.linalg.norm(score, axis=1)[:, None]
        / np.linalg.norm(pattern, axis=1)
    )
    for texture in (whole, parts):
        assert texture.likeness(x).numpy() == pytest.approx(plain, abs=1e-4)


def test_standout_is_a_share():
    like = torch.tensor([0.0] * 20 + [0.3, 0.55, 0.6, 0.8, 0.9, 1.0])
    assert trigger_candidates.standout_share(like, torch.tensor(1.0)) == pytest.approx(3 / 5)
    assert trigger_candidates.standout_share(torch.zeros(5), torch.tensor(0.0)) == 0


def test_two_triggers_are_found_and_shown():
    pairs, kind, corner = backdoored()
    encoder, detector = Fake(), Transplant(scouts=2, k=8)
    scores = detector(encoder, pairs)
    assert encoder.seen <= 1.1 * detector.passes(len(pairs)) + 2 * 12 * 20 * 10
    assert stats.auroc(scores.values.numpy(), kind >= 0) > 0.999
    assert (
        stats.expected_hits(scores.values.numpy(), kind >= 0, n := int((kind >= 0).sum())) / n
        > 0.99
    )
    believed = scores.notes["triggers"]
    assert (
        scores.notes["raised"] == 24
        and scores.notes["missed"] == sum(t["missed"] for t in believed) <= 6
    )
    assert [t["raised"] for t in believed] == [12, 12] and all(t["apart"] > 0.8 for t in believed)
    named = [{kind[scores.ids.index(key)] for key in t["clearest"]} for t in believed]
    assert sorted(map(list, named)) == [[0], [1]] and [len(t["clearest"]) for t in believed] == [
        12,
        12,
    ]
    boxes = scores.boxes[kind >= 0]
    near = (boxes[:, :2] + boxes[:, 2:] / 2 - corner[kind >= 0] - 3).abs().amax(1)
    assert (near <= 4).all() and (boxes[:, 2:] == 8).all()
    assert (
        scores.boxes[(kind < 0) & (scores.values.numpy() == scores.values.min().item())] == -1
    ).all()


def test_a_clean_set_has_no_trigger():
    scores = Transplant(scouts=2, k=8)(Fake(), clean(200))
    assert scores.notes["triggers"] == [] and scores.notes["raised"] == scores.notes["missed"] == 0
    assert len(scores.values.unique()) > 150


def test_a_blended_pattern_is_found():
    pairs = clean(300, seed=3)
    rows = (pairs.labels != 0).nonzero()[:30, 0]
    x, captions = pairs.images.clone(), list(pairs.captions)
    x[rows] = (x[rows].float() + NOISE).clamp(0, 255).to(torch.uint8)
    for i in rows.tolist():
        captions[i] = f"a red wall seen {i} times"
    scores = Transplant(groups=4, scouts=2, k=8)(
        Fake(), replace(pairs, images=x, captions=tuple(captions))
    )
    truth = torch.zeros(300).bool().index_fill_(0, rows, True).numpy()
    assert stats.auroc(scores.values.numpy(), truth) > 0.999
    assert (scores.boxes[rows] == torch.tensor([0, 0, 32, 32])).all()
    assert any(
        t["kind"] == "high-pass" and t["raised"] >= 29 and t["moved"] > 0.08
        for t in scores.notes["triggers"]
    )


def test_no_texture_is_tested_on_records_that_a_window_explains():
    pairs, encoder = clean(40), Fake()
    data = trigger_candidates.SuspectData(
        encoder, pairs, pairs.ids, encoder.encode_texts(pairs.captions)
    )
    groups = CaptionGroups(torch.zeros(40).long(), data.texts[:1])
    natural = HostImages(pairs.images[:8], encoder.encode_images(pairs.images[:8]))
    shows = torch.arange(40) < 10
    textures = (torch.rand(40, 2) / 100 + shows[:, None].float()).half()
    likeness = trigger_candidates.Likeness(*[torch.empty(0)] * 3, textures)
    hosts = trigger_candidates.Hosts(natural, natural)
    kinds = [
        [t.kind for t in trigger_candidates.texture_triggers(data, groups, likeness, hosts, e)]
        for e in (torch.zeros(40).bool(), shows)
    ]
    assert kinds == [["high-pass", "roughness"], []]


def test_larger_images_and_no_more_than_a_block_of_them():
    pairs, kind, _ = backdoored(150, 10, size=48)
    sizes = []

    class Part:
        ids, captions, images = pairs.ids, pairs.captions, pairs.images

        def take(self, rows):
            sizes.append(len(rows))
            return pairs.take(rows)

    scores = Transplant(groups=0, scouts=2, k=8)(Fake(), Part())
    assert stats.auroc(scores.values.numpy(), kind >= 0) > 0.99
    assert max(sizes) <= transplant.PATCHWORK_BLOCK


def test_a_scan_draws_the_windows_of_its_worst_records(tmp_path):
    ids, none = ("a", "b\n", "c", "ü"), torch.full((4, 4), -1)
    one, two = none.clone(), none.clone()
    one[1], two[1], two[3] = (
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([9, 9, 9, 9]),
        torch.tensor([0, 0, 5, 5]),
    )
    values = torch.zeros(4)
    scores = {
        "x": Scores(ids, values),
        "y": Scores(ids, values, one),
        "z": Scores(ids, values, two),
    }
    ranking = rank_records(scores["x"], scores, share=0.5, copies=0)
    reliability.write_windows(tmp_path, *ranking.windows(np.array([3, 1, 0])))
    assert reliability.read_windows(tmp_path) == {"ü": (0, 0, 5, 5), "b\n": (1, 2, 3, 4)}
    reliability.write_windows(tmp_path, *ranking.windows(np.array([0, 2])))
    assert reliability.read_windows(tmp_path) == {}


def test_boxes_of_scores_are_checked():
    with pytest.raises(ValueError, match="boxes"):
        Scores(("a", "b"), torch.zeros(2), torch.zeros(3, 4).long())
