"""Features that the mismatched records of a caption group share, and tests whether other records
support them.

A *discriminant* tells some records of a group from all others by Fisher's linear discriminant:
w = C^-1 (mean of these records - mean of all), with one covariance C for all groups. It is always
fitted on one half of the records and read on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

MIN_RECORDS = 8  # of a group, before anything is said of it
ROUNDS = 3  # in which the records that show a cause are chosen again
FOREIGN = 8192  # records that set the thresholds
SCORE_BLOCK = 4096  # records that are read at a time
FALSE_SHARE = 0.01  # of these, that lie above it
STRICT_SHARE = 0.001  # of these, that lie above the threshold for records of other groups
SHRINKAGE = 0.05  # of the mean variance, added to every variance
COVARIANCE_SAMPLE = 1 << 16  # records that a covariance is computed from, at most
# tests of a cause
MAX_LEFT_OUT = 0.3  # of all records, that show some cause and are left out of a training
MIN_RECOGNISED = 0.2  # share of a group's mismatched records that the others of them give away
MIN_UNSUPPORTED = 0.35  # lower bound of the share that is misread by a model that saw none of it
CONFIDENCE = 0.95  # of that bound
USUAL_SHARE = 0.25  # of a believed cause's usual score, that a record needs to show it
CLEAR = 5.0  # robust deviations by which it lies above the bounds of the other groups
MIN_DEVIATION = 0.03  # of the bounds


@dataclass(frozen=True)
class Cause:
    """What the mismatched records of one caption group have in common."""

    group: int  # its number
    # share of the group's mismatched records that lie above the threshold of a discriminant which
    # they had no part in
    recognised: float
    rows: Tensor  # int64 (M,), all records of the group
    # float32 (M,), of the last discriminant, in units of its threshold: 1 and more shows the cause
    scores: Tensor

    @property
    def shown(self) -> Tensor:
        """int64 (S,), the records that show it."""
        return self.rows[self.scores >= 1]


@dataclass(frozen=True)
class Support:
    """Whether other records support what those that show a cause are captioned as."""

    cause: Cause
    unsupported: float  # share of them that a model misreads which saw none of them
    lower: float  # its lower confidence bound


@dataclass(frozen=True)
class Discriminants:
    """What discriminants of N records in G groups are computed from."""

    features: Tensor  # float32 (N, F), standardised columns
    groups: Tensor  # int64 (N,)
    half: Tensor  # int64 (N,), 0 or 1
    sample: Tensor  # int64 (K,), records whose readings set the thresholds
    # (F,), of the records that are not in half 0, and of those not in half 1
    means: tuple[Tensor, Tensor]
    factors: tuple[Tensor, Tensor]  # Cholesky factors of their covariances, (F, F)

    @staticmethod
    def fit(features: Tensor, groups: Tensor, half: Tensor) -> Discriminants:
        """Means and covariances, of COVARIANCE_SAMPLE records each; the first are the sample."""
        means, factors = [], []
        for number in (0, 1):
            training = features[(half != number).nonzero()[:COVARIANCE_SAMPLE, 0]]
            mean = training.mean(0)
            centred = training - mean
            covariance = centred.T @ centred / max(1, len(training))
            variance = covariance.diagonal().mean().clamp(min=1e-6)
            covariance.diagonal().add_(SHRINKAGE * variance)
            means.append(mean)
            factors.append(torch.linalg.cholesky(covariance))
        sample = torch.arange(min(FOREIGN, len(features)))
        return Discriminants(
            features, groups, half, sample, (means[0], means[1]), (factors[0], factors[1])
        )

    def score(self, positives: Tensor) -> Tensor:
        """Read every record by the discriminant of its own group's positives in the other half.

        Args:
            positives: bool (N,), the records that are told from all others, group by group.

        Returns:
            float32 (N,), in units of the threshold, above which FALSE_SHARE of the other groups'
            records lie; 0 where a group has fewer than three positives in the other half.
        """
        count = int(self.groups.max()) + 1
        readings = torch.zeros(len(self.groups))
        of_sample = torch.zeros(len(self.sample), count)
        for number in (0, 1):
            weights = self._weights(positives & (self.half != number), count, number)  # (F, G)
            rows = (self.half == number).nonzero()[:, 0]
            for block in rows.split(SCORE_BLOCK):
                scores = (self.features[block] - self.means[number]) @ weights  # (B, G)
                readings[block] = scores.gather(1, self.groups[block, None])[:, 0]
            sampled = self.half[self.sample] == number
            of_sample[sampled] = (
                self.features[self.sample[sampled]] - self.means[number]
            ) @ weights
        same_group = self.groups[self.sample, None] == torch.arange(count)
        of_sample[same_group] = torch.nan
        thresholds = of_sample.nanquantile(1 - FALSE_SHARE, dim=0).nan_to_num(torch.inf)
        return readings / thresholds.clamp(min=1e-6)[self.groups]

    def score_all(self, positives: Tensor, group: int) -> Tensor:
        """Read every record, of whatever group, by one group's discriminant.

        positives: bool (N,). Returns float32 (N,), in units of the threshold STRICT_SHARE.
        """
        scores = torch.zeros(len(self.groups))
        for number in (0, 1):
            training = positives & (self.half != number)
            weights = self._weights(training, int(self.groups.max()) + 1, number)[:, group]
            rows = (self.half == number).nonzero()[:, 0]
            for block in rows.split(SCORE_BLOCK):
                scores[block] = (self.features[block] - self.means[number]) @ weights
        foreign = self.sample[self.groups[self.sample] != group]
        threshold = scores[foreign].quantile(1 - STRICT_SHARE) if len(foreign) else torch.inf
        return scores / max(1e-6, float(threshold))

    def _weights(self, positives: Tensor, count: int, number: int) -> Tensor:
        """The discriminants of all groups, (F, G): unit variance, 0 for too few positives."""
        groups = self.groups[positives]
        sizes = torch.bincount(groups, minlength=count)[:, None]
        sums = torch.zeros(count, self.features.shape[1])
        sums.index_add_(0, groups, self.features[positives])
        differences = (sums / sizes.clamp(min=1) - self.means[number]) * (sizes >= 3)  # (G, F)
        weights = torch.cholesky_solve(differences.T, self.factors[number])  # (F, G)
        deviations = (differences.T * weights).sum(0).clamp(min=1e-12).sqrt()
        return weights / deviations


def find_causes(discriminants: Discriminants, mismatched: Tensor) -> list[Cause]:
    """Seek a cause in every caption group.

    The first discriminants are those of the mismatched records; then, ROUNDS times, those of the
    group's records that lie above the threshold, mismatched or not.

    Args:
        discriminants: of N records.
        mismatched: bool (N,), the records whose content does not support their caption.

    Returns:
        A cause for each group with at least MIN_RECORDS mismatched records, of which at least
        MIN_RECORDS show it. Most are contents.
    """
    groups = discriminants.groups
    first = scores = discriminants.score(mismatched)
    for _ in range(ROUNDS):
        scores = discriminants.score(scores >= 1)
    causes = []
    for group in range(int(groups.max()) + 1):
        rows = (groups == group).nonzero()[:, 0]
        suspects = mismatched[rows]
        if int(suspects.sum()) < MIN_RECORDS:
            continue
        recognised = float((first[rows][suspects] >= 1).float().mean())
        cause = Cause(group, recognised, rows, scores[rows])
        if len(cause.shown) >= MIN_RECORDS:
            causes.append(cause)
    return causes


def choose_left_out(causes: Sequence[Cause], records: int) -> list[Cause]:
    """The causes whose records are left out of one training, the best recognised first.

    They show MAX_LEFT_OUT of all records at most.
    """
    chosen, count = [], 0
    for cause in sorted(causes, key=lambda cause: -cause.recognised):
        if count + len(cause.shown) <= MAX_LEFT_OUT * records:
            chosen.append(cause)
            count += len(cause.shown)
    return chosen


def narrow_causes(
    discriminants: Discriminants, causes: Sequence[Cause], misread: Tensor
) -> list[Cause]:
    """Read the groups again, by those that show the causes and are misread.

    A cause that natural records show too becomes that of the misread ones. Causes that fewer than
    MIN_RECORDS still show go.
    """
    positives = mark_shown(causes, len(misread)) & misread
    scores = discriminants.score(positives)
    narrowed = [replace(cause, scores=scores[cause.rows]) for cause in causes]
    return [cause for cause in narrowed if len(cause.shown) >= MIN_RECORDS]


def mark_shown(causes: Sequence[Cause], records: int) -> Tensor:
    """bool (N,), the records that show some of the causes."""
    shown = torch.zeros(records, dtype=torch.bool)
    for cause in causes:
        shown[cause.shown] = True
    return shown


def find_misread(loss: Tensor, left_out: Tensor, suspects: float) -> Tensor:
    """bool (N,), the records whose loss is above that of most that are not left out.

    suspects: share of these that count as misread.
    """
    return loss > float(np.quantile(loss[~left_out].numpy(), 1 - suspects))


def measure_support(causes: Sequence[Cause], misread: Tensor) -> list[Support]:
    """Return how many of the records that show each cause are misread.

    misread: bool (N,), by a model that was trained without all of them.
    """
    supports = []
    for cause in causes:
        hits, count = int(misread[cause.shown].sum()), len(cause.shown)
        supports.append(Support(cause, hits / count, lower_bound(hits, count)))
    return supports


def lower_bound(hits: int, count: int) -> float:
    """Clopper and Pearson's lower confidence bound of a share, one-sided."""
    return float(beta.ppf(1 - CONFIDENCE, hits, count - hits + 1)) if hits else 0.0


def sharpen_causes(
    discriminants: Discriminants, supports: Sequence[Support], misread: Tensor
) -> list[Cause]:
    """Read the records again, by those that show a believed cause and are misread.

    Records of the group that share the cause by chance are mostly read well, and are no part of it
    any more; nor are those that come only just above the threshold, where the others lie far above
    it. Misread records of other groups that show it very clearly become part of it: captions of one
    target fall into several groups.

    Args:
        discriminants: of N records.
        supports: of the believed causes.
        misread: bool (N,), as in `measure_support`.
    """
    positives = mark_shown([support.cause for support in supports], len(misread)) & misread
    scores = discriminants.score(positives)
    causes = []
    for cause in (support.cause for support in supports):
        of_group = scores[cause.rows]
        usual = float(of_group[positives[cause.rows]].median())
        of_group = of_group / max(1.0, USUAL_SHARE * usual)
        everywhere = discriminants.score_all(positives, cause.group)
        others = ((everywhere >= 1) & misread & (discriminants.groups != cause.group)).nonzero()
        rows = torch.cat([cause.rows, others[:, 0]])
        values = torch.cat([of_group, everywhere[others[:, 0]]])
        causes.append(replace(cause, rows=rows, scores=values))
    return causes


def believe_causes(supports: Sequence[Support]) -> list[Support]:
    """Those causes whose records nothing else supports, as those of no other group.

    In a group without an attack a discriminant finds some kind of content. Without those records
    other content still supports most of them. How many depends on how well contents are read, so
    that the groups of the same data are each other's controls; one that is believed is none any
    more.
    """
    believed: list[Support] = []
    controls = list(supports)
    while True:
        least = max(MIN_UNSUPPORTED, find_clear_bound(controls, CLEAR))
        clear = [s for s in controls if s.cause.recognised >= MIN_RECOGNISED and s.lower > least]
        if not clear:
            return believed
        believed += clear
        controls = [s for s in controls if not any(s is other for other in clear)]


def find_clear_bound(supports: Sequence[Support], deviations: float) -> float:
    """The lower bound that lies so many robust deviations above that of the middle group."""
    if not supports:
        return 1.0
    bounds = torch.tensor([support.lower for support in supports])
    middle = bounds.median()
    deviation = (1.4826 * (bounds - middle).abs().median()).clamp(min=MIN_DEVIATION)
    return float(middle + deviations * deviation)
