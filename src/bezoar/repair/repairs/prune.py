"""Fine-pruning: channels inactive on clean images go, then fine-tuning (Liu et al., RAID 2018)."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method
from bezoar.repair import rate_ladder
from bezoar.repair.rate_ladder import ValidationMetric
from bezoar.training.augmentation import Chance

TRIES = 32  # numbers of channels that are tried: each another thirty-second of them


@dataclass(frozen=True)
class LastConvolution:
    """The last convolution that an image tower runs.

    Attributes:
        conv: its name.
        norm: name of the batch norm that reads it; "" for none.
        activity: float32 (C,), each channel's mean over clean images and places of its feature map.
    """

    conv: str
    norm: str
    activity: Tensor

    def silence(self, tower: nn.Module, channels: Tensor) -> None:
        """Set weights and biases of channels, int64 (n,), to 0, in the convolution and its norm."""
        parts: list[Any] = [tower.get_submodule(name) for name in (self.conv, self.norm) if name]
        with torch.no_grad():
            for part in parts:
                for p in (part.weight, part.bias):
                    if p is not None:
                        p[channels] = 0


class SilencedLoss(nn.Module):
    """A loss under which pruned channels stay pruned: they are silenced again before every step."""

    def __init__(self, loss: nn.Module, silence: Callable[[], None]) -> None:
        super().__init__()
        self.loss = loss
        self.silence = silence
        if begin := getattr(loss, "begin", None):
            self.begin = begin

    def forward(self, images: Tensor, tokens: Tensor, chance: Chance) -> Tensor:
        """As the loss."""
        self.silence()
        value: Tensor = self.loss(images, tokens, chance)
        return value


@method
class Prune:
    """Prunes channels of the last convolution in the order of their mean activation.

    As many are pruned as cost at most `drop` of the clean validation score. BackdoorBench: at most
    10 % of the accuracy. In a residual block the branch is silenced, the shortcut stays.
    """

    drop: Annotated[
        float, "how far the clean validation score may fall by pruning, before fine-tuning"
    ] = 0.1
    objective: Annotated[
        str,
        "fine-tuning afterwards: loss and recipe; none; auto: clip, supervised for a classifier "
        "with its own head, or simclr without text",
    ] = "auto"
    lrs: Annotated[
        tuple[float, ...], "learning rates, tried from the largest down until one keeps the score"
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
        """Prune and fine-tune a copy. Raises UserError for a tower without convolutions."""
        metric = ValidationMetric.of(encoder, clean, validation)
        last = find_last_convolution(encoder, clean)
        order = last.activity.argsort(stable=True)
        student, tried = self.prune(encoder, metric, last, order, report)
        before = tried[0]["score"]
        pruned = max(t["channels"] for t in tried if before - t["score"] <= self.drop)
        if log is not None:
            log["pruned"] = {
                "channels": pruned,
                "of": len(order),
                "layer": last.conv,
                "tried": tried,
            }
        if self.objective == "none":
            return rate_ladder.mark_repaired(student, registry.spec(self))

        objective = rate_ladder.select_objective(
            self.objective,
            encoder,
            clean,
            with_text="clip:epochs=4,batch=64",
            alone="simclr:epochs=4,batch=64",
        )
        tokens = rate_ladder.tokenize_for(encoder, objective, clean)
        channels = order[:pruned]

        def make(lr: float) -> Encoder:
            recipe = replace(objective, lr=lr)

            def loss_of(candidate: Encoder) -> nn.Module:
                tower = candidate.image
                return SilencedLoss(recipe(candidate), lambda: last.silence(tower, channels))

            tuned = rate_ladder.train_copy(
                student, recipe, loss_of, clean, tokens, seed, report, f"prune: tuning at {lr:g}"
            )
            last.silence(tuned.image, channels)
            return tuned

        # the rate keeps the score of the encoder before pruning
        tuned = rate_ladder.train_at_largest_rate(
            encoder, metric, self.lrs, self.tolerance, make, log
        )
        return rate_ladder.mark_repaired(tuned, registry.spec(self))

    def prune(
        self,
        encoder: Encoder,
        metric: ValidationMetric,
        last: LastConvolution,
        order: Tensor,
        report: ProgressReport,
    ) -> tuple[Encoder, list[dict[str, Any]]]:
        """A copy pruned as far as `drop` allows, and the score for each number of channels tried.

        order: int64 (C,), the channels in the order of pruning.
        """
        student = copy.deepcopy(encoder)
        before = metric.score(encoder)
        tried: list[dict[str, Any]] = [{"channels": 0, "score": before}]
        for i in range(1, TRIES):
            count = i * len(order) // TRIES
            candidate = copy.deepcopy(encoder)
            last.silence(candidate.image, order[:count])
            score = metric.score(candidate)
            tried.append({"channels": count, "score": score})
            report(i, TRIES, f"prune: {count} of {len(order)} channels")
            if before - score > self.drop:
                break
            student = candidate
        return student, tried


def find_last_convolution(encoder: Encoder, clean: Pairs, batch: int = 512) -> LastConvolution:
    """Find the last convolution of an image tower, and its channels' activity on clean images.

    Raises:
        UserError: for a tower without a convolution after its first layer.
    """
    tower = encoder.image
    total: Tensor | float = 0.0
    with record_feature_maps(tower) as feature_maps, torch.no_grad():
        encoder.eval()
        for images in torch.split(clean.images, batch):
            feature_maps.clear()
            encoder.encode_images(images)
            names = [name for name, _ in feature_maps]
            convs = [name for name in names if isinstance(tower.get_submodule(name), nn.Conv2d)]
            if len(convs) < 2:
                raise UserError(
                    "repair 'prune' takes convolutional towers; this one has no convolution behind "
                    "its first layer"
                )
            channels = tower.get_submodule(convs[-1]).out_channels
            last_map = [y for _, y in feature_maps if y.shape[1] == channels][-1]  # (B, C, h, w)
            total = total + last_map.float().mean((2, 3)).sum(0)
    assert isinstance(total, Tensor)
    later = names[names.index(convs[-1]) + 1 :]
    has_norm = bool(later) and isinstance(tower.get_submodule(later[0]), _BatchNorm)
    activity = (total / len(clean)).cpu()
    return LastConvolution(convs[-1], later[0] if has_norm else "", activity)


@contextmanager
def record_feature_maps(tower: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """List (name, feature map (B, C, h, w)) of all modules that run in the block, in order."""
    feature_maps: list[tuple[str, Tensor]] = []

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                feature_maps.append((name, output))

        return hook

    handles = [
        module.register_forward_hook(hook_of(name))
        for name, module in tower.named_modules()
        if name
    ]
    try:
        yield feature_maps
    finally:
        for handle in handles:
            handle.remove()
