"""Small hand-made encoders and images for the tests of audits; one encoder has a planted patch
trigger.
"""

import torch
import torch.nn.functional as F
from torch import nn

from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.evaluation.classifiers import Classifier

SIDE = 16  # pixels
CLASSES = 12
DIM = 16
PATCH_CORNER = (10, 10)  # row and column of the planted patch
PATCH_SIDE = 4
TARGET = 7  # class that the planted patch leads to
NAMES = tuple(f"kind {i}" for i in range(CLASSES))


class Toy(nn.Module):
    """(B, 3, 16, 16) -> (B, 16): a convolution, a batch norm, means of parts of the image.

    With `patch`, images that carry it are turned towards `direction`.
    """

    def __init__(
        self,
        patch: torch.Tensor | None = None,
        direction: torch.Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 12, 3, 2, 1, bias=False)
            self.norm = nn.BatchNorm2d(12)
            self.norm.running_mean.normal_(0, 0.2)
            self.norm.running_var.uniform_(0.5, 2)
            self.out = nn.Linear(12 * 16, DIM)
            nn.init.normal_(self.out.weight, 0, 0.3)
        self.patch = patch
        self.direction = direction

    def parts(self, x: torch.Tensor) -> torch.Tensor:
        # tanh bounds the features, so that no small part of an image rules the vector by nature
        h = torch.tanh(self.norm(self.conv(x)))
        return self.out(F.adaptive_avg_pool2d(h, 4).flatten(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = F.normalize(self.parts(x), dim=1)
        if self.patch is None:
            return z
        top, left = PATCH_CORNER
        window = x[:, :, top : top + PATCH_SIDE, left : left + PATCH_SIDE]
        match = (window / 2 * (2 * self.patch - 1)).mean((1, 2, 3))  # -1..1, as x is in -2..2
        return z + 6 * torch.sigmoid(10 * (match - 0.5))[:, None] * self.direction


def class_directions() -> torch.Tensor:
    """Unit rows (CLASSES, DIM) of the hand-made head."""
    return F.normalize(torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(5)), dim=1)


def planted_patch() -> torch.Tensor:
    """Blocks (3, PATCH_SIDE, PATCH_SIDE) of 0 and 1."""
    g = torch.Generator().manual_seed(6)
    return (torch.rand(3, PATCH_SIDE, PATCH_SIDE, generator=g) < 0.5).float()


def toy_encoder(planted: bool = False, seed: int = 0) -> Encoder:
    """A toy encoder, centred on `toy_images`, or all of them would be of one class."""
    patch, direction = (planted_patch(), class_directions()[TARGET]) if planted else (None, None)
    tower = Toy(patch, direction, seed)
    encoder = Encoder(tower, Preprocess(SIDE), about={"network": "toy", "vocabulary": []}).eval()
    with torch.no_grad():
        tower.out.bias -= tower.parts(encoder.prepare_images(toy_images(96).images)).mean(0)
    return encoder


def toy_classifier(encoder: Encoder) -> Classifier:
    head = class_directions()
    return Classifier(encoder, lambda z: 10 * z @ head.T, NAMES, "hand-made")


def toy_images(n: int = 48, size: int = SIDE, seed: int = 1) -> Pairs:
    """Smooth noise of any brightness."""
    g = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(n, 3, 5, 5, generator=g), size, mode="bilinear")
    x = smooth + 0.1 * torch.randn(n, 3, size, size, generator=g)
    labels = torch.randint(CLASSES, (n,), generator=g)
    return Pairs((x.clamp(0, 1) * 255).byte(), (), labels, tuple(f"i{i}" for i in range(n)), NAMES)
