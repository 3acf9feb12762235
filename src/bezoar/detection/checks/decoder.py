"""DeDe: draw each image from its vector; with a trigger the drawing shows something else (Hou, Li,
Yao 2025, CVPR).
"""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.data.blocks import blocks
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.encoders.encoder import Encoder, embed_records
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

MIN_CLEAN = 50  # clean images to learn to draw from
SIDE = 32  # pixels of the drawings' sides; a multiple of CELL and of 8
CELL = 4  # pixels of the sides of what is hidden at once
BATCH = 64
DRAWN_AT_ONCE = 1024
RATE = 1e-3
DECAY = 1e-6


class Drawer(nn.Module):
    """Draws images (B, 3, SIDE, SIDE) from their vectors and from what of them is visible."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.corners = (4 * width, SIDE // 8, SIDE // 8)
        self.look = nn.Sequential(
            *(nn.Conv2d(4, width, 4, 2, 1), nn.GELU()),
            *(nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GELU()),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
        )
        self.read = nn.Linear(dim, 4 * width * (SIDE // 8) ** 2)
        self.draw = nn.Sequential(
            *(nn.GELU(), nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1)),
            *(nn.GELU(), nn.ConvTranspose2d(2 * width, width, 4, 2, 1)),
            *(nn.GELU(), nn.ConvTranspose2d(width, 3, 4, 2, 1)),
        )

    def forward(self, images: Tensor, hidden: Tensor, vectors: Tensor) -> Tensor:
        """images: (B, 3, SIDE, SIDE). hidden: bool, 1 or B x 1 x SIDE x SIDE. vectors: (B, D)."""
        hidden = hidden.expand(len(images), -1, -1, -1)
        visible = torch.cat([images.masked_fill(hidden, 0), hidden.float()], 1)  # (B, 4, S, S)
        drawing: Tensor = self.draw(
            self.look(visible) + self.read(vectors).unflatten(1, self.corners)
        )
        return drawing


@method
class Decoder:
    """Score: the mean squared difference of an image, from 0 to 1, and its drawing where it was
    hidden.

    A network learns to draw clean images from the encoder's vectors and a tenth of their cells. The
    vector of an input with a trigger is that of the target, and so is the drawing. The paper's
    shares of hidden cells, optimiser and score; its network is a masked autoencoder of transformer
    blocks, ours a small convolutional one. Images are drawn at 32 px, whatever their size: the
    paper's own figures are of 32 and 64 px.
    """

    steps: Annotated[int, "of training, 64 clean images each"] = 1000
    width: Annotated[int, "channels of the first convolution"] = 16
    train_hidden: Annotated[float, "share of the cells that are hidden in training"] = 0.9
    test_hidden: Annotated[float, "share of them in the inputs that are checked"] = 0.99
    seed: Annotated[int, "seed of the weights, batches and hidden cells"] = 0

    needs: ClassVar[tuple[str, ...]] = ("clean", "report")

    def __post_init__(self) -> None:
        shares = self.train_hidden, self.test_hidden
        if not 1 <= self.steps <= 1_000_000 or not 1 <= self.width <= 1024:
            raise ValueError("needs steps in 1..1000000 and width in 1..1024")
        if not all(0 < share < 1 for share in shares):
            raise ValueError(f"shares of hidden cells lie inside (0, 1); got {shares}")

    def __call__(
        self, encoder: Encoder, images: Pairs, clean: Pairs, report: ProgressReport = no_report
    ) -> Scores:
        """-> Scores. Raises UserError for too few clean images."""
        if len(clean) < MIN_CLEAN:
            raise UserError(
                f"decoder needs at least {MIN_CLEAN} clean images to learn from; there are "
                f"{len(clean)}"
            )
        network = self.train(encoder, clean, report)
        hidden = hide_cells(1, self.test_hidden, generator(self.seed, self.steps))
        values = []
        for rows in blocks(len(images), DRAWN_AT_ONCE):
            part = images.take(range(rows.start, rows.stop))
            x, vectors = reduce_images(part.images), embed_records(encoder, part)
            with torch.no_grad():
                values.append(self.measure_errors(network, x, hidden, vectors))
        return Scores(images.ids, torch.cat(values).cpu(), notes={"clean": len(clean)})

    def train(self, encoder: Encoder, clean: Pairs, report: ProgressReport) -> Drawer:
        """Train on the clean images by AdamW."""
        x, vectors = reduce_images(clean.images), embed_records(encoder, clean)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = Drawer(vectors.shape[1], self.width).to(vectors.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
        for step in range(self.steps):
            draw = generator(self.seed, step)
            rows = torch.randint(len(x), (BATCH,), generator=draw)
            hidden = hide_cells(BATCH, self.train_hidden, draw)
            batch = vectors[rows.to(vectors.device)]
            loss = self.measure_errors(network, x[rows], hidden, batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report(step + 1, self.steps, "steps")
        return network

    @staticmethod
    def measure_errors(network: Drawer, x: Tensor, hidden: Tensor, vectors: Tensor) -> Tensor:
        """The mean squared error of the drawings where the images are hidden: (B,)."""
        x, hidden = x.to(vectors.device), hidden.to(vectors.device)
        error = (network(x, hidden, vectors) - x).square().mean(1, keepdim=True)  # (B, 1, S, S)
        errors: Tensor = (error * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3)).clamp(min=1)
        return errors


def hide_cells(count: int, share: float, draw: torch.Generator) -> Tensor:
    """Hide each cell of images with the probability `share`: bool (count, 1, SIDE, SIDE)."""
    cells = torch.rand(count, 1, SIDE // CELL, SIDE // CELL, generator=draw) < share
    return cells.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)


def reduce_images(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> float (N, 3, SIDE, SIDE), 0..1."""
    x = images.float() / 255
    return x if x.shape[-2:] == (SIDE, SIDE) else F.interpolate(x, (SIDE, SIDE), mode="area")
