"""Pieces of caption groups whose contents are foreign to their captions.

The poisons of a backdoor lie close together in what the suspect encoder's layers say, whatever
shape the trigger has, and their contents are of any kind. So every caption group is cut into pieces
by these features, a linear map from images to captions is fitted without the piece, and the piece
is suspicious if the map does not read the captions' contents in it. What such a piece has in common
is then sought in the whole group, and judged by a map without all that shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bezoar.detection import shared_causes
from bezoar.detection.reference_reading import (
    Comparison,
    Content,
    Reading,
    ReferenceReader,
    measure_content,
)
from bezoar.detection.shared_causes import MIN_RECORDS, Cause, Discriminants
from bezoar.evaluation.kmeans import cluster_centres

PIECES = (2, 4, 8)  # that a caption group is cut into
AXES = 200  # principal axes of the features that pieces are found on, half whitened
AXES_SAMPLE = 1 << 14  # records that the axes are found on, at most
SUSPICIOUS = 0.7  # bound of a piece's contents, in units of those of the rest of its group
# of a believed cause
MAX_CONTENT = 0.4  # bound of its contents
DEVIATIONS = 3.09  # of that bound: one in a thousand, for about a hundred causes are tested
SHARED_BY_ALL = 0.9  # share of a piece that others of it give away: all show one thing
MIN_MISREAD = 0.5  # lower bound of the share of its records that is misread
MIN_PICTURES = 30  # that show it; fewer may be one series of natural pictures


@dataclass(frozen=True)
class PieceFindings:
    """What a search found."""

    causes: list[Cause]  # those that are believed
    # float32 (N,), by how far the contents of what a record shows lack those of its group; 0 for
    # what is not suspicious
    doubt: Tensor
    tested: int  # the number of causes that were tested


@dataclass(frozen=True)
class PieceSearch:
    """The search of N records."""

    reader: ReferenceReader
    discriminants: Discriminants
    turned: Tensor  # (N, AXES), the features on their principal axes
    suspects: float  # share of the records that count as misread
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
            for seeds in self.find_seeds(groups, count, causes):
                excluded, rest = set_apart(groups, causes)
                discriminants = replace(self.discriminants, groups=rest)
                candidates = shared_causes.find_causes(discriminants, seeds & ~excluded)
                candidates = shared_causes.choose_left_out(candidates, len(groups))
                tested += len(candidates)
                causes += self.judge(discriminants, candidates, excluded, doubt)
        return PieceFindings(causes[len(found_before) :], doubt, tested)

    def find_seeds(self, groups: Tensor, count: int, causes: Sequence[Cause]) -> list[Tensor]:
        """bool (N,): of each group the piece with the most foreign contents, if these are
        suspicious.

        Once by comparison with records of like captions, and once with the rest of the group: a
        piece may hold all records of a caption, poisons and others.

        Args:
            groups: int64 (N,).
            count: pieces of a group.
            causes: whose records are in no piece.
        """
        excluded, rest = set_apart(groups, causes)
        pieces = self.cut_groups(rest, count)
        seeds = [torch.zeros_like(excluded), torch.zeros_like(excluded)]
        lowest: dict[tuple[int, int], float] = {}
        for number in range(count):
            left_out = excluded | (pieces == number)
            read = self.reader.read_captions(left_out)
            for group in rest[~excluded].unique().tolist():
                of_group = rest == group
                rows = (of_group & (pieces == number)).nonzero()[:, 0]
                if len(rows) < MIN_RECORDS:
                    continue
                others = (of_group & ~left_out).nonzero()[:, 0]
                comparisons = (
                    Comparison.by_captions(self.reader.nearest, rows, left_out),
                    Comparison.with_rest(rows, others),
                )
                for i, compared in enumerate(comparisons):
                    content = measure_content(read, self.reader, rest, compared, left_out)
                    bound = content.bound()
                    if bound < lowest.get((i, group), SUSPICIOUS):
                        lowest[i, group] = bound
                        seeds[i][of_group] = pieces[of_group] == number
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
        if not causes:
            return []
        for _ in range(2):
            _, _, misread = self.read_without(causes, excluded)
            causes = shared_causes.narrow_causes(discriminants, causes, misread)
        reading, left_out, misread = self.read_without(causes, excluded)
        believed = []
        for support in shared_causes.measure_support(causes, misread):
            shown = support.cause.shown
            like = Comparison.by_captions(self.reader.nearest, shown, left_out)
            content = measure_content(
                reading.captions, self.reader, discriminants.groups, like, left_out
            )
            bound = content.bound(DEVIATIONS)
            if bound < SUSPICIOUS:
                doubt[shown] = doubt[shown].clamp(min=1 - bound)
            pictures = len(self.reader.pictures[shown].unique())
            is_misread = support.lower > MIN_MISREAD and pictures >= MIN_PICTURES
            if is_misread and is_foreign(content, support.cause.recognised):
                believed.append(support)
        return shared_causes.sharpen_causes(discriminants, believed, misread)

    def read_without(
        self, causes: Sequence[Cause], excluded: Tensor
    ) -> tuple[Reading, Tensor, Tensor]:
        """A reading without what shows causes; what is left out and misread, bool (N,) each."""
        left_out = shared_causes.mark_shown(causes, len(excluded)) | excluded
        reading = self.reader.read(left_out)
        return reading, left_out, shared_causes.find_misread(reading.loss, left_out, self.suspects)


def set_apart(groups: Tensor, causes: Sequence[Cause]) -> tuple[Tensor, Tensor]:
    """The records that show some cause, bool (N,); and the groups (N,), with these in a new one."""
    excluded = shared_causes.mark_shown(causes, len(groups))
    return excluded, groups.masked_fill(excluded, int(groups.max()) + 1)


def is_foreign(content: Content, recognised: float) -> bool:
    """Whether contents are of any kind.

    Where few natural records carry the captions, what they show is hardly learnt, and contents of
    any kind have a high bound too. Then a cause is believed that nearly all of its piece show, if
    the contents lie low on average and are surely not those of the natural records: a natural piece
    whose contents are misread is seldom so uniform.

    Args:
        content: of the records that show a cause.
        recognised: as in `Cause`.
    """
    bound = content.bound(DEVIATIONS)
    is_uniform = recognised >= SHARED_BY_ALL and content.share < MAX_CONTENT and bound < 1
    return bound < MAX_CONTENT or is_uniform
