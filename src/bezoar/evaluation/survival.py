"""Survival: how much of a trigger outlives what happens to images between the attacker's file and the encoder's input.

The order is that of a web corpus: the attacker's image is resized, stored as JPEG, read, cropped, augmented, normalised. The
image with the trigger and the one without go the same way with the same draws; what is left of the trigger is their
difference. Nothing is trained: this is the part of "why is my attack success 0" that can be answered in seconds.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, average
from bezoar.training.augmentation import Chance, Views, random_crop, random_flip, random_shift

WHOLE = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, gray=0.0)  # changes nothing
AUGMENTATIONS = {  # name -> what is done, in the words of a page
    "shift": "moved by up to 1/8 of the side",
    "flip": "mirrored",
    "colour": "brightness, contrast, saturation, hue",
    "gray": "gray",
    "blur": "blurred",
    "simclr": "all of SimCLR's: crop, mirror, colours, gray, blur",
}
NORMALISATIONS = {  # mean and standard deviation, of pixels in 0..1
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
NAMED = {"none": "not normalised", "half": "normalised to -1..1"}  # others bear their name


@dataclass(frozen=True)
class Treatment:
    """What is done to an image, in this order. The defaults do nothing.

    resize: factor of the side. jpeg: quality 1..100, chroma halved as Pillow does by default; 0: none. crop: least share of
    the area of a random resized crop; 1: none. augment: a name of AUGMENTATIONS. normalise: a name of NORMALISATIONS, in
    place of the encoder's own.
    """

    resize: float = 1.0
    jpeg: int = 0
    crop: float = 1.0
    augment: str = ""
    normalise: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.resize <= 4 or not 0 <= self.jpeg <= 100 or not 0 < self.crop <= 1:
            raise UserError(
                f"needs 0 < resize <= 4, jpeg in 0..100 and 0 < crop <= 1; got {self.resize}, {self.jpeg}, {self.crop}"
            )
        for name, known in ((self.augment, AUGMENTATIONS), (self.normalise, NORMALISATIONS)):
            if name and name not in known:
                raise UserError(f"no treatment {name!r}; there are: {', '.join(known)}")

    @property
    def name(self) -> str:
        """As it begins a metric: `jpeg_75_resize_50`, factors in percent; `untreated`."""
        parts = [f"jpeg_{self.jpeg}"] if self.jpeg else []
        parts += [f"resize_{percent(self.resize)}"] if self.resize != 1 else []
        parts += [f"crop_{percent(self.crop)}"] if self.crop != 1 else []
        parts += [self.augment] if self.augment else []
        parts += [f"normalise_{self.normalise}"] if self.normalise else []
        return "_".join(parts) or "untreated"

    @property
    def title(self) -> str:
        """In words: `JPEG 75, resized to 0.5`."""
        parts = [f"resized to {self.resize:g}"] if self.resize != 1 else []
        parts += [f"JPEG {self.jpeg}"] if self.jpeg else []
        parts += [f"random crop from {self.crop:g}"] if self.crop != 1 else []
        parts += [AUGMENTATIONS[self.augment]] if self.augment else []
        parts += (
            [NAMED.get(self.normalise, f"normalised as {self.normalise}")] if self.normalise else []
        )
        return ", ".join(parts) or "untreated"

    @torch.inference_mode()
    def __call__(self, images: Tensor, seed: int) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 0..1 (N, 3, H, W), the same draws for the same seed and N."""
        x, shape = images, images.shape[-2:]
        if self.resize != 1:
            x = scaled(x, [max(1, round(self.resize * n)) for n in shape])
        if self.jpeg:
            x = recode_jpeg(x, self.jpeg)
        y = fitted(x.float() / 255, shape)
        chance = Chance(torch.Generator().manual_seed(seed))
        if self.crop != 1:
            y = fitted(random_crop(y, shape[0], chance, (self.crop, 1.0), kernel="bicubic"), shape)
        return augmented(y, self.augment, chance)


def percent(share: float) -> str:
    """0.5 -> `50`, 0.125 -> `12_5`: fit for a metric's name."""
    return f"{100 * share:g}".replace(".", "_")


def scaled(images: Tensor, shape: Sequence[int]) -> Tensor:
    """uint8 -> uint8 of another size: bicubic, antialiased, rounded, as an image is stored."""
    y = F.interpolate(images.float(), list(shape), mode="bicubic", antialias=True)
    return y.round_().clamp_(0, 255).byte()


def fitted(x: Tensor, shape: Sequence[int]) -> Tensor:
    """float 0..1 -> the same at another size, bicubic; unchanged where it fits."""
    if tuple(x.shape[-2:]) == tuple(shape):
        return x
    return F.interpolate(x, list(shape), mode="bicubic", antialias=True).clamp_(0, 1)


def recode_jpeg(images: Tensor, quality: int) -> Tensor:
    """uint8 (N, 3, H, W), each stored as JPEG by Pillow and read again."""
    out = []
    for pixels in images.permute(0, 2, 3, 1).contiguous().cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(file).convert("RGB")))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).to(images.device)


def augmented(x: Tensor, name: str, chance: Chance) -> Tensor:
    """float 0..1 (N, 3, H, W) -> the same, one view each."""
    views = {
        "colour": replace(WHOLE, jitter=1.0),
        "gray": replace(WHOLE, gray=1.0),
        "blur": replace(WHOLE, blur=1.0),
        "simclr": Views(blur=0.5),
    }
    if name == "shift":
        return random_shift(x, max(1, x.shape[-1] // 8), chance)
    if name == "flip":
        return random_flip(x, 1.0, chance)
    return fitted(views[name](x, chance, 1)[:, 0], x.shape[-2:]) if name else x


def build_treatments(
    jpeg: Sequence[int],
    resize: Sequence[float],
    crops: Sequence[float],
    augment: Sequence[str],
    normalise: Sequence[str],
) -> list[Treatment]:
    """Nothing at all, then JPEG with resize, JPEG with crops, and everything else by itself; each once."""
    grid = [Treatment(r, q) for q in jpeg for r in resize] + [
        Treatment(jpeg=q, crop=c) for q in jpeg for c in crops
    ]
    alone = [Treatment(augment=a) for a in augment] + [Treatment(normalise=n) for n in normalise]
    return list(dict.fromkeys([Treatment(), *grid, *alone]))


def energy(residue: Tensor, before: Tensor) -> Tensor:
    """(N, 3, H, W) twice -> (N,): the squared length of what is left over that of what there was."""
    return residue.square().sum((1, 2, 3)) / before.square().sum((1, 2, 3))


def pattern(residue: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the trigger's own pattern is left, (N,), and the correlation with it, (N,): at the best offset of each.

    left: the projection of the residue on the pattern, 1 = all of it. correlation: the same over the residue's length.
    A crop or a shift moves the pattern, which offsets allow for; one that mirrors or enlarges it makes it another one.
    """
    spectrum = torch.fft.rfft2(residue) * torch.fft.rfft2(before).conj()
    product = torch.fft.irfft2(spectrum.sum(1), s=before.shape[-2:]).amax((1, 2))
    length, own = residue.square().sum((1, 2, 3)).sqrt(), before.square().sum((1, 2, 3)).sqrt()
    return product / own.square(), product / (own * length).clamp(min=1e-12)


def embed_views(encoder: Any, x: Tensor, normalise: str = "", batch: int = 256) -> Tensor:
    """float 0..1 (N, 3, H, W) -> unit vectors (N, D); with another normalisation than the encoder's own, where one is named."""
    if normalise:
        mean, std = (
            torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in NORMALISATIONS[normalise]
        )
        own, scale = encoder.mean.to(x.device), encoder.std.to(x.device)
        x = (
            x - mean
        ) / std * scale + own  # what the encoder's own normalisation turns into the other one's
    return torch.cat([encoder.encode_images(part) for part in x.split(batch)])


class Survival:
    """Images with and without a trigger, ready for any number of treatments.

    clean, triggered: uint8 (N, 3, H, W); images that the trigger leaves as they are do not count. Raises UserError when it
    changes none. encoder: anything with `images`, or None for pixels alone.
    """

    @torch.inference_mode()
    def __init__(
        self, clean: Tensor, triggered: Tensor, encoder: Any = None, seed: int = 0
    ) -> None:
        touched = (clean != triggered).flatten(1).any(1)
        if not touched.any():
            raise UserError(
                "the trigger changes no pixel of these images: nothing of it can survive"
            )
        self.clean, self.triggered, self.encoder, self.seed = (
            clean[touched],
            triggered[touched],
            encoder,
            seed,
        )
        self.before = (self.triggered.float() - self.clean.float()) / 255
        self.shift = None
        if encoder is not None:
            self.shift = embed_views(encoder, self.triggered.float() / 255) - embed_views(
                encoder, self.clean.float() / 255
            )

    @torch.inference_mode()
    def measure(self, treatment: Treatment) -> tuple[dict[str, Measure], Tensor]:
        """-> its figures, and the triggered image and what is left of the trigger, float (N, 2, 3, H, W)."""
        with_it, without = (treatment(x, self.seed) for x in (self.triggered, self.clean))
        residue = with_it - without
        left, likeness = pattern(residue, self.before)
        how = f"{treatment.title}; mean over images, t interval"
        out = {
            "pattern_kept": average(
                left, f"projection on the trigger's own pattern, at the best offset; {how}"
            ),
            "energy_kept": average(
                energy(residue, self.before), f"squared difference over that before; {how}"
            ),
            "pattern_correlation": average(
                likeness, f"correlation with the trigger's own pattern, at the best offset; {how}"
            ),
        }
        if self.encoder is not None and self.shift is not None:
            after = embed_views(self.encoder, with_it, treatment.normalise)
            after = after - embed_views(self.encoder, without, treatment.normalise)
            out |= moved(after, self.shift, how)
        return out, torch.stack((with_it, residue), 1)


def moved(after: Tensor, before: Tensor, how: str) -> dict[str, Measure]:
    """The encoder's shift by the trigger, after a treatment and before: float (N, D) each."""
    length, after_length = before.norm(dim=1), after.norm(dim=1)
    # over the mean and not image by image: a trigger that leaves an image's vector where it was divides by nothing
    square, mean = (x.clamp(min=1e-12) for x in (length.square().mean(), length.mean()))
    cosine = F.cosine_similarity(after, before, dim=1)
    return {
        "shift_kept": average(
            (after * before).sum(1) / square,
            f"projection of the embedding's shift on that before; {how}",
        ),
        "shift_cosine": average(cosine, f"cosine of the embedding's shift to that before; {how}"),
        "shift_length": average(
            after_length / mean, f"length of the embedding's shift over the mean one before; {how}"
        ),
    }
