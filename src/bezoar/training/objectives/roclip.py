"""RoCLIP: in every K-th epoch an image is compared with the nearest caption of a bank (Yang et al.,
NeurIPS 2023).
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from bezoar.encoders.encoder import Encoder
from bezoar.registry import method
from bezoar.training import contrastive
from bezoar.training.augmentation import Chance
from bezoar.training.collectives import gather
from bezoar.training.contrastive import ViewLoss, clip_loss
from bezoar.training.loop import TrainingData, require

# Batches in the bank, as published (21,845 captions in batches of 512). In a smaller bank many
# images share a caption.
LEAST_BATCHES = 40


class Loss(ViewLoss):
    """CLIP's loss of views; in matching epochs, of images and the captions nearest to them.

    All buffers are in the state dict, and the same on every rank.

    Attributes:
        bank: int64 (K, L), tokens of the captions seen last, in a ring.
        vectors: float32 (K, D), as the text tower gave them then.
        position: of the oldest row of both.
        step: how many steps were taken.
    """

    bank: Tensor
    vectors: Tensor
    position: Tensor
    step: Tensor

    def __init__(self, encoder: Encoder, recipe: Roclip) -> None:
        super().__init__(encoder, recipe)
        self.recipe = recipe
        self.epoch_steps = 0
        for name in ("position", "step"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long, device=encoder.device))

    def begin(self, data: TrainingData, tokens: Tensor) -> Tensor:
        """Make the bank: the first records, a share of all, `LEAST_BATCHES` batches at least."""
        n, batch = len(data), self.recipe.batch
        self.epoch_steps = n // batch
        size = min(n, max(LEAST_BATCHES * batch, round(self.recipe.bank * n)))
        self.register_buffer("bank", tokens[:size].clone())
        self.register_buffer("vectors", self.encode_as_is(self.bank))
        return tokens

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """The loss of a batch; see `Objective`."""
        z = self.encoder.encode_images(self.view_images(images, chance))
        epoch = int(self.step) // self.epoch_steps + 1
        if self.training and epoch % self.recipe.every == 0:
            current = self.encode_as_is(tokens)
            nearest = (z.detach() @ self.vectors.T).argmax(1)  # (B,)
            w = self.encoder.encode_tokens(self.bank[nearest])
        else:
            w = self.encoder.encode_tokens(self.view_captions(tokens, chance))
            current = self.encode_as_is(tokens) if self.recipe.words else w
        loss = clip_loss(z, w, self.scale, chance)
        if self.training:
            self.enqueue(gather(tokens), gather(current.detach()))
            self.step += 1
        return loss

    @torch.no_grad()
    def encode_as_is(self, tokens: Tensor) -> Tensor:
        """float32 (B, D), unit rows: captions without another view, and without gradient."""
        return self.encoder.encode_tokens(tokens)

    @torch.no_grad()
    def enqueue(self, tokens: Tensor, vectors: Tensor) -> None:
        """Write captions int64 (n, L) and their vectors (n, D), n <= K, over the oldest."""
        rows = (self.position + torch.arange(len(tokens), device=tokens.device)) % len(self.bank)
        self.bank[rows], self.vectors[rows] = tokens, vectors
        self.position.add_(len(tokens)).remainder_(len(self.bank))


@method
class Roclip:
    """Training on suspect data: the caption nearest to a poisoned image is seldom the attacker's.

    Published: learning rate 5e-5, batch 512, 24 epochs on a million pairs, every 2nd epoch, a bank
    of 2 % of the data. The published code compares images with the vectors of the bank in a
    matching epoch, which carry no gradient, so that the text tower stands still. Here it reads the
    captions that were found as it is now.
    """

    epochs: Annotated[int, "passes over the data"] = 8
    batch: Annotated[int, "pairs a step; the negatives of each other"] = 128
    lr: Annotated[float, "highest learning rate"] = 2e-3
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms, temperature)"] = 0.1
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    temperature: Annotated[float, "at the start"] = 0.07
    every: Annotated[int, "which epochs match: the 2nd, 4th, ..."] = 2
    bank: Annotated[
        float, "captions of the bank, as a share of the records; 40 batches at least"
    ] = 0.02
    crop: Annotated[float, "views: least share of the image's area that a crop keeps"] = 0.5
    flip: Annotated[float, "views: share of them mirrored"] = 0.0
    jitter: Annotated[float, "views: share of them whose colours change"] = 0.0
    gray: Annotated[float, "views: share of them without colours"] = 0.0
    words: Annotated[
        float, "views of captions: share of the words that change; 0: captions as they are"
    ] = 0.1

    def __post_init__(self) -> None:
        contrastive.check_view_recipe(self)
        require(self.every >= 1, "every >= 1")
        require(0 <= self.bank <= 1, "bank in 0..1")

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss, which owns the encoder, the temperature and the bank."""
        return Loss(encoder, self)
