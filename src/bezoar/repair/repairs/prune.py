"""Fine-pruning: channels of the last convolution that sleep on clean images go, then fine-tuning (Liu et al., RAID 2018)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.registry import method, spec
from bezoar.repair import rate_ladder
from bezoar.training.augmentation import Chance

TRIES = 32  # how many counts of channels are tried: each another thirty-second of them


@dataclass(frozen=True)
class Last:
    """The last convolution that runs, by name, the norm that reads it ('' for none), and what its channels did.

    activity: float32 (C,), mean over clean images and places of the last feature map.
    """

    conv: str
    norm: str
    activity: Tensor

    def silence(self, tower: nn.Module, channels: Tensor) -> None:
        """Let channels of the convolution, and of its norm, give nothing. channels: int64 (n,)."""
        parts: list[Any] = [tower.get_submodule(name) for name in (self.conv, self.norm) if name]
        with torch.no_grad():
            for p in (p for part in parts for p in (part.weight, part.bias) if p is not None):
                p[channels] = 0


class Silenced(nn.Module):
    """A loss under which pruned channels stay pruned: they are silenced again before every step."""

    def __init__(self, loss: nn.Module, tower: nn.Module, last: Last, channels: Tensor) -> None:
        super().__init__()
        self.loss, self.again = loss, lambda: last.silence(tower, channels)
        if begin := getattr(loss, "begin", None):
            self.begin = begin

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """As the loss."""
        self.again()
        return self.loss(images, tokens, chance)


@method
class Prune:
    """Channels go in the order of their mean activation, as many as cost at most `drop` of the clean validation score.

    BackdoorBench: at most 10 % of the accuracy. In a residual block the branch goes silent, the shortcut stays.
    """

    drop: Annotated[
        float, "how far the clean validation score may fall by pruning, before it is tuned"
    ] = 0.1
    objective: Annotated[
        str, "fine-tuning afterwards: loss and recipe; none; auto: clip, or simclr without text"
    ] = "auto"
    lrs: Annotated[
        tuple[float, ...], "learning rates, tried from the largest down (see `ladder`)"
    ] = (8e-3, 4e-3, 2e-3)
    tolerance: Annotated[float, "how far the clean validation score may fall in the end"] = 0.02

    needs: ClassVar[tuple[str, ...]] = ("validation", "report", "log")

    def __post_init__(self) -> None:
        rate_ladder.check_rates(self.lrs, self.tolerance)
        if not 0 <= self.drop <= 1:
            raise ValueError("needs drop in 0..1")
        if self.objective not in ("auto", "none"):
            registry.make("objective", self.objective)

    def __call__(
        self,
        encoder: Encoder,
        clean: Pairs,
        seed: int,
        validation: Pairs,
        report: ProgressReport = no_report,
        log: dict[str, Any] | None = None,
    ) -> Encoder:
        """A copy without the sleepers. Raises UserError for an image tower without convolutions to prune."""
        ruler, last = (
            rate_ladder.ValidationMetric.of(encoder, clean, validation),
            dormant(encoder, clean),
        )
        order, student = last.activity.argsort(stable=True), copy.deepcopy(encoder)
        before = ruler.score(encoder)
        tried = [{"channels": 0, "score": before}]
        for i in range(1, TRIES):
            count = i * len(order) // TRIES
            less = copy.deepcopy(encoder)
            last.silence(less.image, order[:count])
            tried.append({"channels": count, "score": ruler.score(less)})
            report(i, TRIES, f"prune: {count} of {len(order)} channels")
            if before - tried[-1]["score"] > self.drop:
                break
            student = less
        gone = max((t["channels"] for t in tried if before - t["score"] <= self.drop), default=0)
        if log is not None:
            log["pruned"] = {
                "channels": int(gone),
                "of": len(order),
                "layer": last.conv,
                "tried": tried,
            }
        if self.objective != "none":
            student = self.tuned(
                encoder, student, last, order[: int(gone)], clean, seed, ruler, report, log
            )
        return rate_ladder.mark_repaired(student, spec(self))

    def tuned(
        self,
        encoder: Encoder,
        student: Encoder,
        last: Last,
        channels: Tensor,
        clean: Pairs,
        seed: int,
        ruler: rate_ladder.ValidationMetric,
        report: ProgressReport,
        log: dict[str, Any] | None,
    ) -> Encoder:
        """Fine-tuned with its channels still gone; the rate by what is left of the first encoder's score."""
        auto = "simclr:epochs=4,batch=64" if encoder.text is None else "clip:epochs=4,batch=64"
        recipe = registry.make("objective", auto if self.objective == "auto" else self.objective)
        tokens = rate_ladder.tokenize_for(encoder, recipe, clean)

        def make(lr: float) -> Encoder:
            chosen = replace(recipe, lr=lr)

            def loss_of(e: Encoder) -> nn.Module:
                return Silenced(chosen(e), e.image, last, channels)

            made = rate_ladder.train_copy(
                student, chosen, loss_of, clean, tokens, seed, report, f"prune: tuning at {lr:g}"
            )
            last.silence(made.image, channels)
            return made

        return rate_ladder.train_at_largest_rate(
            encoder, ruler, self.lrs, self.tolerance, make, log
        )


def dormant(encoder: Encoder, clean: Pairs, batch: int = 512) -> Last:
    """Find the last convolution and see what its channels do on clean images. Raises UserError for other towers."""
    tower = encoder.image
    with watched(tower) as seen, torch.no_grad():
        encoder.eval()
        total: Tensor | float = 0.0
        for x in clean.images.split(batch):
            seen.clear()
            encoder.encode_images(x)
            convs = [name for name, _ in seen if isinstance(tower.get_submodule(name), nn.Conv2d)]
            if len(convs) < 2:
                raise UserError(
                    "repair 'prune' takes convolutional towers; this one has no convolution behind its first layer"
                )
            maps = [y for _, y in seen if y.shape[1] == tower.get_submodule(convs[-1]).out_channels]
            total = total + maps[-1].float().mean((2, 3)).sum(0)
        names = [name for name, _ in seen]
    after = names[names.index(convs[-1]) + 1 :]
    follows = bool(after) and isinstance(
        tower.get_submodule(after[0]), nn.modules.batchnorm._BatchNorm
    )
    assert isinstance(total, Tensor)
    return Last(convs[-1], after[0] if follows else "", (total / len(clean)).cpu())


@contextmanager
def watched(tower: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Inside, every feature map (B, C, h, w) that a module of the tower gives, with its name, in the order they come."""
    seen: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, given: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.ndim == 4:
                seen.append((name, out))

        return look

    handles = [m.register_forward_hook(hook(name)) for name, m in tower.named_modules() if name]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
