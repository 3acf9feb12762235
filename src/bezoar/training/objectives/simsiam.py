"""SimSiam: predict an image's other view from one, without negatives (Chen & He 2021)."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from bezoar.encoders.encoder import Encoder
from bezoar.registry import method
from bezoar.training import selfsupervised
from bezoar.training.augmentation import Chance
from bezoar.training.loop import require
from bezoar.training.selfsupervised import ViewsLoss


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """-[ cos(p1, z2) + cos(p2, z1) ] / 2, a mean over images; z counts as a constant.

    Both are (2N, D), two views of an image side by side.
    """
    p, z = (F.normalize(v, dim=1).unflatten(0, (-1, 2)) for v in (p, z.detach()))  # (N, 2, D)
    return -(p * z.flip(1)).sum(2).mean()


class Loss(ViewsLoss):
    """The mean negative cosine of predictions and projections, in -1..1."""

    def __init__(self, encoder: Encoder, recipe: Simsiam) -> None:
        super().__init__(encoder, recipe)
        width = selfsupervised.measure_width(encoder)
        hidden = [recipe.hidden] * (recipe.layers - 1)
        self.head = selfsupervised.perceptron(width, *hidden, recipe.dim, last_norm=True)
        self.predictor = selfsupervised.perceptron(recipe.dim, recipe.bottleneck, recipe.dim)

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """The loss of a batch; see `Objective`. Tokens are not read."""
        z = self.project(self.views(images, chance).flatten(0, 1))  # (2 B, D)
        return negative_cosine(self.predictor(z), z)


@method
class Simsiam:
    """Images alone, for networks without a text tower. The predictor's rate decays too.

    The paper's head has three layers of 2048 (two for CIFAR-10), its predictor a bottleneck of 512,
    its optimiser is SGD. Both views go through the network as one batch.
    """

    epochs: Annotated[int, "passes over the data"] = 10
    batch: Annotated[int, "images a step"] = 256
    lr: Annotated[float, "highest learning rate"] = 1e-3
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms)"] = 1e-4
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    layers: Annotated[int, "of the projection head"] = 2
    hidden: Annotated[int, "units of the projection head"] = 512
    dim: Annotated[int, "size of the vectors that are compared"] = 512
    bottleneck: Annotated[int, "units of the predictor"] = 128
    crop: Annotated[float, "augmentation: least share of the image's area that a crop keeps"] = 0.2
    flip: Annotated[float, "augmentation: share of the views mirrored"] = 0.5
    jitter: Annotated[float, "augmentation: share of the views whose colours change"] = 0.8
    colour: Annotated[float, "augmentation: how strongly; SimCLR's s"] = 0.5
    gray: Annotated[float, "augmentation: share of the views without colours"] = 0.2
    blur: Annotated[float, "augmentation: share of the views blurred; 0.5 for ImageNet"] = 0.0

    captions = False

    def __post_init__(self) -> None:
        selfsupervised.check_recipe(self)
        require(min(self.layers, self.bottleneck) >= 1, "layers >= 1, bottleneck >= 1")

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss, which owns the encoder, a projection head and a predictor."""
        return Loss(encoder, self)
