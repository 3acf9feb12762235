"""Cognitive distillation: how little of an image makes its embedding (Huang et al., ICLR 2023)?

A trigger makes the embedding by itself, so that the mask of what has to be kept is small. Needs the encoder that was trained
on the suspect data; the most expensive detector by far, three forward passes a step and record. On four backdoors that had
taken (50 poisons, 150 clean scenes, 60 steps) the published weights gave an AUROC of 0.977, and smaller ones (gamma to 1/13,
beta to 1/4000) 0.973 to 0.984; on one of 0.2 % (40 poisons, 400 clean) both too small by 128 gave 0.57.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from bezoar.data.randomness import draws
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

CELLS = {
    "cpu": 1 << 19,
    "cuda": 1 << 25,
}  # pixel values of one batch; its gradients take some hundred times as much


@method
class CognitiveDistillation:
    """Score = -||m||_1 / (H W) of the mask m that minimises |f(x) - f(m x + (1 - m) c)|_1 + gamma ||m||_1 + beta TV(m).

    m = (tanh(w) + 1) / 2 with w = 1 at the start, a number a pixel; c: a random colour, another one at each step; TV: the
    sum of squared differences of neighbouring pixels over H W. The change of the vector is its mean over the D numbers: so
    gamma and beta have the size that was published for CLIP (0.01 and 1 elsewhere). Adam, betas 0.1.
    """

    steps: Annotated[int, "of the minimisation; each is a forward and a backward pass"] = 100
    gamma: Annotated[float, "weight of the mask's size"] = 1e-3
    beta: Annotated[float, "weight of the mask's roughness"] = 100.0
    lr: Annotated[float, "step size"] = 0.1
    seed: Annotated[int, "of the colours"] = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or min(self.gamma, self.beta) < 0:
            raise ValueError("needs steps >= 1, lr > 0, gamma >= 0, beta >= 0")

    def passes(self, n: int) -> int:
        """How many images a scan of n records puts through the encoder."""
        return n * (self.steps + 1)

    def __call__(self, encoder: Any, source: Any) -> Scores:
        """-> Scores in [-1, 0]; a small mask is suspicious."""
        ids: list[str] = []
        found: list[Tensor] = []
        first = next(iter(source.batches(1)))
        size = max(1, CELLS[encoder.device.type] // first.images[0].numel())
        for part in source.batches(size):
            ids += part.ids
            c = torch.from_numpy(draws(self.seed, part.ids, 3 * self.steps, "distillation")).float()
            # always batches of one size: a product's rounding may depend on it, and 100 steps would make much of that
            rows = torch.arange(size).clamp(max=len(part) - 1)
            mask = self.masks(encoder, part.images[rows], c[rows].view(size, self.steps, 3))
            found.append(-mask[: len(part)].mean((1, 2)).cpu())
        return Scores(tuple(ids), torch.cat(found))

    def masks(self, encoder: Any, images: Tensor, colours: Tensor) -> Tensor:
        """images: uint8 (B, 3, H, W). colours: float 0..1 (B, steps, 3). -> masks in 0..1, float32 (B, H, W)."""
        x = images.to(encoder.device).float() / 255
        colours = colours.to(x.device)[..., None, None]
        with torch.no_grad():
            whole = encoder.encode_images(x)
        w = torch.ones(len(x), 1, *x.shape[2:], device=x.device, requires_grad=True)
        adam = torch.optim.Adam([w], lr=self.lr, betas=(0.1, 0.1))
        for step in range(self.steps):
            m = (w.tanh() + 1) / 2
            change = (
                (encoder.encode_images(torch.lerp(colours[:, step], x, m)) - whole)
                .abs()
                .mean(1)
                .sum()
            )
            size, rough = m.sum(), m.diff(dim=2).square().sum() + m.diff(dim=3).square().sum()
            loss = change + self.gamma * size + self.beta * rough / m[0].numel()
            (w.grad,) = torch.autograd.grad(loss, w)
            adam.step()
        return ((w.detach().tanh() + 1) / 2)[:, 0]
