"""Cognitive distillation: how little of an image makes its embedding (Huang et al., ICLR 2023)?

A trigger makes the embedding by itself, so that the mask of what has to be kept is small. Needs the
encoder that was trained on the suspect data; the most expensive detector by far, three forward
passes a step and record. On four backdoors that had taken (50 poisons, 150 clean scenes, 60 steps)
the published weights gave an AUROC of 0.977, and smaller ones (gamma to 1/13, beta to 1/4000) 0.973
to 0.984; on one of 0.2 % (40 poisons, 400 clean) both too small by 128 gave 0.57.
"""

from typing import Annotated

import torch
from torch import Tensor

from bezoar.data.randomness import draws
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

# pixel values of one batch; the gradients take some hundred times as much memory
BATCH_VALUES = {"cpu": 1 << 19, "cuda": 1 << 25}


@method
class CognitiveDistillation:
    """Score = -||m||_1 / (H W) of the mask m that minimises |f(x) - f(m x + (1 - m) c)|_1 + gamma
    ||m||_1 + beta TV(m).

    m = (tanh(w) + 1) / 2 with w = 1 at the start, a number a pixel; c: a random colour, another one
    at each step; TV: the sum of squared differences of neighbouring pixels over H W. The change of
    the vector is its mean over the D numbers: so gamma and beta have the size that was published
    for CLIP (0.01 and 1 elsewhere). Adam, betas 0.1.
    """

    steps: Annotated[int, "steps of the minimisation, each a forward and a backward pass"] = 100
    gamma: Annotated[float, "weight of the mask's size"] = 1e-3
    beta: Annotated[float, "weight of the mask's roughness"] = 100.0
    lr: Annotated[float, "step size"] = 0.1
    seed: Annotated[int, "seed of the random colours"] = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or min(self.gamma, self.beta) < 0:
            raise ValueError("needs steps >= 1, lr > 0, gamma >= 0, beta >= 0")

    def passes(self, n: int) -> int:
        """Return how many images a scan of n records puts through the encoder."""
        return n * (self.steps + 1)

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores in [-1, 0]; a small mask is suspicious."""
        ids: list[str] = []
        values: list[Tensor] = []
        first = next(iter(source.batches(1)))
        size = max(1, BATCH_VALUES[encoder.device.type] // first.images[0].numel())
        for batch in source.batches(size):
            ids += batch.ids
            uniform = draws(self.seed, batch.ids, 3 * self.steps, "distillation")
            colours = torch.from_numpy(uniform).float().view(-1, self.steps, 3)
            # every batch has one size: the rounding of a product may depend on it, and 100 steps
            # would amplify that
            rows = torch.arange(size).clamp(max=len(batch) - 1)
            masks = self.minimal_masks(encoder, batch.images[rows], colours[rows])
            values.append(-masks[: len(batch)].mean((1, 2)).cpu())
        return Scores(tuple(ids), torch.cat(values))

    def minimal_masks(self, encoder: RecordEncoder, images: Tensor, colours: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) and colours in 0..1 (B, steps, 3) -> masks in 0..1 (B, H, W)."""
        x = images.to(encoder.device).float() / 255
        colours = colours.to(x.device)[..., None, None]
        with torch.no_grad():
            whole = encoder.encode_images(x)
        w = torch.ones(len(x), 1, *x.shape[2:], device=x.device, requires_grad=True)
        adam = torch.optim.Adam([w], lr=self.lr, betas=(0.1, 0.1))
        for step in range(self.steps):
            m = (w.tanh() + 1) / 2
            masked = encoder.encode_images(torch.lerp(colours[:, step], x, m))
            change = (masked - whole).abs().mean(1).sum()
            roughness = m.diff(dim=2).square().sum() + m.diff(dim=3).square().sum()
            loss = change + self.gamma * m.sum() + self.beta * roughness / m[0].numel()
            (w.grad,) = torch.autograd.grad(loss, w)
            adam.step()
        return ((w.detach().tanh() + 1) / 2)[:, 0]
