"""What CLIP's kin share, the objectives that train image and text tower together: their fields, the loss, the views."""

from __future__ import annotations

import copy
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.encoders.encoder import Encoder
from bezoar.training import augmentation, caption_views
from bezoar.training.augmentation import Chance, Views
from bezoar.training.collectives import gather


class Recipe(Protocol):
    """Fields of every such objective: those of the loop, and CLIP's."""

    epochs: int
    batch: int
    lr: float
    weight_decay: float
    warmup: float
    temperature: float


class Viewed(Recipe, Protocol):
    """Fields of one that looks at other views of images and captions too (see `ViewedModule`)."""

    crop: float
    flip: float
    jitter: float
    gray: float
    words: float


def check(recipe: Recipe) -> None:
    """ValueError unless the common fields make sense."""
    if recipe.epochs < 1 or recipe.batch < 2 or recipe.lr <= 0 or recipe.temperature <= 0:
        raise ValueError("needs epochs >= 1, batch >= 2, lr > 0, temperature > 0")
    if not 0 <= recipe.warmup < 1 or recipe.weight_decay < 0 or getattr(recipe, "shift", 0) < 0:
        raise ValueError("needs warmup in 0..1, weight_decay >= 0, shift >= 0")


def check_views(recipe: Viewed) -> None:
    """ValueError unless the fields of the views make sense too."""
    check(recipe)
    if not 0 < recipe.crop <= 1 or not all(
        0 <= share <= 1 for share in (recipe.flip, recipe.jitter, recipe.gray)
    ):
        raise ValueError("needs crop in 0..1 and above 0, flip, jitter and gray in 0..1")
    if not 0 <= recipe.words < 1:
        raise ValueError("needs words in 0..1")


def moved(images: Tensor, most: int, chance: Chance) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 0..1, moved by up to `most` pixels each way, as CLIP sees them here."""
    return augmentation.random_shift(images, most, chance).float() / 255


def toward(a: Tensor, b: Tensor, scale: Tensor, chance: Chance) -> Tensor:
    """InfoNCE(a, b) = -1/B sum_i log softmax_j(s a_i.b_j)_i, float32 (B, D) unit rows, b_j being those of all ranks."""
    truth = torch.arange(len(a), device=a.device) + chance.rank * len(a)
    return F.cross_entropy(scale * a @ gather(b).T, truth)


def symmetric(z: Tensor, w: Tensor, scale: Tensor, chance: Chance) -> Tensor:
    """CLIP's loss of images z and captions w, float32 (B, D), unit rows: the mean of both directions."""
    return (toward(z, w, scale, chance) + toward(w, z, scale, chance)) / 2


class Module(nn.Module):
    """Owns the encoder and a learnt temperature, and begins as CLIP's loss does."""

    def __init__(self, encoder: Encoder, recipe: Recipe) -> None:
        super().__init__()
        self.encoder = encoder
        self.logarithm = nn.Parameter(
            torch.tensor(math.log(1 / recipe.temperature), device=encoder.device)
        )

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by, at most 100."""
        return self.logarithm.clamp(max=math.log(100)).exp()


class Start(nn.Module):
    """Both towers as they are now, frozen and at rest; in the state dict, so that a training goes on with the same ones."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        assert encoder.text is not None
        towers = {"image": encoder.image, "text": encoder.text}
        self.towers = nn.ModuleDict(copy.deepcopy(towers)).requires_grad_(False)

    @torch.no_grad()
    def forward(self, encoder: Encoder, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Images, as `encoder.images` takes them, and tokens (B, L) -> float32 (B, D) each, unit rows."""
        with encoder.autocast():
            z, w = self.towers["image"](encoder.prepare_images(x)), self.towers["text"](tokens)
        return F.normalize(z.float(), dim=1), F.normalize(w.float(), dim=1)

    def train(self, mode: bool = True) -> Start:
        """They rest."""
        return super().train(False)


class ViewedModule(Module):
    """With other views of images (augment.Views) and captions (texts.eda)."""

    def __init__(self, encoder: Encoder, recipe: Viewed) -> None:
        super().__init__(encoder, recipe)
        self.words, self.marks = recipe.words, caption_views.marked(encoder)
        self.look = Views(
            encoder.preprocess.size,
            (recipe.crop, 1.0),
            flip=recipe.flip,
            jitter=recipe.jitter,
            gray=recipe.gray,
        )

    def seen(self, images: Tensor, chance: Chance) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 0..1 (B, 3, S, S), another view of each."""
        return self.look(images, chance, 1)[:, 0]

    def told(self, tokens: Tensor, chance: Chance) -> Tensor:
        """int64 (B, L) -> the same shape, another view of each caption."""
        return caption_views.eda(tokens, chance, self.words, self.marks)

    def together(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Images float32 0..1 (B, 3, ., .) each -> (B, D) each, as one batch, so that one batch norm sees them all."""
        z = self.encoder.encode_images(torch.cat([self.sized(p) for p in parts]))
        return z.split([len(p) for p in parts])

    def sized(self, x: Tensor) -> Tensor:
        """Images at the encoder's own size, where `encoder.images` leaves them alone."""
        side = self.encoder.preprocess.size
        if x.shape[-2:] == (side, side):
            return x
        return F.interpolate(
            x, (side, side), mode=self.encoder.preprocess.interpolation, antialias=True
        )

    def apart(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """Two views of an image find each other among the batch, and two of a caption; image and text never meet."""
        z, z2 = self.together(self.seen(images, chance), self.seen(images, chance))
        w, w2 = (self.encoder.encode_tokens(self.told(tokens, chance)) for _ in range(2))
        return (symmetric(z, z2, self.scale, chance) + symmetric(w, w2, self.scale, chance)) / 2
