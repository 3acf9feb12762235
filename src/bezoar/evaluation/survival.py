"""Survival: how much of a trigger is left between the attacker's file and the encoder.

The order is that of a web corpus: the attacker's image is resized, stored as JPEG, read, cropped,
augmented and normalised. The image with the trigger and the one without go the same way with the
same draws, and what is left of the trigger is their difference. Nothing is trained: this is the
part of "why is my attack success 0" that can be answered in seconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.attacks import pixels
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.small_towers import MEAN_STD
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, average
from bezoar.training.augmentation import Chance, Views, random_crop, random_flip, random_shift

UNCHANGED = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, gray=0.0)
AUGMENTATIONS = {  # name -> what is done, in the words of a page
    "shift": "moved by up to 1/8 of the side",
    "flip": "mirrored",
    "colour": "brightness, contrast, saturation, hue",
    "gray": "gray",
    "blur": "blurred",
    "simclr": "all of SimCLR's: crop, mirror, colours, gray, blur",
}
VIEWS = {
    "colour": replace(UNCHANGED, jitter=1.0),
    "gray": replace(UNCHANGED, gray=1.0),
    "blur": replace(UNCHANGED, blur=1.0),
    "simclr": Views(blur=0.5),
}
NORMALISATIONS = ("none", "half", "imagenet", "clip")  # of MEAN_STD
NORMALISATION_TITLES = {"none": "not normalised", "half": "normalised to -1..1"}
SMALLEST = 1e-12  # below which a length is not divided by


@dataclass(frozen=True)
class Treatment:
    """Changes of an image, in this order. The defaults change nothing."""

    resize: float = 1.0  # factor of the side, above 0 and up to 4
    jpeg: int = 0  # quality 1..100, with chroma halved as Pillow does by default; 0 stores no JPEG
    crop: float = 1.0  # least share of the area of a random resized crop; 1 crops nothing
    augment: str = ""  # a name of AUGMENTATIONS, or empty
    normalise: str = ""  # a name of NORMALISATIONS, in place of the encoder's own; or empty

    def __post_init__(self) -> None:
        if not 0 < self.resize <= 4 or not 0 <= self.jpeg <= 100 or not 0 < self.crop <= 1:
            raise UserError(
                "needs 0 < resize <= 4, jpeg in 0..100 and 0 < crop <= 1; "
                f"got {self.resize}, {self.jpeg}, {self.crop}"
            )
        if self.augment and self.augment not in AUGMENTATIONS:
            raise _no_treatment(self.augment, AUGMENTATIONS)
        if self.normalise and self.normalise not in NORMALISATIONS:
            raise _no_treatment(self.normalise, NORMALISATIONS)

    @property
    def name(self) -> str:
        """The beginning of its metrics' names: `jpeg_75_resize_50`, or `untreated`."""
        parts = []
        if self.jpeg:
            parts.append(f"jpeg_{self.jpeg}")
        if self.resize != 1:
            parts.append(f"resize_{format_percent(self.resize)}")
        if self.crop != 1:
            parts.append(f"crop_{format_percent(self.crop)}")
        if self.augment:
            parts.append(self.augment)
        if self.normalise:
            parts.append(f"normalise_{self.normalise}")
        return "_".join(parts) or "untreated"

    @property
    def title(self) -> str:
        """The treatment in words: `resized to 0.5, JPEG 75`."""
        parts = []
        if self.resize != 1:
            parts.append(f"resized to {self.resize:g}")
        if self.jpeg:
            parts.append(f"JPEG {self.jpeg}")
        if self.crop != 1:
            parts.append(f"random crop from {self.crop:g}")
        if self.augment:
            parts.append(AUGMENTATIONS[self.augment])
        if self.normalise:
            title = f"normalised as {self.normalise}"
            parts.append(NORMALISATION_TITLES.get(self.normalise, title))
        return ", ".join(parts) or "untreated"

    @torch.inference_mode()
    def __call__(self, images: Tensor, seed: int) -> Tensor:
        """Treat uint8 (N, 3, H, W); the result is float32 0..1 (N, 3, H, W).

        The draws are the same for the same seed and N.
        """
        stored, shape = images, images.shape[-2:]
        if self.resize != 1:
            stored = resize_stored(stored, [max(1, round(self.resize * side)) for side in shape])
        if self.jpeg:
            stored = pixels.recode_jpeg(stored, self.jpeg)
        x = resize_floats(stored.float() / 255, shape)
        chance = Chance(torch.Generator().manual_seed(seed))
        if self.crop != 1:
            x = random_crop(x, shape[0], chance, (self.crop, 1.0), kernel="bicubic")
            x = resize_floats(x, shape)
        return augment_images(x, self.augment, chance)


def _no_treatment(name: str, names: Iterable[str]) -> UserError:
    return UserError(f"no treatment {name!r}; there are: {', '.join(names)}")


def format_percent(share: float) -> str:
    """Write 0.5 as `50` and 0.125 as `12_5`, which fit into a metric's name."""
    return f"{100 * share:g}".replace(".", "_")


def resize_stored(images: Tensor, shape: Sequence[int]) -> Tensor:
    """Resize uint8 images, bicubic and antialiased, rounded as an image is stored."""
    x = F.interpolate(images.float(), list(shape), mode="bicubic", antialias=True)
    return x.round_().clamp_(0, 255).byte()


def resize_floats(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Resize float images 0..1, bicubic and antialiased, if they have another size."""
    if tuple(x.shape[-2:]) == tuple(shape):
        return x
    return F.interpolate(x, list(shape), mode="bicubic", antialias=True).clamp_(0, 1)


def augment_images(x: Tensor, name: str, chance: Chance) -> Tensor:
    """Augment float images 0..1 (N, 3, H, W), one view each; an empty name changes nothing."""
    if not name:
        return x
    if name == "shift":
        return random_shift(x, max(1, x.shape[-1] // 8), chance)
    if name == "flip":
        return random_flip(x, 1.0, chance)
    return resize_floats(VIEWS[name](x, chance, 1)[:, 0], x.shape[-2:])


def build_treatments(
    jpeg: Sequence[int],
    resize: Sequence[float],
    crops: Sequence[float],
    augment: Sequence[str],
    normalise: Sequence[str],
) -> list[Treatment]:
    """List no treatment, each JPEG with each resize and each crop, and the rest alone."""
    treatments = [
        Treatment(),
        *(Treatment(factor, quality) for quality in jpeg for factor in resize),
        *(Treatment(jpeg=quality, crop=crop) for quality in jpeg for crop in crops),
        *(Treatment(augment=name) for name in augment),
        *(Treatment(normalise=name) for name in normalise),
    ]
    return list(dict.fromkeys(treatments))


def correlate_pattern(residue: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Compare the rest of a trigger with its pattern, at the best offset of each image.

    The offsets allow for crops and shifts, which move the pattern. Mirroring or enlarging makes
    another pattern.

    Args:
        residue: the rest of the trigger, float (N, 3, H, W).
        before: the pattern, float (N, 3, H, W).

    Returns:
        The projection of the residue on the pattern, (N,), 1 being all of it; and the correlation
        with it, (N,): the projection over the residue's length.
    """
    spectrum = torch.fft.rfft2(residue) * torch.fft.rfft2(before).conj()
    product = torch.fft.irfft2(spectrum.sum(1), s=before.shape[-2:]).amax((1, 2))
    residue_length = residue.square().sum((1, 2, 3)).sqrt()
    length = before.square().sum((1, 2, 3)).sqrt()
    return product / length.square(), product / (length * residue_length).clamp(min=SMALLEST)


def embed_views(encoder: Encoder, x: Tensor, normalise: str = "", batch: int = 256) -> Tensor:
    """Embed float images 0..1 (N, 3, H, W): unit rows (N, D). normalise: see NORMALISATIONS."""
    if normalise:
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in MEAN_STD[normalise])
        # The encoder's own normalisation turns this into the other one's.
        x = (x - mean) / std * encoder.std.to(x.device) + encoder.mean.to(x.device)
    return torch.cat([encoder.encode_images(part) for part in x.split(batch)])


class Survival:
    """Images with and without a trigger, ready for any number of treatments."""

    @torch.inference_mode()
    def __init__(
        self, clean: Tensor, triggered: Tensor, encoder: Encoder | None = None, seed: int = 0
    ) -> None:
        """Keep the images that the trigger changes.

        Args:
            clean: uint8 (N, 3, H, W).
            encoder: measures the shift of the vectors, or None to look at pixels alone.
            seed: of the treatments' draws.

        Raises:
            UserError: if the trigger changes no image.
        """
        changed = (clean != triggered).flatten(1).any(1)
        if not changed.any():
            raise UserError(
                "the trigger changes no pixel of these images: nothing of it can survive"
            )
        self.clean, self.triggered = clean[changed], triggered[changed]
        self.encoder, self.seed = encoder, seed
        self.pattern = (self.triggered.float() - self.clean.float()) / 255
        self.shift: Tensor | None = None
        if encoder is not None:
            with_trigger = embed_views(encoder, self.triggered.float() / 255)
            self.shift = with_trigger - embed_views(encoder, self.clean.float() / 255)

    @torch.inference_mode()
    def measure(self, treatment: Treatment) -> tuple[dict[str, Measure], Tensor]:
        """Measure what is left of the trigger after a treatment.

        Returns the measures; and, float (N, 2, 3, H, W), each treated image with the trigger beside
        what is left of the trigger in it.
        """
        triggered, clean = (treatment(x, self.seed) for x in (self.triggered, self.clean))
        residue = triggered - clean
        projection, correlation = correlate_pattern(residue, self.pattern)
        energy, before = (x.square().sum((1, 2, 3)) for x in (residue, self.pattern))  # (N,)
        how = f"{treatment.title}; mean over images, t interval"
        measures = {
            "pattern_kept": average(
                projection, f"projection on the trigger's own pattern, at the best offset; {how}"
            ),
            "energy_kept": average(energy / before, f"squared difference over that before; {how}"),
            "pattern_correlation": average(
                correlation,
                f"correlation with the trigger's own pattern, at the best offset; {how}",
            ),
        }
        if self.encoder is not None and self.shift is not None:
            shift = embed_views(self.encoder, triggered, treatment.normalise)
            shift = shift - embed_views(self.encoder, clean, treatment.normalise)
            measures |= compare_shifts(shift, self.shift, how)
        return measures, torch.stack((triggered, residue), 1)


def compare_shifts(after: Tensor, before: Tensor, how: str) -> dict[str, Measure]:
    """Compare the vectors' shift by the trigger, float (N, D), with that before a treatment."""
    length, after_length = before.norm(dim=1), after.norm(dim=1)
    # Over the mean, because a trigger may leave single vectors where they are.
    mean_square = length.square().mean().clamp(min=SMALLEST)
    mean_length = length.mean().clamp(min=SMALLEST)
    return {
        "shift_kept": average(
            (after * before).sum(1) / mean_square,
            f"projection of the embedding's shift on that before; {how}",
        ),
        "shift_cosine": average(
            F.cosine_similarity(after, before, dim=1),
            f"cosine of the embedding's shift to that before; {how}",
        ),
        "shift_length": average(
            after_length / mean_length,
            f"length of the embedding's shift over the mean one before; {how}",
        ),
    }
