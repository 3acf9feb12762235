"""Pieces of caption groups whose contents are foreign to their captions.

The poisons of a backdoor lie close together in what the suspect encoder's layers say, whatever shape
the trigger has, and their contents are of any kind. So every caption group is cut into pieces by
these features, a linear map from images to captions is fitted without the piece, and the piece is
suspicious if the map does not read the captions' contents in it. What such a piece has in common is
then sought in the whole group, and judged by a map without all that shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bezoar.detection import shared_causes
from bezoar.detection.reference_reading import (
    Comparison,
    Reading,
    ReferenceReader,
    bound_content,
)
from bezoar.detection.shared_causes import MIN_RECORDS, Cause, Discriminants
from bezoar.evaluation.kmeans import cluster_centres

PIECES = (2, 4, 8)  # that a caption group is cut into
AXES = 200  # principal axes of the features that pieces are found on, half whitened
AXES_SAMPLE = 1 << 14  # records that the axes are found on, at most
SUSPICIOUS = 0.7  # bound of a piece's contents, in units of those of the rest of its group
# of a believed cause
MAX_CONTENT = 0.4  # bound of its contents
MIN_MISREAD = 0.5  # lower bound of the share of its records that is misread
MIN_PICTURES = 30  # that show it; fewer may be one series of natural pictures


@dataclass(frozen=True)
class PieceFindings:
    """What a search found. causes: those that are believed. doubt: float32 (N,), by how far the
    contents of what a record shows lack those of its group; 0 for what is not suspicious. tested: the
    number of causes that were tested.
    """

    causes: list[Cause]
    doubt: Tensor
    tested: int


@dataclass(frozen=True)
class PieceSearch:
    """The search of N records. features: (N, F), of mean 0. turned: (N, AXES), on their axes.
    suspects: share of the records that count as misread.
    """

    reader: ReferenceReader
    discriminants: Discriminants
    turned: Tensor
    suspects: float
    seed: int

    @staticmethod
    def prepare(
        reader: ReferenceReader, discriminants: Discriminants, suspects: float, seed: int
    ) -> PieceSearch:
        """Find the principal axes of the features."""
        sample = discriminants.features[:AXES_SAMPLE]
        values, axes = torch.linalg.eigh(sample.T @ sample / len(sample))
        scales = values[-AXES:].clamp(min=1e-6) ** 0.25
        turned = discriminants.features @ (axes[:, -AXES:] / scales)
        return PieceSearch(reader, discriminants, turned, suspects, seed)

    def find(self, groups: Tensor, found_before: Sequence[Cause]) -> PieceFindings:
        """Seek causes in caption groups.

        Args:
            groups: int64 (N,), the caption group of each record.
            found_before: causes whose records have no part in this.
        """
        causes, tested = list(found_before), 0
        doubt = torch.zeros(len(groups))
        for count in PIECES:
            for compares_captions in (True, False):
                excluded = shared_causes.mark_shown(causes, len(groups))
                # What is found already is a group of its own.
                rest = groups.masked_fill(excluded, int(groups.max()) + 1)
                discriminants = replace(self.discriminants, groups=rest)
                seeds = self.find_seeds(rest, excluded, count, compares_captions)
                candidates = shared_causes.find_causes(discriminants, seeds)
                candidates = shared_causes.choose_left_out(candidates, len(groups))
                tested += len(candidates)
                causes += self.judge(discriminants, candidates, excluded, doubt)
        return PieceFindings(causes[len(found_before) :], doubt, tested)

    def find_seeds(
        self, groups: Tensor, excluded: Tensor, count: int, compares_captions: bool
    ) -> Tensor:
        """bool (N,): of each group the piece with the most foreign contents, if these are suspicious.

        Args:
            groups: int64 (N,).
            excluded: bool (N,), of a group of their own, which is not cut.
            count: pieces of a group.
            compares_captions: whether pieces are compared with records of like captions, or with the
                rest of their group: a piece may hold all records of a caption, poisons and others.
        """
        pieces = self.cut_groups(groups, count)
        nowhere = torch.zeros(0, dtype=torch.long)
        lowest: dict[int, tuple[float, Tensor]] = {}
        for number in range(count):
            left_out = excluded | (pieces == number)
            reading = self.reader.read(left_out)
            for group in groups[~excluded].unique().tolist():
                of_group = groups == group
                rows = (of_group & (pieces == number)).nonzero()[:, 0]
                if len(rows) < MIN_RECORDS:
                    continue
                if compares_captions:
                    compared = Comparison.by_captions(self.reader.captions, rows, left_out)
                else:
                    others = (of_group & ~left_out).nonzero()[:, 0]
                    compared = Comparison.with_rest(rows, others)
                bound = bound_content(reading, self.reader, groups, compared, left_out)
                if bound < lowest.get(group, (SUSPICIOUS, nowhere))[0]:
                    lowest[group] = bound, rows
        seeds = torch.zeros_like(excluded)
        seeds[torch.cat([nowhere, *(rows for _, rows in lowest.values())])] = True
        return seeds

    def cut_groups(self, groups: Tensor, count: int) -> Tensor:
        """Return which piece of its group each record is of, by k-means, int64 (N,)."""
        pieces = torch.zeros_like(groups)
        for group in range(int(groups.max()) + 1):
            rows = (groups == group).nonzero()[:, 0]
            if len(rows) >= count * MIN_RECORDS:
                centres = cluster_centres(self.turned[rows], count, self.seed)
                pieces[rows] = torch.cdist(self.turned[rows], centres).argmin(1)
        return pieces

    def judge(
        self,
        discriminants: Discriminants,
        causes: Sequence[Cause],
        excluded: Tensor,
        doubt: Tensor,
    ) -> list[Cause]:
        """Narrow causes to their misread records, and test them by a map without these.

        doubt: (N,), as in `PieceFindings`; it is raised where there is more.

        Returns:
            Those that are misread and have contents of any kind.
        """
        for _ in range(2):
            _, _, misread = self.read_without(causes, excluded)
            causes = shared_causes.narrow_causes(discriminants, causes, misread)
        reading, left_out, misread = self.read_without(causes, excluded)
        believed = []
        for support in shared_causes.measure_support(causes, misread):
            shown = support.cause.shown
            like = Comparison.by_captions(self.reader.captions, shown, left_out)
            content = bound_content(reading, self.reader, discriminants.groups, like, left_out)
            if content < SUSPICIOUS:
                doubt[shown] = doubt[shown].clamp(min=1 - content)
            pictures = len(self.reader.pictures[shown].unique())
            is_misread = support.lower > MIN_MISREAD and pictures >= MIN_PICTURES
            if is_misread and content < MAX_CONTENT:
                believed.append(support)
        return shared_causes.sharpen_causes(discriminants, believed, misread)

    def read_without(
        self, causes: Sequence[Cause], excluded: Tensor
    ) -> tuple[Reading, Tensor, Tensor]:
        """A reading without what shows causes; what was left out; what is misread, bool (N,) each."""
        left_out = shared_causes.mark_shown(causes, len(excluded)) | excluded
        reading = self.reader.read(left_out)
        return reading, left_out, shared_causes.find_misread(reading.loss, left_out, self.suspects)
