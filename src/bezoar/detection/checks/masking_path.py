"""BackdoorIDS: mask an image bit by bit; with a trigger its embedding jumps when the trigger goes
(arXiv 2603.11664).
"""

import itertools
from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.detection.checks import IMAGES_AT_ONCE
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

MIN_CLEAN = 20  # clean images that a mean and a deviation are taken of
MIN_SPREAD = 1e-3  # cosine distance below which a spread among clean images is no measure


@method
class MaskingPath:
    """Label-free, for any encoder. The published test clusters the embeddings along the path by
    DBSCAN: two clusters, a backdoor. With single points as cores, a path falls in two at a step
    exactly if its parts before and after lie farther apart than DBSCAN's radius. Our radius is
    calibrated for each step, because clean images move too: the score is the largest gap in clean
    standard deviations above the clean mean, that is the largest such radius that still tells two
    clusters. The order in which cells are masked, and our own figures, are not the paper's.

    A high score says that one window matters unusually much. A foreign patch does so on a clean
    encoder too, though less: there its gaps were about a tenth of those of a backdoor. It is a
    warning of the input, no evidence against the encoder.
    """

    cells: Annotated[
        int, "cells of the grid a side; a cell should hold the trigger: 4 on 32 px are 8 px"
    ] = 4
    share: Annotated[float, "share of the cells that are masked in the end"] = 0.75
    paths: Annotated[
        int,
        "orders in which cells are masked, each on a shifted grid; the largest gap of all counts",
    ] = 4
    seed: Annotated[int, "seed of the orders, which are the same for all images"] = 0

    needs: ClassVar[tuple[str, ...]] = ("clean", "report")

    def __post_init__(self) -> None:
        if self.cells < 1 or self.paths < 1 or not 0 < self.share < 1:
            raise ValueError("needs cells >= 1, paths >= 1, share inside (0, 1)")

    def __call__(
        self, encoder: Encoder, images: Pairs, clean: Pairs, report: ProgressReport = no_report
    ) -> Scores:
        """-> Scores; boxes: the cells that made the gaps. UserError for too few clean images."""
        if len(clean) < MIN_CLEAN:
            raise UserError(
                f"masking_path needs at least {MIN_CLEAN} clean images; there are {len(clean)}"
            )
        total, done = len(images) + len(clean), 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            report(done, total, "paths")

        clean_gaps = self.measure_gaps(encoder, clean, count)
        gaps = self.measure_gaps(encoder, images, count)
        mean, spread = clean_gaps.mean(0), clean_gaps.std(0).clamp(min=MIN_SPREAD)
        values, step = ((gaps - mean) / spread).flatten(1).max(1)
        sides = images.images.shape[-2:]
        boxes = torch.cat([self.masking_order(path, sides)[1] for path in range(self.paths)])
        notes = {"clean": len(clean), "steps": self.steps, "clean_gap": float(mean.mean())}
        return Scores(images.ids, values.cpu(), boxes[step.cpu()], notes)

    @property
    def steps(self) -> int:
        """Cells masked along a path, one a step."""
        return max(1, round(self.share * (self.cells + 1) ** 2))

    def masking_order(self, path: int, sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The order of the cells along a path.

        The grid is shifted by a part of a cell, so that what one path cuts in two another keeps
        whole. Cells that lie outside the image come last.

        Args:
            sides: Height and width of the images.

        Returns:
            The step at which each pixel is masked, int64 (H, W), from 1; and the cell of each step,
            boxes int64 (steps, 4).
        """
        draw = generator(self.seed, path)
        shifts = torch.rand(2, generator=draw).tolist()
        rows, columns = (self._cuts(n, shift) for n, shift in zip(sides, shifts, strict=True))
        boxes = torch.tensor(
            [(top, left, height, width) for top, height in rows for left, width in columns]
        )
        outside = boxes[:, 2:].amin(1) < 1
        boxes = boxes[(torch.rand(len(boxes), generator=draw) + outside * 2.0).argsort()]
        step_of = torch.zeros(*sides, dtype=torch.int64)
        for step, (top, left, height, width) in enumerate(boxes.tolist(), 1):
            step_of[top : top + height, left : left + width] = step
        return step_of, boxes[: self.steps]

    def _cuts(self, side: int, shift: float) -> list[tuple[int, int]]:
        """Return where the cells of a shifted grid begin along a side, and how long they are."""
        edges = [
            min(side, max(0, round((i - shift) * side / self.cells))) for i in range(self.cells + 2)
        ]
        return [(start, end - start) for start, end in itertools.pairwise(edges)]

    @torch.inference_mode()
    def measure_gaps(self, encoder: Encoder, pairs: Pairs, count: Callable[[int], None]) -> Tensor:
        """The cosine distance of the nearest two embeddings on either side of each step: float32
        (N, paths, steps).

        count: called with the number of images that are done.
        """
        encoder.eval()
        sides = pairs.images.shape[-2:]
        orders = [self.masking_order(path, sides)[0] for path in range(self.paths)]
        fill = torch.tensor(encoder.preprocess.mean, device=encoder.device).view(1, 3, 1, 1)
        steps = torch.arange(self.steps + 1, device=encoder.device).view(1, -1, 1, 1, 1)
        parts = []
        for batch in pairs.batches(max(1, IMAGES_AT_ONCE // (self.steps + 1))):
            x = (batch.images.to(encoder.device).float() / 255)[:, None]
            gaps = []
            for order in orders:
                step_of = order.to(encoder.device)
                masked = (step_of > 0) & (step_of <= steps)  # (1, T, 1, H, W)
                z = encoder.encode_images(torch.where(masked, fill, x).flatten(0, 1))
                z = z.unflatten(0, (len(batch), -1))  # (B, T, D)
                gaps.append(gaps_along_path(1 - z @ z.transpose(1, 2)))
            parts.append(torch.stack(gaps, 1))
            count(len(batch))
        return torch.cat(parts)


def gaps_along_path(distance: Tensor) -> Tensor:
    """The distance of the nearest two points before and after each step of a path.

    distance: (B, T, T), among the points. -> (B, T - 1).
    """
    # the minimum over the rows up to t (downwards) and the columns from t + 1 (from the right)
    nearest = distance.cummin(1).values.flip(2).cummin(2).values.flip(2)
    return nearest.diagonal(1, 1, 2)
