"""RoCLIP: every K-th epoch each caption gives way to the nearest of a bank of captions (Yang et al., NeurIPS 2023)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from bezoar.encoders.encoder import Encoder
from bezoar.registry import method
from bezoar.training import contrastive
from bezoar.training.augmentation import Chance
from bezoar.training.collectives import gather
from bezoar.training.contrastive import ViewedModule, symmetric

LEAST = 40  # batches in the bank, as published (21,845 captions, batches of 512): with few, many images share a caption


class Loss(ViewedModule):
    """CLIP's loss of views of images and captions; in matching epochs of images and the captions nearest to them.

    bank: int64 (K, L), tokens of the captions seen last, a ring whose oldest row is at `position`; vectors: float32 (K, D),
    as the text tower gave them then. `step` counts the steps. All are in the state dict, and the same on every rank.
    """

    bank: Tensor
    vectors: Tensor
    position: Tensor
    step: Tensor

    def __init__(self, encoder: Encoder, recipe: Roclip) -> None:
        super().__init__(encoder, recipe)
        self.recipe, self.each = recipe, 0
        self.register_buffer("position", torch.zeros((), dtype=torch.long, device=encoder.device))
        self.register_buffer("step", torch.zeros((), dtype=torch.long, device=encoder.device))

    def begin(self, data: Any, tokens: Tensor) -> Tensor:
        """Make room for the bank: a share of the records, `LEAST` batches at least. It begins with the first of them."""
        self.each = len(data) // self.recipe.batch
        size = min(len(data), max(LEAST * self.recipe.batch, round(self.recipe.bank * len(data))))
        self.register_buffer("bank", tokens[:size].clone())
        with torch.no_grad():
            self.register_buffer("vectors", self.encoder.encode_tokens(self.bank))
        return tokens

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """images uint8 (B, 3, H, W), tokens int64 (B, L) -> scalar loss of these rows against those of all ranks."""
        z = self.encoder.encode_images(self.seen(images, chance))
        matching = self.training and (int(self.step) // self.each + 1) % self.recipe.every == 0
        if not matching:
            w = self.encoder.encode_tokens(self.told(tokens, chance))
            own = w if not self.recipe.words else self.known(tokens)
        else:
            own, near = self.known(tokens), (z.detach() @ self.vectors.T).argmax(1)
            # compat: the text tower gets a gradient of zero in these epochs, as in the published code
            w = (
                self.vectors[near] + 0 * self.encoder.encode_tokens(tokens)
                if self.recipe.compat
                else self.encoder.encode_tokens(self.bank[near])
            )
        loss = symmetric(z, w, self.scale, chance)
        if self.training:
            self.enqueue(gather(tokens), gather(own.detach()))
            self.step += 1
        return loss

    @torch.no_grad()
    def known(self, tokens: Tensor) -> Tensor:
        """float32 (B, D), unit rows: the captions as they are."""
        return self.encoder.encode_tokens(tokens)

    @torch.no_grad()
    def enqueue(self, tokens: Tensor, vectors: Tensor) -> None:
        """Captions int64 (n, L) and their vectors (n, D), n <= K, over the oldest, in order."""
        at = (self.position + torch.arange(len(tokens), device=tokens.device)) % len(self.bank)
        self.bank[at], self.vectors[at] = tokens, vectors
        self.position.add_(len(tokens)).remainder_(len(self.bank))


@method
class Roclip:
    """To train with, on data that may be poisoned: a caption that fits nothing but a trigger is seldom the nearest one.

    Published: learning rate 5e-5, batch 512, 24 epochs on a million pairs, every 2nd epoch, a bank of 2 % of the data. There
    a matching epoch compares images with the vectors of the bank, which carry no gradient, and the plain term is multiplied
    by 0: the text tower stands still (`compat`). Here the captions that were found are read by the text tower as it is.
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
    compat: Annotated[
        bool, "the text tower stands still in matching epochs, as in the published code"
    ] = False
    crop: Annotated[float, "views: least share of the image's area that a crop keeps"] = 0.5
    flip: Annotated[float, "views: share of them mirrored"] = 0.0
    jitter: Annotated[float, "views: share of them whose colours change"] = 0.0
    gray: Annotated[float, "views: share of them without colours"] = 0.0
    words: Annotated[
        float, "views of captions: share of the words that change; 0: captions as they are"
    ] = 0.1

    def __post_init__(self) -> None:
        contrastive.check_views(self)
        if self.every < 1 or not 0 <= self.bank <= 1:
            raise ValueError("needs every >= 1, bank in 0..1")

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss as a module that owns the encoder, the temperature and the bank."""
        return Loss(encoder, self)
