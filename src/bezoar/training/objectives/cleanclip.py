"""CleanCLIP: CLIP, and InfoNCE between views within each modality (Bansal et al., ICCV 2023).

A CLIP that is trained so from the start is the victim on which CleanCLIP fails as a repair
(arXiv 2311.14948).
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from bezoar.encoders.encoder import Encoder
from bezoar.registry import method
from bezoar.training import contrastive
from bezoar.training.augmentation import Chance
from bezoar.training.contrastive import (
    InitialEncoder,
    ViewLoss,
    clip_loss,
    info_nce,
    shift_to_float,
)
from bezoar.training.loop import require
from bezoar.training.universal_triggers import UniversalTriggers


class Loss(ViewLoss):
    """L_CLIP(I, T) + weight / 2 [ InfoNCE(I, I~) + InfoNCE(T, T~) ], with one learnt temperature.

    InfoNCE goes in one direction, from the original to the views, as in the published code. I and
    I~ are one batch to the tower. With an anchor, the loss has a further term anchor [ mean 1 -
    cos(f(I), f_0(I)) + mean 1 - cos(g(T), g_0(T)) ], where f_0 and g_0 are the towers at the start.
    With adversarial triggers, half of I~ are the images themselves with such a trigger.
    """

    def __init__(self, encoder: Encoder, recipe: Cleanclip) -> None:
        super().__init__(encoder, recipe)
        self.recipe = recipe
        self.initial = InitialEncoder(encoder) if recipe.anchor else None
        size = encoder.preprocess.size
        self.triggers = (
            UniversalTriggers(recipe.adversarial, size, size, encoder.device)
            if recipe.adversarial
            else None
        )

    def other_images(self, images: Tensor, x: Tensor, chance: Chance) -> Tensor:
        """I~: a view of each image, or of one half a view and of the other a stamped image."""
        if self.triggers is None:
            return self.view_images(images, chance)
        half = len(x) // 2
        stamped = self.triggers(self.encoder.resize(x[half:]), chance)
        return torch.cat([self.view_images(images[:half], chance), stamped])

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """The loss of a batch; see `Objective`."""
        x = shift_to_float(images, self.recipe.shift, chance)
        z, z2 = self.encode_together(x, self.other_images(images, x, chance))
        w = self.encoder.encode_tokens(tokens)
        w2 = self.encoder.encode_tokens(self.view_captions(tokens, chance))
        of_views = info_nce(z, z2, self.scale, chance) + info_nce(w, w2, self.scale, chance)
        loss = clip_loss(z, w, self.scale, chance) + self.recipe.weight * of_views / 2
        if self.initial is None:
            return loss
        z0, w0 = self.initial(x, tokens)
        distances = [1 - (now * then).sum(1).mean() for now, then in ((z, z0), (w, w0))]
        return loss + self.recipe.anchor * torch.stack(distances).sum()


@method
class Cleanclip:
    """To train with, or to repair with on clean pairs; no term makes use of a trigger.

    Published for repair: 100,000 clean pairs, 10 epochs, batch 64, learning rate 1e-5, 50 steps of
    warm-up, weight 1, and AutoAugment for I~, where here images are cropped and coloured. The
    learning rate must be found for each architecture.

    On few clean pairs a rate that removes the backdoor costs accuracy too. The anchor holds clean
    vectors and leaves triggered ones free: on 3,200 scenes it let a small CLIP keep its accuracy at
    a rate at which it had lost 2 points. Adversarial triggers are those of `universal_triggers`, in
    the sense of ABD (arXiv 2409.15968) and CleanerCLIP (2409.17601).
    """

    epochs: Annotated[int, "passes over the data"] = 10
    batch: Annotated[int, "pairs a step; the negatives of each other"] = 64
    lr: Annotated[float, "highest learning rate"] = 2e-3
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms, temperature)"] = 0.1
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    temperature: Annotated[float, "at the start"] = 0.07
    weight: Annotated[float, "lambda, the weight of the views' terms"] = 1.0
    anchor: Annotated[
        float, "weight of: clean pairs keep their vectors; to repair with, beyond the paper"
    ] = 0.0
    adversarial: Annotated[
        int, "number of universal triggers that are searched for and stamped on half of I~"
    ] = 0
    shift: Annotated[int, "augmentation of I: images moved by up to this many pixels"] = 2
    crop: Annotated[float, "views: least share of the image's area that a crop keeps"] = 0.5
    flip: Annotated[float, "views: share of them mirrored"] = 0.5
    jitter: Annotated[float, "views: share of them whose colours change"] = 0.8
    gray: Annotated[float, "views: share of them without colours"] = 0.2
    words: Annotated[float, "views of captions: share of the words that change"] = 0.1

    def __post_init__(self) -> None:
        contrastive.check_view_recipe(self)
        least = min(self.weight, self.anchor, self.adversarial)
        require(least >= 0, "weight, anchor and adversarial >= 0")

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss, which owns the encoder and the temperature."""
        return Loss(encoder, self)
