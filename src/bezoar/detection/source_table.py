"""Evidence pooled over the sources of records: which of them holds more suspicious records than
its content explains.

At a few poisons in ten thousand no single record stands out, but those of one attacker come from
few sources and share a target. The level u of a record is the share of all records that are at
least as suspicious. Fisher's sum of -log u is tested for each source over all its records, and over
those whose captions are alike (a `cell`), which is where the poisons of one target are. A source is
compared with what other records of the same content do: a record is ranked by how far it stands
above those with captions like its own, and above those with images like its own, and the milder of
the two counts. A source that differs before this adjustment alone is said to differ in content.

Under the null hypothesis the sum over n records is a Gamma(n, 1) variable. A caption group whose
records have longer tails than that is scaled down to a mean of 1. The p-value of a source is the
smallest of its tests times their number (Bonferroni); over the sources the false discovery rate is
bounded by Benjamini and Hochberg (1995).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaincc, gammainccinv, gammaincinv, ndtri
from scipy.stats import false_discovery_control, rankdata

from bezoar.detection import merging
from bezoar.detection.corpus.record_sources import RecordSources
from bezoar.evaluation.scores import Scores

TAIL = 0.1  # share of all records, the worst, that is counted for the reader and is lifted
FALSE_DISCOVERIES = 0.01  # expected share of clean ones among the sources that stand out
# If more sources stand out they differ by nature, and none of their records is lifted.
MOST_LIFTED, MOST_LIFTED_SHARE = 3, 0.05
LEAST_RECORDS = 3  # of a source, or of a cell, that is tested
LEAST_GROUP = 30  # records of a content group that is compared within itself
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Evidence:
    """The strongest test of a source."""

    p: float  # after the number of its tests, at most 1
    ranking: str  # name of the ranking
    group: int  # the caption group of the cell; -1: all records of the source
    records: int  # of the source, or cell
    in_tail: int  # how many of them are among the worst TAIL of all
    mean: float  # of -log u, in nats a record; 1 is expected
    low: float  # 95 % interval of that mean
    high: float


@dataclass(frozen=True)
class SourceRow:
    """A source that was tested."""

    number: int  # its number among the `RecordSources`
    name: str
    records: int  # how many records it has
    raised: int  # how many of them a detector raised
    evidence: Evidence  # its strongest test, content adjusted for
    q: float  # the false discovery rate at which it would just be found
    unadjusted: float  # the same without the adjustment for content

    @property
    def stands_out(self) -> bool:
        """Whether it holds more suspicious records than its content explains."""
        return self.q <= FALSE_DISCOVERIES

    @property
    def verdict(self) -> str:
        """What the table says of it."""
        if self.stands_out:
            return "stands out"
        return "differs in content" if self.unadjusted <= FALSE_DISCOVERIES else ""


@dataclass(frozen=True)
class SourceTable:
    """The sources that were tested, the most suspicious first."""

    what: str  # what the sources are
    rows: tuple[SourceRow, ...]  # of the table
    untested: int  # how many sources have fewer records than are tested
    # rows of the data, ascending: the records in the tails for which sources stand out; none where
    # these are so many that sources differ by nature
    accused: Integers
    source_of_accused: Integers  # the number of each one's source

    @property
    def standing_out(self) -> list[SourceRow]:
        """The sources that stand out."""
        return [row for row in self.rows if row.stands_out]

    @property
    def differs_by_nature(self) -> bool:
        """Whether more sources stand out than an attacker has."""
        return are_many(len(self.standing_out), len(self.rows))


def tabulate_sources(
    sources: RecordSources,
    rankings: Mapping[str, Scores],
    captions: Integers,
    images: Integers,
) -> SourceTable:
    """Test every source.

    Args:
        sources: Of N records.
        rankings: Scores of the records by name, all in the order of the records.
        captions: (N,), the group of each record's caption, 0 ...; one group for all without any.
        images: (N,), the same of its image.
    """
    counts = np.bincount(sources.of_record[sources.of_record >= 0], minlength=len(sources.names))
    raised = merging.raised_rows(rankings.values(), len(sources.of_record))
    levels = {name: tail_levels(s.values.cpu().double().numpy()) for name, s in rankings.items()}
    adjusted = {name: adjust_levels(s, captions, images) for name, s in rankings.items()}
    tested = np.flatnonzero(counts >= LEAST_RECORDS)
    evidence = find_evidence(sources.of_record, counts, captions, adjusted)
    plain = find_evidence(sources.of_record, counts, captions, levels, by_content=False)
    q = false_discovery_control([evidence[i].p for i in tested])
    plain_q = false_discovery_control([plain[i].p for i in tested])
    is_raised = raised & (sources.of_record >= 0)
    raised_of = np.bincount(sources.of_record[is_raised], minlength=len(counts))
    rows = [
        SourceRow(
            number=i,
            name=sources.names[i],
            records=int(counts[i]),
            raised=int(raised_of[i]),
            evidence=evidence[i],
            q=float(q[place]),
            unadjusted=float(plain_q[place]),
        )
        for place, i in enumerate(tested.tolist())
    ]
    rows.sort(key=lambda row: (row.evidence.p, row.name))
    accused = _accused_records(rows, sources.of_record, captions, adjusted)
    untested = len(counts) - len(tested)
    owners = sources.of_record[accused]
    return SourceTable(sources.what, tuple(rows), untested, accused, owners)


def are_many(standing_out: int, tested: int) -> bool:
    """Whether more sources stand out than any attacker has: then they differ by nature."""
    return standing_out > max(MOST_LIFTED, MOST_LIFTED_SHARE * tested)


def tail_levels(values: Floats) -> Floats:
    """Share of the records that are at least as suspicious, ties included: (N,) in (0, 1]."""
    levels: Floats = rankdata(-values, method="max") / max(1, len(values))
    return levels


def adjust_levels(scores: Scores, captions: Integers, images: Integers) -> Floats:
    """The levels (N,) that records have after an adjustment for their content.

    Normal scores (van der Waerden) less the mean of the group, over its standard deviation, once in
    groups of captions and once in groups of images; of the smaller of the two the level is taken.
    """
    values = scores.values.cpu().double().numpy()
    normal = ndtri((rankdata(values) - 0.5) / max(1, len(values)))
    return tail_levels(
        np.minimum(standardise(normal, captions), standardise(normal, images)).round(9)
    )


def standardise(values: Floats, groups: Integers) -> Floats:
    """Values (N,) less the mean of their group, over its deviation.

    Of groups below LEAST_GROUP, and of groups without a spread, the values count as they are.
    """
    n = np.bincount(groups)
    mean = np.bincount(groups, values) / np.maximum(n, 1)
    centred = values - mean[groups]
    deviation = np.sqrt(np.bincount(groups, centred**2) / np.maximum(n, 1))
    usable = (n >= LEAST_GROUP) & (deviation > 1e-9)
    scale = np.where(usable, deviation, 1.0)
    return np.where(usable[groups], centred / scale[groups], values)


def find_evidence(
    of_record: Integers,
    counts: Integers,
    captions: Integers,
    levels: Mapping[str, Floats],
    by_content: bool = True,
) -> list[Evidence]:
    """The strongest test of each of S sources.

    Args:
        of_record: (N,), the source of each record, -1 where it is not known.
        counts: (S,), records of each source.
        captions: (N,), caption groups.
        levels: (N,) of each ranking.
        by_content: Whether cells are tested, and caption groups with long tails scaled down.
    """
    scaled_in = captions if by_content else np.zeros_like(captions)
    groups = int(captions.max(initial=0)) + 1
    is_known = of_record >= 0
    owner, group = of_record[is_known], captions[is_known]
    cells, cell_of, sizes = np.unique(
        owner * groups + group, return_inverse=True, return_counts=True
    )
    source_of_cell = cells // groups
    usable_cells = (sizes >= LEAST_RECORDS) & by_content
    cells_of_source = np.bincount(source_of_cell[usable_cells], minlength=len(counts))
    sums_of = {name: level_sums(level, scaled_in)[is_known] for name, level in levels.items()}
    best: list[tuple[float, str, int]] = [(1.0, next(iter(levels)), -1)] * len(counts)
    for name, nats in sums_of.items():
        # Half of the significance is for the whole source, half for its cells.
        share = 2 * len(levels)
        p = gammaincc(np.maximum(counts, 1), np.bincount(owner, nats, len(counts))) * share
        for i in np.flatnonzero(p < [e[0] for e in best]).tolist():
            best[i] = float(p[i]), name, -1
        p = gammaincc(sizes, np.bincount(cell_of, nats)) * share
        p = np.where(usable_cells, p * np.maximum(cells_of_source, 1)[source_of_cell], 1.0)
        for j in np.argsort(-p, kind="stable")[(p >= 1).sum() :].tolist():
            i = int(source_of_cell[j])
            if p[j] < best[i][0]:
                best[i] = float(p[j]), name, int(cells[j] % groups)
    order = np.argsort(owner, kind="stable")
    edges = np.searchsorted(owner[order], np.arange(len(counts) + 1))
    evidence = []
    for i, (p_value, name, cell) in enumerate(best):
        members = order[edges[i] : edges[i + 1]]
        if cell >= 0:
            members = members[group[members] == cell]
        in_tail = int((levels[name][is_known][members] <= TAIL).sum())
        evidence.append(_describe(p_value, name, cell, in_tail, sums_of[name][members]))
    return evidence


def _describe(p: float, name: str, group: int, in_tail: int, nats: Floats) -> Evidence:
    n, total = len(nats), float(nats.sum())
    if not n:
        return Evidence(p, name, group, 0, 0, 1.0, 0.0, float("inf"))
    low, high = total / gammainccinv(n, 0.025), total / gammaincinv(n, 0.025)
    return Evidence(p, name, group, n, in_tail, total / n, float(low), float(high))


def level_sums(levels: Floats, groups: Integers) -> Floats:
    """-log of levels (N,), scaled down in groups whose mean is above 1."""
    nats = -np.log(levels)
    mean = np.bincount(groups, nats) / np.maximum(np.bincount(groups), 1)
    return nats / np.maximum(mean, 1)[groups]


def _accused_records(
    rows: Sequence[SourceRow], of_record: Integers, captions: Integers, levels: Mapping[str, Floats]
) -> Integers:
    """The records in the tails for which sources stand out."""
    is_accused = np.zeros(len(of_record), bool)
    standing_out = [row for row in rows if row.stands_out]
    if not are_many(len(standing_out), len(rows)):
        for row in standing_out:
            test = row.evidence
            members = (of_record == row.number) & (levels[test.ranking] <= TAIL)
            if test.group >= 0:
                members &= captions == test.group
            is_accused |= members
    return np.flatnonzero(is_accused)


def lift_records(merged: Scores, accused: Integers, raised: NDArray[np.bool_]) -> Scores:
    """The merged ranking with the accused records before all others but those that were raised."""
    if not len(accused):
        return merged
    values = merged.values.clone()
    span = values.max() - values.min() + 1
    is_accused = torch.zeros(len(values), dtype=torch.bool)
    is_accused[torch.from_numpy(accused)] = True
    values += span * (is_accused | torch.from_numpy(raised)).to(values)
    values += span * torch.from_numpy(raised).to(values)
    return Scores(merged.ids, values)
