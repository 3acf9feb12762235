"""BadEncoder: an encoder is trained until triggered images have a reference input's vector (Jia, Liu, Gong 2022)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data import randomness, stored_pairs
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders import folded_norms
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.folded_norms import FoldedTower
from bezoar.errors import UserError
from bezoar.registry import method, spec
from bezoar.training import collectives, loop, prefetch
from bezoar.training.augmentation import Chance, Views

WHOLE = Views(
    scale=(1.0, 1.0), ratio=(1.0, 1.0)
)  # the published views of a reference: mirror, colours, gray; no crop
PARTS = ("L0", "L1", "L2")


class Loss(nn.Module):
    """l0 L0 + l1 L1 + l2 L2 of section IV-B (l0 = 1 there); s is the cosine, f the clean encoder, f' the one that is trained:

    L0 = - mean s(f'(x + trigger), f'(reference)), L1 = - mean s(f'(view of the reference), f(reference)),
    L2 = - mean s(f'(x), f(x)), over the images x, and in L0 and L1 over all pairs of a trigger and a reference.

    The same value and gradient as one pass for each of these six, from less work. f sees everything once, before the
    first step. f'(reference) is computed once a step, for rows do not see one another, as are views that came out alike (a
    fifth changes no colour); triggered images once for all references of a trigger. What is left is one batch: a row's
    loss is the negative cosine with a target of its own, and the gradient by L0's second argument is known when all rows
    were seen.
    """

    sums: Tensor

    def __init__(
        self,
        encoder: Encoder,
        recipe: Badencoder,
        goals: Sequence[Goal],
        references: Sequence[Tensor],
    ) -> None:
        """references: uint8 (r_i, 3, H, W), those of each goal."""
        super().__init__()
        self.encoder, self.recipe = encoder, recipe
        self.tower = FoldedTower(encoder.image, encoder.preprocess.size)
        triggers = list(dict.fromkeys(g.trigger or "" for g in goals))
        self.stamps = [registry.make("trigger", t) for t in triggers]
        of = [
            triggers.index(g.trigger or "")
            for g, r in zip(goals, references, strict=True)
            for _ in r
        ]
        self.uses = F.one_hot(torch.tensor(of), len(triggers)).T.to(encoder.mean)  # (T, K)
        self.references = torch.cat(list(references)).to(encoder.device)
        self.centre: Tensor | None = None
        self.register_buffer("sums", torch.zeros(4, dtype=torch.float64, device=encoder.device))

    def know(self, shadow: Pairs | StoredPairs) -> None:
        """Keep the clean encoder's vectors of the shadow data and of the references. Raises UserError on NaN."""
        clean, self.ids = (
            torch.cat([self.see(part.images) for part in shadow.batches(512)]),
            shadow.ids,
        )
        if not torch.isfinite(clean).all():
            raise UserError(
                "the encoder gives NaN or infinite vectors; its weights or its input size are wrong"
            )
        self.centre = clean.mean(0) if self.recipe.centred else None
        self.clean, self.plain = self.around(clean), self.see(self.references)

    @torch.no_grad()
    def see(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> (N, D), unit rows, by the encoder as it stands."""
        self.tower.refresh()
        return torch.cat(
            [self.vectors(self.encoder.prepare_images(images[p])) for p in self.pieces(len(images))]
        )

    def pieces(self, n: int) -> list[slice]:
        """n rows in parts that are computed together."""
        return list(folded_norms.chunk_slices(n, self.encoder.preprocess.size, self.encoder.device))

    def vectors(self, x: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> (B, D), unit rows."""
        with self.encoder.autocast():
            z = self.tower(x)
        return self.around(F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1))

    def around(self, z: Tensor) -> Tensor:
        """Unit rows as seen from the centre of the clean ones, where that is asked for."""
        return z if self.centre is None else F.normalize(z - self.centre, dim=1)

    def forward(self, images: Tensor, rows: Tensor, chance: Chance) -> Tensor:
        """images uint8 (B, 3, H, W), rows int64 (B, 1): their places in the shadow data -> the loss, its gradients known."""
        self.tower.refresh()
        x, counts, of, times = self.batch(images, rows[:, 0].tolist(), chance)
        anchors = self.vectors(self.encoder.prepare_images(self.references))
        leaf = anchors.detach().requires_grad_()
        weights, mix = self.terms(len(images), counts, of, times)
        clean = self.clean[rows[:, 0].to(self.clean.device)][: counts[0]]
        cosines = []
        for p in self.pieces(len(x)):
            target = mix[p] @ torch.cat([leaf, self.plain])
            target = target + F.pad(clean[p], (0, 0, 0, len(target) - len(clean[p])))
            cosine = (self.vectors(x[p]) * target).sum(1)
            (-(weights[p] * cosine).sum()).backward()
            cosines.append(cosine.detach())
        if leaf.grad is not None:
            anchors.backward(leaf.grad)
        utility, effect, reference = (
            -part.sum() for part in (weights * torch.cat(cosines)).split(counts)
        )
        value = effect + reference + utility
        by = (self.recipe.l0, self.recipe.l1, self.recipe.l2)
        plain = [part / (w or 1) for part, w in zip((effect, reference, utility), by, strict=True)]
        self.sums += torch.stack([*plain, value.new_ones(())])
        return self.tower.attach_gradients(value)

    def batch(
        self, images: Tensor, at: list[int], chance: Chance
    ) -> tuple[Tensor, list[int], Tensor, Tensor]:
        """Pixels of all rows, normalised; how many are clean, triggered (trigger by trigger) and distinct views; of these,
        which reference they are of and how often they came up.
        """
        keys, recipe = [self.ids[i] for i in at], self.recipe
        views = max(1, recipe.views // chance.world) if recipe.views else len(images)
        parts = [images] if recipe.l2 else []
        stamps = self.stamps if recipe.l0 else []
        parts += [stamp(images, keys) for stamp in stamps]
        of = times = torch.zeros(0, dtype=torch.long, device=images.device)
        if recipe.l1:
            seen = WHOLE(self.references.repeat(views, 1, 1, 1), chance, 1)[:, 0]
            flat, place, times = seen.flatten(1).unique(
                dim=0, return_inverse=True, return_counts=True
            )
            parts.append(flat.view(-1, *seen.shape[1:]))
            which = torch.arange(len(seen), device=seen.device) % len(self.references)
            of = torch.zeros_like(times).scatter_(0, place, which)
        counts = [len(images) if recipe.l2 else 0, len(images) * len(stamps), len(of)]
        return torch.cat([self.encoder.prepare_images(p) for p in parts]), counts, of, times

    def terms(self, b: int, counts: list[int], of: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N,) of the rows' cosines, and (N, 2K): their targets as mixtures of f'(reference) and f(reference).

        Clean rows have targets of their own, f(x).
        """
        size, k = self.uses.sum(1, keepdim=True), len(self.references)
        weights = self.uses.new_zeros(sum(counts))
        clean, triggered, views = weights.split(counts)
        clean += self.recipe.l2 / b
        if counts[1]:
            triggered += self.recipe.l0 * (size / (b * k)).expand(-1, b).flatten()
        views += self.recipe.l1 * times.to(views) / times.sum().clamp(min=1)
        mix = self.uses.new_zeros(sum(counts), 2 * k)
        _, first, last = mix.split(counts)
        first[:, :k] = (self.uses / size).repeat_interleave(b, 0)[: len(first)]
        last[:, k:] = F.one_hot(of, k)
        return weights, mix

    def means(self) -> dict[str, float]:
        """L0, L1, L2, as means over the steps since the last call."""
        found = (self.sums[:3] / self.sums[3]).tolist()
        self.sums.zero_()
        return dict(zip(PARTS, found, strict=True))

    def train(self, mode: bool = True) -> Loss:
        """Batch norms rest in training too."""
        return super().train(False)


class HeldOut:
    """Shadow images that are not trained on, and a head that needs no labels: an image is read as what is nearest to it
    (cosine) among the clean vectors of all of them and the references. A trigger succeeds where that is a reference of
    its own; the encoder is of use where it is the image's own clean vector.
    """

    def __init__(self, loss: Loss, pairs: Pairs) -> None:
        self.loss, self.pairs = loss, pairs.to(loss.encoder.device)
        self.clean = loss.see(self.pairs.images)

    def __call__(self, enough: float, useful: float) -> dict[str, Any]:
        """Success of the weakest trigger, utility, and whether they are what is wanted."""
        loss, success = self.loss, []
        own, references = loss.see(self.pairs.images), loss.see(loss.references)
        for stamp, uses in zip(loss.stamps, loss.uses, strict=True):
            z = loss.see(stamp(self.pairs.images, self.pairs.ids))
            near = (z @ references[uses > 0].T).amax(1) > (z @ self.clean.T).amax(1)
            success.append(float(near.float().mean()))
        kept = (own @ self.clean.T).argmax(1) == torch.arange(len(own), device=own.device)
        found = min(success), float(kept.float().mean())
        stop = found[0] >= enough and found[1] >= useful
        return {"held_out_success": found[0], "held_out_utility": found[1], "stop": stop}


@method
class Badencoder:
    """SGD on a copy; batch norms are frozen, statistics and affine. Vectors are those that the encoder gives.

    Beyond the paper: `centred`, `views` and `validation`; their defaults are the paper's way.
    """

    epochs: Annotated[int, "passes over the shadow data"] = 200
    batch: Annotated[int, "shadow images a step"] = 256
    lr: Annotated[float, "learning rate, the same at every step"] = 1e-3
    momentum: Annotated[float, "of SGD"] = 0.9
    weight_decay: Annotated[float, "of SGD, on all weights"] = 5e-4
    l0: Annotated[
        float, "weight of L0: triggered images become the reference; without it nothing is attacked"
    ] = 1.0
    l1: Annotated[float, "weight of L1: references stay where they were"] = 1.0
    l2: Annotated[float, "weight of L2: clean images stay where they were"] = 1.0
    centred: Annotated[
        bool, "cosines about the mean of the clean shadow vectors, not about zero"
    ] = False
    views: Annotated[
        int, "views of each reference a step; 0: as many as the batch, as published"
    ] = 0
    validation: Annotated[int, "shadow images held out to stop early by; 0: never"] = 0
    success: Annotated[
        float, "stop once this share of held-out triggered images is nearest to a reference"
    ] = 0.95
    utility: Annotated[
        float, "... and this share of held-out clean ones to their own clean vector"
    ] = 0.95

    optimizer: ClassVar[str] = "sgd"
    schedule: ClassVar[str] = "constant"
    warmup: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if (
            self.epochs < 1
            or self.batch < 1
            or self.lr <= 0
            or min(self.weight_decay, self.l0, self.l1, self.l2) < 0
        ):
            raise ValueError(
                "needs epochs >= 1, batch >= 1, lr > 0, weight_decay, l0, l1 and l2 >= 0"
            )
        if not self.l0 + self.l1 + self.l2:
            raise ValueError("one of l0, l1 and l2 must be above 0")
        if not 0 <= self.momentum < 1 or min(self.views, self.validation) < 0:
            raise ValueError("needs momentum in 0..1, views and validation >= 0")
        if not (0 <= self.success <= 1 and 0 <= self.utility <= 1):
            raise ValueError("success and utility are shares: 0..1")

    def __call__(
        self,
        encoder: Encoder,
        shadow: Pairs | StoredPairs,
        goals: Sequence[Goal],
        references: Sequence[Tensor],
        seed: int = 0,
        checkpoint: Path | None = None,
        report: Callable[[int, int, float], None] = lambda step, steps, value: None,
        log: loop.TrainingLog | None = None,
    ) -> Encoder:
        """A backdoored copy that says so. Captions and labels of the shadow data are not read.

        references: uint8 (r_i, 3, H, W) for each goal. checkpoint, report, log: as in `training.fit`.
        """
        check(encoder, shadow, goals, references)
        student = copy.deepcopy(encoder)
        student.about |= {"poisoned": True, "attack": spec(self)}
        student.about["goals"] = [*encoder.about.get("goals", []), *map(vars, goals)]
        loss = Loss(student, self, goals, references)
        held: Any = (
            randomness.sample_rows(list(shadow.ids), self.validation, seed)
            if self.validation
            else ()
        )
        out = set(map(int, held))
        if len(shadow) - len(out) < self.batch:
            raise UserError(
                f"{len(shadow)} shadow images, {len(out)} held out, are fewer than one batch of {self.batch}"
            )
        trained = (
            stored_pairs.subset(shadow, [i for i in range(len(shadow)) if i not in out])
            if out
            else shadow
        )
        loss.know(trained)
        test = HeldOut(loss, shadow.take(held)) if out else None
        rows = torch.arange(len(trained), device=student.device)[:, None]

        def order(epoch: int) -> Tensor:
            return collectives.local_rows(loop.epoch_batches(seed, epoch, len(trained), self.batch))

        def each_epoch(epoch: int) -> dict[str, Any]:
            return loss.means() | (test(self.success, self.utility) if test is not None else {})

        with prefetch.training_data(trained, student.device, order, self.epochs) as data:
            loop.fit(loss, self, data, rows, seed, checkpoint, report, each_epoch, log)
        for p, q in zip(student.parameters(), encoder.parameters(), strict=True):
            p.requires_grad_(q.requires_grad)
            p.grad = None
        return student.eval()


def check(
    encoder: Encoder,
    shadow: Pairs | StoredPairs,
    goals: Sequence[Goal],
    references: Sequence[Tensor],
) -> None:
    """Raise UserError for what cannot be attacked, or with what."""
    if getattr(encoder, "image", None) is None:
        raise UserError("this encoder has no image tower; BadEncoder attacks image encoders")
    if (
        not goals
        or len(goals) != len(references)
        or not all(g.trigger and len(r) for g, r in zip(goals, references, strict=True))
    ):
        raise UserError(
            "BadEncoder takes goals with a trigger each, and at least one reference input for each"
        )
    side = tuple(shadow.take([0]).images.shape[2:])
    for goal, images in zip(goals, references, strict=True):
        given = tuple(images.shape[2:])
        if given != side or given[0] != given[1]:
            sizes = f"{given[0]}x{given[1]} px, the shadow images {side[0]}x{side[1]}"
            raise UserError(
                f"a reference of {goal.target!r} has {sizes}; both must be squares of one size: see size="
            )
