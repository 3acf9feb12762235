"""BackdoorIDS: mask an image bit by bit; with a trigger its embedding jumps when the trigger goes (arXiv 2603.11664)."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

LEAST = 20  # clean images that a mean and a deviation are taken of
FLOOR = 1e-3  # cosine distance below which a spread among clean images is no measure
AT_ONCE = 1024  # images through the encoder


@method
class MaskingPath:
    """Label-free, for any encoder. The published test clusters the embeddings along the path by DBSCAN: two clusters, a
    backdoor. With single points as cores, a path falls in two at a step exactly if its parts before and after lie
    farther apart than DBSCAN's radius. Our radius is calibrated for each step, because clean images move too: the score
    is the largest gap in clean standard deviations above the clean mean, that is the largest such radius that still
    tells two clusters. The order in which cells are masked, and our own figures, are not the paper's.

    A high score says that one window matters unusually much. A foreign patch does so on a clean encoder too, though less:
    there its gaps were about a tenth of those of a backdoor. It is a warning of the input, no evidence against the encoder.
    """

    cells: Annotated[
        int, "of the grid, a side; a cell should hold the trigger: 4 on 32 px are 8 px"
    ] = 4
    share: Annotated[float, "of the cells that are masked in the end"] = 0.75
    paths: Annotated[
        int,
        "orders in which cells are masked, each with the grid shifted; the largest gap of all counts",
    ] = 4
    seed: Annotated[int, "of the orders, the same for all images"] = 0

    needs: ClassVar[tuple[str, ...]] = ("clean", "report")

    def __call__(
        self,
        encoder: Encoder,
        images: Pairs,
        clean: Pairs,
        report: Callable[[int, int, str], Any] | None = None,
    ) -> Scores:
        """-> Scores with a box a record, the cell whose masking made the gap. Raises UserError for too few clean images."""
        if len(clean) < LEAST:
            raise UserError(
                f"masking_path needs at least {LEAST} clean images; there are {len(clean)}"
            )
        total, done = len(images) + len(clean), 0

        def told(n: int) -> None:
            nonlocal done
            done += n
            if report is not None:
                report(done, total, "paths")

        orders = [self.order(k, images.images.shape[-2:]) for k in range(self.paths)]
        known = self.gaps(
            encoder,
            clean,
            [self.order(k, clean.images.shape[-2:])[0] for k in range(self.paths)],
            told,
        )
        mean, spread = known.mean(0), known.std(0).clamp(min=FLOOR)
        found = (self.gaps(encoder, images, [rank for rank, _ in orders], told) - mean) / spread
        value, place = found.flatten(1).max(1)
        boxes = torch.cat([boxes for _, boxes in orders]).to(place.device)[place]
        notes = {"clean": len(clean), "steps": self.steps, "clean_gap": float(mean.mean())}
        return Scores(images.ids, value.cpu(), boxes.cpu(), notes)

    @property
    def steps(self) -> int:
        """Cells masked along a path, one a step."""
        return max(1, round(self.share * (self.cells + 1) ** 2))

    def order(self, path: int, sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """-> at which step each pixel goes, int64 (H, W), from 1; the cell of each step, int64 (steps, 4) as boxes.

        The grid is shifted by a part of a cell, so that what one path cuts in two another keeps whole. Cells that lie
        outside the image come last.
        """
        draw = generator(self.seed, path)
        shift = torch.rand(2, generator=draw)
        edges = [self._edges(side, float(at)) for side, at in zip(sides, shift, strict=True)]
        (top, bottom), (left, right) = edges
        boxes = torch.tensor(
            [
                (t, x, b - t, y - x)
                for t, b in zip(top, bottom, strict=True)
                for x, y in zip(left, right, strict=True)
            ]
        )
        chance = torch.rand(len(boxes), generator=draw) + (boxes[:, 2:].amin(1) < 1) * 2.0
        boxes = boxes[chance.argsort()]
        rank = torch.zeros(*sides, dtype=torch.int64)
        for step, (t, x, height, width) in enumerate(boxes.tolist(), 1):
            rank[t : t + height, x : x + width] = step
        return rank, boxes[: self.steps]

    def _edges(self, side: int, shift: float) -> tuple[list[int], list[int]]:
        cuts = [
            min(side, max(0, round((i - shift) * side / self.cells))) for i in range(self.cells + 2)
        ]
        return cuts[:-1], cuts[1:]

    @torch.inference_mode()
    def gaps(
        self, encoder: Encoder, pairs: Pairs, ranks: list[Tensor], told: Callable[[int], None]
    ) -> Tensor:
        """float32 (N, paths, steps): cosine distance of the nearest two embeddings on either side of each step."""
        encoder.eval()
        fill = torch.tensor(encoder.preprocess.mean, device=encoder.device).view(1, 3, 1, 1)
        steps = torch.arange(self.steps + 1, device=encoder.device).view(1, -1, 1, 1, 1)
        every = []
        for part in pairs.batches(max(1, AT_ONCE // (self.steps + 1))):
            x = (part.images.to(encoder.device).float() / 255)[:, None]
            found = []
            for rank in ranks:
                masked = rank.to(encoder.device)
                gone = (masked > 0) & (masked <= steps)
                z = encoder.encode_images(torch.where(gone, fill, x).flatten(0, 1)).unflatten(
                    0, (len(part), -1)
                )
                found.append(separation(1 - z @ z.transpose(1, 2)))
            every.append(torch.stack(found, 1))
            told(len(part))
        return torch.cat(every)

    def __post_init__(self) -> None:
        if self.cells < 1 or self.paths < 1 or not 0 < self.share < 1:
            raise ValueError("needs cells >= 1, paths >= 1, share inside (0, 1)")


def separation(distance: Tensor) -> Tensor:
    """(B, T, T) distances among the points of a path -> (B, T - 1): before and after each step, those of the nearest two."""
    # over the rows up to t (downwards) and the columns from t + 1 (from the right)
    nearest = distance.cummin(1).values.flip(2).cummin(2).values.flip(2)
    return nearest.diagonal(1, 1, 2)
