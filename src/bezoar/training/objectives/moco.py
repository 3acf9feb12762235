"""MoCo v2: find an image's other view in a queue of older ones (He, Chen et al. 2020).

If a key's batch norm sees the whole batch, its vector reveals the batch, and with it the positive.
So keys are shuffled and normalised in groups. The papers use the GPUs as groups (He et al. 2020,
section 3.3); here groups do not depend on the number of ranks.
"""

from __future__ import annotations

import copy
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.registry import method
from bezoar.training import selfsupervised
from bezoar.training.augmentation import Chance
from bezoar.training.collectives import gather, rank_and_world
from bezoar.training.loop import require
from bezoar.training.selfsupervised import ViewsLoss


class GroupedBatchNorm(nn.Module):
    """A batch norm that normalises `rows` rows at a time, and keeps no statistics."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, rows: int) -> None:
        super().__init__()
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            raise UserError(
                f"moco cannot group what this network's {type(norm).__name__} normalises; take "
                "simclr or simsiam"
            )
        self.weight, self.bias, self.eps, self.rows = norm.weight, norm.bias, norm.eps, rows

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape and dtype."""
        return torch.cat([self._normalise(group) for group in torch.split(x, self.rows)])

    def _normalise(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class Loss(ViewsLoss):
    """-log [ exp(q.k / t) / (exp(q.k / t) + sum over n of exp(q.n / t)) ], n being the queue.

    k and n have no gradient. Key tower, queue and position are in the state dict, and the same on
    every rank.

    Attributes:
        key: image tower and head that follow the trained ones slowly.
        queue: float32 (K, dim), unit rows, a ring.
        position: of the queue's oldest row.
    """

    queue: Tensor
    position: Tensor

    def __init__(self, encoder: Encoder, recipe: Moco) -> None:
        super().__init__(encoder, recipe)
        self.recipe = recipe
        world = rank_and_world()[1]
        if recipe.groups % world:
            raise UserError(
                f"{recipe.groups} groups of keys do not divide into {world} ranks; give a multiple "
                f"of {world}"
            )
        width = selfsupervised.measure_width(encoder)
        self.head = selfsupervised.perceptron(width, recipe.hidden, recipe.dim, norm=False)
        self.key = copy.deepcopy(self.tower()).requires_grad_(False)
        for parent in list(self.key.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    grouped = GroupedBatchNorm(child, recipe.batch // recipe.groups)
                    setattr(parent, name, grouped)
        self.register_buffer("queue", F.normalize(torch.randn(recipe.queue, recipe.dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """The loss of a batch; see `Objective`. Tokens are not read.

        In training the key tower is updated before it is run, and the queue after.
        """
        if self.training:
            self.update_key_tower()
        x = self.views(images, chance)  # (B, 2, 3, S, S)
        q = F.normalize(self.project(x[:, 0]), dim=1)
        keys = self.compute_keys(x[:, 1], chance)
        k = keys[chance.rank * len(q) :][: len(q)]  # (B, dim), of this rank
        positive = (q * k).sum(1, keepdim=True)
        negatives = q @ self.queue.clone().T  # a copy: the backward pass needs the old queue
        logits = torch.cat([positive, negatives], 1) / self.recipe.temperature
        if self.training:
            self.enqueue(keys)
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

    @torch.no_grad()
    def compute_keys(self, x: Tensor, chance: Chance) -> Tensor:
        """The keys of all ranks' views, in order; each rank computes a part, shuffled.

        Args:
            x: views (B, 3, S, S) of this rank.

        Returns:
            float32 (world B, dim), unit rows.
        """
        views = gather(x)
        shuffled = torch.randperm(len(views), generator=chance.generator).to(x.device)
        rows = shuffled.chunk(chance.world)[chance.rank]
        keys = gather(F.normalize(self.project(views[rows], self.key), dim=1))
        return keys[shuffled.argsort()]

    @torch.no_grad()
    def update_key_tower(self) -> None:
        """key <- m key + (1 - m) query, of all parameters, m = `slow`."""
        for slow, fast in zip(self.key.parameters(), self.tower().parameters(), strict=True):
            slow.lerp_(fast, 1 - self.recipe.slow)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write keys float32 (n, dim), n <= K, over the oldest rows, in order."""
        rows = (self.position + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys
        self.position.add_(len(keys)).remainder_(len(self.queue))


@method
class Moco:
    """Images alone, for networks without a text tower. AdamW, warm-up and cosine.

    The papers train on ImageNet with a queue of 65,536, m = 0.999 and SGD; short trainings need a
    copy that is less slow. crop and blur are theirs for ImageNet where they are 0.2 and 0.5.
    """

    epochs: Annotated[int, "passes over the data"] = 10
    batch: Annotated[int, "images a step"] = 256
    lr: Annotated[float, "highest learning rate"] = 1e-3
    weight_decay: Annotated[float, "of AdamW; not on vectors (biases, norms)"] = 1e-4
    warmup: Annotated[float, "share of the steps in which the learning rate rises"] = 0.05
    temperature: Annotated[float, "of the softmax"] = 0.2
    slow: Annotated[
        float, "share of itself that the slow copy keeps at each step; the papers' momentum m"
    ] = 0.99
    groups: Annotated[int, "groups of keys, each with a batch norm of its own"] = 8
    queue: Annotated[int, "vectors of older batches, the negatives"] = 4096
    hidden: Annotated[int, "units of the projection head"] = 512
    dim: Annotated[int, "size of the vectors that are compared"] = 128
    crop: Annotated[float, "augmentation: least share of the image's area that a crop keeps"] = 0.2
    flip: Annotated[float, "augmentation: share of the views mirrored"] = 0.5
    jitter: Annotated[float, "augmentation: share of the views whose colours change"] = 0.8
    colour: Annotated[float, "augmentation: how strongly; SimCLR's s"] = 0.5
    gray: Annotated[float, "augmentation: share of the views without colours"] = 0.2
    blur: Annotated[float, "augmentation: share of the views blurred; 0.5 for ImageNet"] = 0.0

    captions = False

    def __post_init__(self) -> None:
        selfsupervised.check_recipe(self)
        require(self.temperature > 0, "temperature > 0")
        require(0 <= self.slow <= 1, "slow in 0..1")
        if self.groups < 1 or self.batch % self.groups or self.batch < 2 * self.groups:
            raise ValueError(
                f"a batch of {self.batch} does not divide into {self.groups} groups of two and more"
            )
        if self.queue < self.batch:
            raise ValueError(
                f"the queue ({self.queue}) must hold at least one batch ({self.batch})"
            )

    def __call__(self, encoder: Encoder) -> Loss:
        """The loss, which owns the encoder, a head, slow copies of both, and the queue."""
        return Loss(encoder, self)
