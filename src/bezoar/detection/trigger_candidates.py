"""Candidates for triggers, and the tests that decide which of them are believed.

A candidate is what several records have in common: a pattern in a window, or a texture of the
records with like captions. It is sought in all records. It is believed when it moves foreign
images, because a trigger carries its caption into any company, and when the records that show it
stand out from the rest, or lose their caption without it.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.data.randomness import sample_rows
from bezoar.detection import shared_patterns, window_transplants
from bezoar.detection.caption_groups import CaptionGroups
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.detection.shared_patterns import GroupTextures, WindowCluster
from bezoar.detection.window_transplants import HostImages

BLOCK = 256  # images in memory at a time
MIN_SUPPORT = 5  # records that show a candidate before it is tested
SHOWN = 0.5  # share of a trigger from which a record shows it
COMPARED_SIDE = 1 / 4  # of the window by which records are compared, as a share of the image's
COMPARED_PIXELS = 16  # about as many pixels a side show that window

# tests of a window's pattern
MIN_WINDOW_STANDOUT = 0.8
# Pixels: .99 to 1 for patches and lines of fixed colours at a difference of 0 to .06 of the middle
# record's, on CIFAR-10 and scenes; contents up to .74 at differences of less than .2.
MIN_PIXEL_STANDOUT = 0.9
MAX_DIFFERENCE = 0.15
# Dependence: .48 to .83 for patches and stickers on CIFAR-10 and scenes; of some 70 clusters of
# contents of scenes, CIFAR-10 and aerial images 0, but for one of .12.
MIN_DEPENDENCE = 0.3
SCOUTS = 24  # records of a cluster whose windows are covered
COVERS = 6  # images that cover each window in turn
OTHER_CAPTIONS = 512
CAPTION_LOSS = 0.25  # of the place of a caption, with which it counts as lost
EQUAL = 1e-4  # difference of cosines of equal captions, at most
MIN_WINDOW_EFFECT = 0.2  # length of the shift by which it must move foreign images
MIN_LIKENESS = 0.6  # share of its usual likeness from which a record is tested for it
MAX_TESTED = 0.08  # most records that are tested for it, as a share of all

# tests of a texture
# Attacks .47 to .93 on six sets; docked boats, in a clean set of aerial images, .40.
MIN_TEXTURE_STANDOUT = 0.45
CLEAR = 5.0  # robust deviations above the median from which an image shows it
# Cosine to the group's captions by which the fine detail of the records that show it moves foreign
# images more than that of the group's other records: attacks .13 to .32 on eleven sets of scenes
# and aerial images, subjects' own textures up to .09.
MIN_TEXTURE_EFFECT = 0.12
DETAIL_IMAGES = 64  # images of a group, with its texture and without, whose fine detail is tested
DETAIL_SIGMA = 1 / 32  # fine detail is finer than this blur, as a share of the side

TEXTURES = {"high-pass": shared_patterns.high_pass, "roughness": shared_patterns.roughness}


@dataclass(frozen=True)
class SuspectData:
    """N records and the encoder that was trained on them."""

    encoder: RecordEncoder
    source: Records
    ids: Sequence[str]
    texts: Tensor  # (N, D), the captions' vectors

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        """That of the encoder."""
        return self.encoder.device

    @functools.cached_property
    def shape(self) -> torch.Size:
        """Height and width of the images."""
        return self.source.take([0]).images.shape[-2:]

    def images(self, rows: Sequence[int] | Tensor | np.ndarray) -> Tensor:
        """uint8 (B, 3, H, W) on the encoder's device."""
        return self.source.take(rows).images.to(self.device)


@dataclass(frozen=True)
class Hosts:
    """Foreign images: patchworks, which show nothing in particular, and natural ones."""

    patchworks: HostImages
    natural: HostImages


@dataclass(frozen=True)
class Likeness:
    """How like N records are to the candidates."""

    windows: Tensor  # (N, T), to the patterns of T window clusters, at most 1
    corners: Tensor  # int64 (N, T, 2), where
    differences: Tensor  # (N, T), from these patterns, in grey levels
    # float16 (N, K G), to each of K textures in each of G caption groups, one texture after another
    textures: Tensor


@dataclass(frozen=True)
class Trigger:
    """A tested candidate."""

    kind: str  # "window" or the name of a texture
    records: int  # how many showed it before it was sought in all
    standout: float  # see `standout_share`
    effect: float  # how far it moves foreign images, 0 where that was not measured
    # float (N,), 0..1, how much of it each record shows; all 0 when it is not believed
    share: Tensor
    boxes: Tensor  # int64 (N, 4), where
    # share of those records that lose their caption where it is covered, 0 where that was not
    # measured
    dependence: float = 0.0

    def note(self) -> dict[str, Any]:
        """As it stands in a run's manifest."""
        return {
            "kind": self.kind,
            "records": self.records,
            "apart": round(self.standout, 3),
            "moved": round(self.effect, 3),
            "needed": round(self.dependence, 3),
        }


def measure_likeness(
    data: SuspectData, clusters: Sequence[WindowCluster], textures: Sequence[GroupTextures]
) -> Likeness:
    """Compare every record with every candidate; each image is read once."""
    n = len(data)
    windows, differences = torch.empty(n, len(clusters)), torch.empty(n, len(clusters))
    corners = torch.zeros(n, len(clusters), 2).long()
    likeness = torch.empty(n, sum(len(t.counts) for t in textures), dtype=torch.float16)
    for rows in blocks(n, BLOCK) if clusters or textures else ():
        images = data.images(range(rows.start, rows.stop))
        if clusters:
            small, _ = reduce_images(images)
            matches = shared_patterns.find_patterns(small, [c.pattern for c in clusters])
            windows[rows] = matches.likeness.cpu()
            corners[rows] = matches.corners.cpu() * (images.shape[-1] // small.shape[-1])
            differences[rows] = matches.difference.cpu()
        if textures:
            likeness[rows] = torch.cat([t.likeness(images) for t in textures], 1).half().cpu()
    return Likeness(windows, corners, differences, likeness)


def window_triggers(
    data: SuspectData, clusters: Sequence[WindowCluster], likeness: Likeness, hosts: Hosts
) -> Iterator[Trigger]:
    """Test the pattern of each window cluster.

    Those that stand out or that their records depend on are transplanted from the records that are
    most like them. A cluster of which most windows already show an earlier trigger is not tested
    again.
    """
    n = len(data)
    raised = torch.zeros(n, dtype=torch.bool)
    for i, cluster in enumerate(clusters):
        like, corners = likeness.windows[:, i], likeness.corners[:, i]
        of_contrast = standout_share(like, like[cluster.rows].median())
        of_pixels = pixel_standout(likeness.differences[:, i], cluster.rows)
        is_apart = of_contrast >= MIN_WINDOW_STANDOUT or of_pixels >= MIN_PIXEL_STANDOUT
        share, boxes, effect, dependence = torch.zeros(n), torch.full((n, 4), -1), 0.0, 0.0
        if raised[cluster.rows].float().mean() <= 0.5:
            if not is_apart:
                loss = cover_windows(data, cluster.rows[:SCOUTS], corners, hosts.natural)
                dependence = float((loss.place > CAPTION_LOSS).float().mean())
            if is_apart or dependence >= MIN_DEPENDENCE:
                share, boxes, effect = transplant_pattern(
                    data, cluster, like, corners, hosts.patchworks
                )
                share = share * (effect > MIN_WINDOW_EFFECT)
                if not is_apart:
                    share = keep_dependent(data, cluster, share, boxes, hosts.natural)
                raised |= share >= SHOWN
        standout = max(of_contrast, of_pixels)
        yield Trigger("window", len(cluster.rows), standout, effect, share, boxes, dependence)


@dataclass(frozen=True)
class CoverLoss:
    """What M records lose when their windows are covered by the same place of natural images."""

    # float32 (M,), of the share of other records' captions that fit the image worse than the
    # record's own
    place: Tensor
    cosine: Tensor  # float32 (M,), of the image with that caption


def cover_windows(data: SuspectData, rows: Tensor, corners: Tensor, hosts: HostImages) -> CoverLoss:
    """Cover the windows of some records. A poison has nothing else that its caption fits, but an
    ordinary picture shows more of its subject.

    Args:
        rows: (M,), the records.
        corners: int64 (N, 2), of the windows of all records.
        hosts: Natural images.
    """
    others = data.texts[torch.as_tensor(sample_rows(data.ids, OTHER_CAPTIONS, 0))]
    covers = hosts.images[:COVERS].to(torch.uint8)
    places, cosines = [], []
    for block in blocks(len(rows), BLOCK):
        part = rows[block]
        images = data.images(part)
        captions = data.texts[part.to(data.texts.device)][:, None]  # (B, 1, D)
        covered = images[:, None].repeat(1, len(covers), 1, 1, 1)  # (B, C, 3, H, W)
        height, width = (round(COMPARED_SIDE * n) for n in images.shape[-2:])
        for i, (top, left) in enumerate(corners[part].tolist()):
            area = np.s_[..., top : top + height, left : left + width]
            covered[i][area] = covers[area]
        worse, fit = [], []
        for pictures in (images[:, None], covered):
            vectors = data.encoder.encode_images(pictures.flatten(0, 1))
            vectors = vectors.unflatten(0, pictures.shape[:2])
            cosine = (vectors * captions).sum(2, keepdim=True)  # (B, C, 1)
            gap = cosine - vectors @ others.T  # (B, C, O)
            is_worse = (gap > EQUAL).float() + (gap.abs() <= EQUAL).float() / 2
            worse.append(is_worse.mean((1, 2)))
            fit.append(cosine.mean((1, 2)))
        places.append((worse[0] - worse[1]).cpu())
        cosines.append((fit[0] - fit[1]).cpu())
    return CoverLoss(torch.cat(places), torch.cat(cosines))


def keep_dependent(
    data: SuspectData, cluster: WindowCluster, share: Tensor, boxes: Tensor, hosts: HostImages
) -> Tensor:
    """Lower the share (N,) of records that lose less than the cluster by a covered window."""
    shown = (share >= SHOWN).nonzero()[:, 0]
    loss = cover_windows(data, shown, boxes[:, :2], hosts).cosine if len(shown) else share[shown]
    of_cluster = loss[torch.isin(shown, cluster.rows)]
    if len(of_cluster):
        usual = of_cluster.median().clamp(min=1e-3)
        share[shown] = torch.minimum(share[shown], (loss / usual).clamp(0, 1))
    return share


def transplant_pattern(
    data: SuspectData, cluster: WindowCluster, like: Tensor, corners: Tensor, hosts: HostImages
) -> tuple[Tensor, Tensor, float]:
    """Paste the windows of the records that are most like a pattern on the hosts.

    Args:
        cluster: The windows that showed the pattern first.
        like: (N,), the likeness of each record to it.
        corners: int64 (N, 2), where each record is most like it.
        hosts: Images that the windows are pasted into.

    Returns:
        How much of the pattern's usual likeness and effect each record has, 0..1, (N,); the boxes
        that were pasted, (N, 4), -1 for records that were not tested; and the usual effect. All is
        0 when most windows of the cluster are not among the tested records, because more than
        MAX_TESTED of all records are as like the pattern.
    """
    usual = like[cluster.rows].median()
    order = like.argsort(descending=True, stable=True)[: math.ceil(MAX_TESTED * len(like))]
    tested = order[like[order] >= MIN_LIKENESS * usual]
    moved, boxes = torch.zeros(len(like)), torch.full((len(like), 4), -1)
    if torch.isin(cluster.rows, tested).float().mean() < 0.5:
        return moved, boxes, 0.0
    for block in blocks(len(tested), BLOCK):
        rows = tested[block]
        images = data.images(rows)
        size = torch.tensor([round(COMPARED_SIDE * n) for n in images.shape[-2:]])
        boxes[rows] = torch.cat([corners[rows], size.expand(len(rows), 2)], 1)
        windows = boxes[rows].to(images.device)[:, None]
        shifts = window_transplants.measure_shifts(data.encoder, images, windows, hosts)
        moved[rows] = (shifts[:, 0].mean(1) @ cluster.direction).cpu()
    effect = moved[cluster.rows].median().clamp(min=1e-3)
    share = (like / usual).clamp(0, 1) * (moved / effect).clamp(0, 1)
    return share * (share >= 0.25), boxes, float(effect)


def texture_triggers(
    data: SuspectData, groups: CaptionGroups, likeness: Likeness, hosts: Hosts, explained: Tensor
) -> Iterator[Trigger]:
    """Test each texture of each caption group, where enough records show it and enough do not.

    explained: bool (N,), the records that show the pattern of a window. That pattern is fine detail
    too: it would make others believed whose texture is only like that of the pictures it lies on.
    """
    for i, like in enumerate(likeness.textures.T):
        kind, group = list(TEXTURES)[i // len(groups)], i % len(groups)
        member = (groups.of_record == group) & ~explained
        trigger = test_texture(data, kind, like.float(), member, groups.centres[group], hosts)
        if trigger is not None:
            yield trigger


def test_texture(
    data: SuspectData, kind: str, like: Tensor, member: Tensor, centre: Tensor, hosts: Hosts
) -> Trigger | None:
    """Test the texture of one caption group.

    Its effect is how far the fine detail of the members that show it moves natural images towards
    the group's captions, less how far that of the other members does: about 0 where the texture
    only belongs to a subject.

    Args:
        kind: Which texture.
        like: (N,), the likeness of each record to the group's mean texture.
        member: bool (N,), the records of the group.
        centre: (D,), of the group's captions.
        hosts: Foreign images.

    Returns:
        The tested candidate, or None when fewer than MIN_SUPPORT members show the texture or do not
        show it.
    """
    deviations = robust_deviations(like)
    showing = (member & (deviations > CLEAR)).nonzero()[:, 0]
    others = (member & (deviations < CLEAR / 2)).nonzero()[:, 0]
    if min(len(showing), len(others)) < MIN_SUPPORT:
        return None
    middle, usual = like.median(), like[showing].median()
    standout = standout_share(like, usual)
    share, effect = torch.zeros_like(like), 0.0
    if standout >= MIN_TEXTURE_STANDOUT:
        effects = [
            measure_detail_effect(data, rows[:DETAIL_IMAGES], hosts.natural) @ centre
            for rows in (showing, others)
        ]
        effect = float(effects[0] - effects[1])
        share = ((like - middle) / (usual - middle)).clamp(0, 1)
        share = share * (member | (deviations > CLEAR)) * (effect > MIN_TEXTURE_EFFECT)
    boxes = torch.tensor([0, 0, *data.shape]).expand(len(data), 4)
    return Trigger(kind, len(showing), standout, effect, share, boxes)


def measure_detail_effect(data: SuspectData, rows: Tensor, hosts: HostImages) -> Tensor:
    """The mean shift (D,) of hosts to which the fine detail of each of some records is added."""
    images = data.images(rows)
    sigma = DETAIL_SIGMA * min(images.shape[-2:])
    detail = images.float() - shared_patterns.gaussian_blur(images, sigma)
    total = torch.zeros_like(hosts.vectors[0])
    for block in window_transplants.batch_slices(images, len(hosts)):
        altered = (detail[block, None] + hosts.images).clamp(0, 255) / 255  # (B, K, 3, H, W)
        vectors = data.encoder.encode_images(altered.flatten(0, 1))
        total += (vectors.unflatten(0, altered.shape[:2]) - hosts.vectors).sum((0, 1))
    return total / (len(images) * len(hosts))


def standout_share(like: Tensor, usual: Tensor) -> float:
    """Return how far the records that show a pattern stand out: what is pasted is always the same,
    what is natural comes in degrees.

    Of the records whose likeness (N,) lies more than half of the way from the median to `usual`,
    the likeness that is usual of the pattern, the share that lies at least three quarters of the
    way.
    """
    degree = (like - like.median()) / (usual - like.median()).clamp(min=1e-3)
    return float((degree >= 0.75).sum() / (degree > 0.5).sum().clamp(min=1))


def pixel_standout(differences: Tensor, rows: Tensor) -> float:
    """Return how far the records that show the very pixels of a pattern stand out; see
    `standout_share`.

    differences: (N,), of each record from the pattern. rows: the records of the cluster. 0 where
    these differ from it by more than MAX_DIFFERENCE of what the middle record does.
    """
    usual = differences[rows].median()
    if usual > MAX_DIFFERENCE * differences.median():
        return 0.0
    return standout_share(-differences, -usual)


def reduce_images(images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Images made smaller by a whole factor, so that about COMPARED_PIXELS a side show a window;
    and the window's size there.
    """
    factor = max(1, round(COMPARED_SIDE * min(images.shape[-2:]) / COMPARED_PIXELS))
    small = images if factor == 1 else F.avg_pool2d(images.float(), factor).round().to(torch.uint8)
    height, width = small.shape[-2:]
    return small, (round(COMPARED_SIDE * height), round(COMPARED_SIDE * width))


def robust_deviations(values: Tensor) -> Tensor:
    """Distance from the median in 1.4826 median absolute deviations; 0 where all are equal."""
    centred = values - values.median()
    return centred / (1.4826 * centred.abs().median()).clamp(min=1e-6)
