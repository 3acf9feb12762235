"""SafeCLIP: CLIP on the pairs that seem safe, image and text apart on the others (Yang, Gan, Mirzasoleiman, ICML 2024)."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.registry import method
from bezoar.training import collectives, contrastive
from bezoar.training.augmentation import Chance
from bezoar.training.contrastive import ViewedModule, moved, symmetric

BATCH = 512  # pairs looked at together when all are split


class Loss(ViewedModule):
    """Three phases: `apart` epochs of views alone, one epoch of CLIP's loss at a low rate, then CLIP's loss of a batch's
    safe pairs and the views' loss of its risky ones.

    safe: bool (N,). first: share of the records that the mixture called safe. step counts. All are in the state dict.
    """

    safe: Tensor
    first: Tensor
    step: Tensor

    def __init__(self, encoder: Encoder, recipe: Safeclip) -> None:
        super().__init__(encoder, recipe)
        self.recipe, self.each = recipe, 0
        self.register_buffer("first", torch.zeros((), dtype=torch.float64, device=encoder.device))
        self.register_buffer("step", torch.zeros((), dtype=torch.long, device=encoder.device))

    def begin(self, data: Any, tokens: Tensor) -> Tensor:
        """Keep the records at hand, for they are split epoch by epoch. -> tokens with the record's row as last column."""
        if collectives.rank_and_world()[1] > 1:
            raise UserError(
                "objective safeclip looks at all records after every epoch; start one process, not several ranks"
            )
        self.data, self.tokens, self.each = data, tokens, len(data) // self.recipe.batch
        self.register_buffer("safe", torch.zeros(len(data), dtype=torch.bool, device=tokens.device))
        return torch.cat([tokens, torch.arange(len(data), device=tokens.device)[:, None]], 1)

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """images uint8 (B, 3, H, W), tokens int64 (B, L + 1), the last one the record's row -> scalar loss."""
        tokens, rows = tokens[:, :-1], tokens[:, -1]
        epoch, at = divmod(int(self.step), self.each)
        together = epoch - self.recipe.apart  # 0: the one epoch of CLIP's loss
        if self.training and at == 0 and together > 0:
            self.split(together - 1)
        self.step += self.training
        if together < 0:
            return self.apart(images, tokens, chance)
        if together == 0:
            return self.clip(images, tokens, chance)
        safe = self.safe[rows]
        parts = [(self.clip, safe), (self.apart, ~safe)]
        # a pair by itself has nobody to be told from
        terms = [
            term(images[own], tokens[own], chance) for term, own in parts if int(own.sum()) > 1
        ]
        return torch.stack(terms).sum()

    def clip(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """CLIP's loss."""
        z = self.encoder.encode_images(moved(images, self.recipe.shift, chance))
        return symmetric(z, self.encoder.encode_tokens(tokens), self.scale, chance)

    def split(self, epochs: int) -> None:
        """Which records are safe, from the encoder as it stands; `epochs`: trained on the split so far.

        At first where the mixture says so with `sure`, but `least` of them; later the same share, and `more` an epoch: those
        that agree best.
        """
        agreement = self.agreement()
        if epochs == 0:
            self.first.fill_(
                max(self.recipe.least, float((likely(agreement) > self.recipe.sure).mean()))
            )
        share = min(
            max(self.recipe.most, float(self.first)), float(self.first) + epochs * self.recipe.more
        )
        best = agreement.argsort(descending=True, stable=True)[
            : max(2, round(share * len(agreement)))
        ]
        self.safe.zero_()
        self.safe[best.to(self.safe.device)] = True

    @torch.no_grad()
    def agreement(self) -> Tensor:
        """Cosines of all pairs as they are, float32 (N,), on the CPU."""
        mode = self.training
        self.eval()
        rows = torch.arange(len(self.data), device=self.tokens.device).split(BATCH)
        parts = [
            (
                self.encoder.encode_images(self.data.images[r])
                * self.encoder.encode_tokens(self.tokens[r])
            ).sum(1)
            for r in rows
        ]
        self.train(mode)
        return torch.cat(parts).cpu()


def likely(values: Tensor) -> np.ndarray:
    """P(higher component | value) of a mixture of two Gaussians, float64 (N,), fitted from the values' quartiles."""
    from sklearn.mixture import GaussianMixture

    x = values.double().numpy()[:, None]
    start = np.quantile(x, [0.25, 0.75])[:, None]
    found = GaussianMixture(2, means_init=start, random_state=0, max_iter=1000).fit(x)
    return found.predict_proba(x)[:, int(found.means_[:, 0].argmax())]


@method
class Safeclip:
    """To train with, on data that may be poisoned: pairs that the two towers bring together by themselves are safe.

    Published, for a million pairs: 5 epochs apart, one epoch together at 5e-6, safe where P > 0.9, then 1 % more an epoch
    up to 85 %, 32 epochs at 5e-4, batch 128; a bank of nearest neighbours as further positives, which is left out here. In
    few steps the two towers do not meet at 5e-6, so `together` is higher.
    """

    epochs: Annotated[int, "passes over the data, all phases"] = 14
    apart: Annotated[int, "of these, the first ones, image and text apart from each other"] = 5
    batch: Annotated[int, "pairs a step"] = 128
    lr: Annotated[float, "highest learning rate"] = 2e-3
    together: Annotated[float, "learning rate of the one epoch with CLIP's loss for all"] = 5e-4
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms, temperature)"] = 0.1
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    temperature: Annotated[float, "at the start"] = 0.07
    sure: Annotated[float, "a pair is safe where the mixture's upper component has this chance"] = (
        0.9
    )
    least: Annotated[
        float,
        "share of the records that are called safe at first, at least; the paper's rule alone: 0",
    ] = 0.2
    more: Annotated[float, "share of the records by which the safe ones grow each epoch"] = 0.01
    most: Annotated[float, "share of the records that they grow to, at most"] = 0.85
    shift: Annotated[int, "augmentation of CLIP's loss: images moved by up to this many pixels"] = 2
    crop: Annotated[float, "views: least share of the image's area that a crop keeps"] = 0.5
    flip: Annotated[float, "views: share of them mirrored"] = 0.5
    jitter: Annotated[float, "views: share of them whose colours change"] = 0.8
    gray: Annotated[float, "views: share of them without colours"] = 0.2
    words: Annotated[float, "views of captions: share of the words that change"] = 0.1

    def __post_init__(self) -> None:
        contrastive.check_views(self)
        if self.batch < 3:
            raise ValueError(
                "needs batch >= 3: of two pairs, a safe and a risky one, neither has another to be told from"
            )
        if not 0 <= self.apart < self.epochs - 1 or self.together <= 0:
            raise ValueError("needs apart >= 0, epochs of at least apart + 2, together > 0")
        if not (
            0 <= self.sure <= 1
            and 0 <= self.least <= 1
            and 0 <= self.more <= 1
            and 0 < self.most <= 1
        ):
            raise ValueError("needs sure, least and more in 0..1, most in 0..1 and above 0")

    def rates(self, step: int, steps: int) -> float:
        """The factor on the learning rate: low in the one epoch after those apart."""
        return self.together / self.lr if self.epochs * step // steps == self.apart else 1.0

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss as a module that owns the encoder and the temperature."""
        return Loss(encoder, self)
