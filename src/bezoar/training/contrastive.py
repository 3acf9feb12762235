"""Fields, CLIP's loss and views of the objectives that train both towers."""

from __future__ import annotations

import copy
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.encoders.encoder import Encoder
from bezoar.training import augmentation, caption_views, loop
from bezoar.training.augmentation import Chance, Views
from bezoar.training.collectives import gather
from bezoar.training.loop import require


class Recipe(loop.Recipe, Protocol):
    """Fields of every such objective."""

    temperature: float


class ViewRecipe(Recipe, Protocol):
    """Fields of one that looks at other views of images and captions too (see `ViewLoss`)."""

    crop: float
    flip: float
    jitter: float
    gray: float
    words: float


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError unless the common fields make sense."""
    loop.check_recipe(recipe)
    require(recipe.temperature > 0, "temperature > 0")
    require(getattr(recipe, "shift", 0) >= 0, "shift >= 0")


def check_view_recipe(recipe: ViewRecipe) -> None:
    """Raise ValueError unless the common fields and those of the views make sense."""
    check_recipe(recipe)
    require(0 < recipe.crop <= 1, "crop in 0..1 and above 0")
    shares = (recipe.flip, recipe.jitter, recipe.gray)
    require(all(0 <= share <= 1 for share in shares), "flip, jitter and gray in 0..1")
    require(0 <= recipe.words < 1, "words in 0..1, below 1")


def shift_to_float(images: Tensor, most: int, chance: Chance) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 in 0..1, moved by up to `most` pixels each way."""
    return augmentation.random_shift(images, most, chance).float() / 255


def info_nce(a: Tensor, b: Tensor, scale: Tensor, chance: Chance) -> Tensor:
    """InfoNCE(a, b) = -1/B sum_i log softmax_j(s a_i.b_j)_i.

    a and b are float32 (B, D), unit rows; b_j are those of all ranks.
    """
    targets = torch.arange(len(a), device=a.device) + chance.rank * len(a)
    return F.cross_entropy(scale * a @ gather(b).T, targets)


def clip_loss(z: Tensor, w: Tensor, scale: Tensor, chance: Chance) -> Tensor:
    """CLIP's loss of images z and captions w, float32 (B, D), unit rows: InfoNCE both ways."""
    return (info_nce(z, w, scale, chance) + info_nce(w, z, scale, chance)) / 2


class ContrastiveLoss(nn.Module):
    """The loss of such an objective: it owns the encoder and a learnt temperature."""

    def __init__(self, encoder: Encoder, recipe: Recipe) -> None:
        super().__init__()
        self.encoder = encoder
        log_scale = torch.tensor(math.log(1 / recipe.temperature), device=encoder.device)
        self.log_scale = nn.Parameter(log_scale)

    @property
    def scale(self) -> Tensor:
        """The factor of cosines, at most 100."""
        return self.log_scale.clamp(max=math.log(100)).exp()


class InitialEncoder(nn.Module):
    """A frozen copy of an encoder as it is now, in the state dict for a resumed training."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)

    @torch.no_grad()
    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Images and tokens, as the encoder takes them -> float32 (B, D) each, unit rows."""
        return self.encoder.encode_images(x), self.encoder.encode_tokens(tokens)

    def train(self, mode: bool = True) -> InitialEncoder:
        """Stay in evaluation mode."""
        return super().train(False)


class ViewLoss(ContrastiveLoss):
    """A loss with other views of images (`augmentation`) and captions (`caption_views`)."""

    def __init__(self, encoder: Encoder, recipe: ViewRecipe) -> None:
        super().__init__(encoder, recipe)
        self.words = recipe.words
        self.marks = caption_views.has_marks(encoder)
        self.views = Views(
            encoder.preprocess.size,
            (recipe.crop, 1.0),
            flip=recipe.flip,
            jitter=recipe.jitter,
            gray=recipe.gray,
        )

    def view_images(self, images: Tensor, chance: Chance) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 in 0..1, (B, 3, S, S), another view of each."""
        return self.views(images, chance, 1)[:, 0]

    def view_captions(self, tokens: Tensor, chance: Chance) -> Tensor:
        """int64 (B, L) -> the same shape, another view of each caption."""
        return caption_views.eda(tokens, chance, self.words, self.marks)

    def encode_together(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Encode several sets of images as one batch, so that one batch norm sees them all.

        Images are float in 0..1, (B, 3, ., .) each; their vectors are (B, D) each.
        """
        z = self.encoder.encode_images(torch.cat([self.encoder.resize(part) for part in parts]))
        return torch.split(z, [len(part) for part in parts])

    def unimodal_loss(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """CLIP's loss of two views of each image, and of two of each caption, never of both."""
        z, z2 = self.encode_together(
            self.view_images(images, chance), self.view_images(images, chance)
        )
        w, w2 = (self.encoder.encode_tokens(self.view_captions(tokens, chance)) for _ in range(2))
        of_images = clip_loss(z, z2, self.scale, chance)
        of_captions = clip_loss(w, w2, self.scale, chance)
        return (of_images + of_captions) / 2
