"""SafeCLIP: CLIP on pairs that seem safe, views alone on the others (Yang et al., ICML 2024)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.registry import method
from bezoar.training import collectives, contrastive
from bezoar.training.augmentation import Chance
from bezoar.training.contrastive import ViewLoss, clip_loss, shift_to_float
from bezoar.training.loop import TrainingData, require

BATCH = 512  # pairs that are embedded at a time when all are split


class Loss(ViewLoss):
    """Three phases: `apart` epochs of views alone, one of CLIP's loss at a low rate, then both.

    In the last phase it is CLIP's loss for a batch's safe pairs and the views' loss for its risky
    ones. All buffers are in the state dict.

    Attributes:
        safe: bool (N,), which pairs are safe.
        first: share of the records that the mixture called safe.
        step: number of steps so far.
    """

    safe: Tensor
    first: Tensor
    step: Tensor

    def __init__(self, encoder: Encoder, recipe: Safeclip) -> None:
        super().__init__(encoder, recipe)
        self.recipe = recipe
        self.epoch_steps = 0
        self.register_buffer("first", torch.zeros((), dtype=torch.float64, device=encoder.device))
        self.register_buffer("step", torch.zeros((), dtype=torch.long, device=encoder.device))

    def begin(self, data: TrainingData, tokens: Tensor) -> Tensor:
        """Keep the records, which are split before every epoch of the last phase.

        Returns:
            tokens with each record's row as last column.
        """
        if collectives.rank_and_world()[1] > 1:
            raise UserError(
                "objective safeclip looks at all records after every epoch; start one process, not "
                "several ranks"
            )
        self.data, self.tokens = data, tokens
        self.epoch_steps = len(data) // self.recipe.batch
        self.register_buffer("safe", torch.zeros(len(data), dtype=torch.bool, device=tokens.device))
        return torch.cat([tokens, torch.arange(len(data), device=tokens.device)[:, None]], 1)

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """The loss of a batch; see `Objective`. The last of the tokens is the record's row."""
        tokens, rows = tokens[:, :-1], tokens[:, -1]
        epoch, i = divmod(int(self.step), self.epoch_steps)
        epochs_together = epoch - self.recipe.apart  # 0 in the one epoch of CLIP's loss
        if self.training and i == 0 and epochs_together > 0:
            self.split(epochs_together - 1)
        self.step += self.training
        if epochs_together < 0:
            return self.unimodal_loss(images, tokens, chance)
        if epochs_together == 0:
            return self.multimodal_loss(images, tokens, chance)
        safe = self.safe[rows]
        terms = [
            term(images[mask], tokens[mask], chance)
            for term, mask in ((self.multimodal_loss, safe), (self.unimodal_loss, ~safe))
            if int(mask.sum()) > 1  # a pair alone has no negatives
        ]
        return torch.stack(terms).sum()

    def multimodal_loss(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """CLIP's loss."""
        z = self.encoder.encode_images(shift_to_float(images, self.recipe.shift, chance))
        return clip_loss(z, self.encoder.encode_tokens(tokens), self.scale, chance)

    def split(self, epochs: int) -> None:
        """Decide which records are safe, by the cosines of the present encoder.

        At first, these are the records of which the mixture is `sure`, and at least a share of
        `least`; later the share grows by `more` an epoch, up to `most`. The records with the
        highest cosines are safe.

        Args:
            epochs: number of epochs trained with the split so far.
        """
        recipe = self.recipe
        agreement = self.agreement()
        if epochs == 0:
            share = float((upper_component_probability(agreement) > recipe.sure).mean())
            self.first.fill_(max(recipe.least, share))
        first = float(self.first)
        share = min(max(recipe.most, first), first + epochs * recipe.more)
        count = max(2, round(share * len(agreement)))
        best = agreement.argsort(descending=True, stable=True)[:count]
        self.safe.zero_()
        self.safe[best.to(self.safe.device)] = True

    @torch.no_grad()
    def agreement(self) -> Tensor:
        """Cosines of all pairs without augmentation, float32 (N,), on the CPU."""
        mode = self.training
        self.eval()
        cosines = []
        every_row = torch.arange(len(self.data), device=self.tokens.device)
        for rows in torch.split(every_row, BATCH):
            z = self.encoder.encode_images(self.data.images[rows])
            cosines.append((z * self.encoder.encode_tokens(self.tokens[rows])).sum(1))
        self.train(mode)
        return torch.cat(cosines).cpu()


def upper_component_probability(values: Tensor) -> np.ndarray:
    """P(upper component | value) of a mixture of two Gaussians, float64 (N,)."""
    x = values.double().numpy()[:, None]
    start = np.quantile(x, [0.25, 0.75])[:, None]
    mixture = GaussianMixture(2, means_init=start, random_state=0, max_iter=1000).fit(x)
    probability: np.ndarray = mixture.predict_proba(x)[:, int(mixture.means_[:, 0].argmax())]
    return probability


@method
class Safeclip:
    """To train with, on suspect data: pairs that the towers bring together by themselves are safe.

    Published, for a million pairs: 5 epochs apart, one epoch together at 5e-6, safe where P > 0.9,
    then 1 % more an epoch up to 85 %, 32 epochs at 5e-4, batch 128; a bank of nearest neighbours as
    further positives, which is left out here. In few steps the two towers do not meet at 5e-6, so
    `together` is higher.
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
    more: Annotated[float, "growth of the safe share of the records in each epoch"] = 0.01
    most: Annotated[float, "largest safe share of the records"] = 0.85
    shift: Annotated[int, "augmentation of CLIP's loss: images moved by up to this many pixels"] = 2
    crop: Annotated[float, "views: least share of the image's area that a crop keeps"] = 0.5
    flip: Annotated[float, "views: share of them mirrored"] = 0.5
    jitter: Annotated[float, "views: share of them whose colours change"] = 0.8
    gray: Annotated[float, "views: share of them without colours"] = 0.2
    words: Annotated[float, "views of captions: share of the words that change"] = 0.1

    def __post_init__(self) -> None:
        contrastive.check_view_recipe(self)
        require(
            self.batch >= 3,
            "batch >= 3: of two pairs, a safe and a risky one, neither has any negatives",
        )
        require(0 <= self.apart < self.epochs - 1, "apart >= 0, epochs of at least apart + 2")
        require(self.together > 0, "together > 0")
        shares = (self.sure, self.least, self.more)
        require(all(0 <= share <= 1 for share in shares), "sure, least and more in 0..1")
        require(0 < self.most <= 1, "most in 0..1 and above 0")

    def rates(self, step: int, steps: int) -> float:
        """The factor on the learning rate: low in the one epoch after those apart."""
        return self.together / self.lr if self.epochs * step // steps == self.apart else 1.0

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss, which owns the encoder and the temperature."""
        return Loss(encoder, self)
