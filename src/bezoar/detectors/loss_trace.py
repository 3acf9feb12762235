"""How fast a pair is learnt: loss or agreement while a small model is trained (ABL, Li et al., NeurIPS 2021; in CLIP)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from bezoar import registry, traces
from bezoar.registry import method
from bezoar.scores import Scores
from bezoar.traces import Report, Trace


@method
class LossTrace:
    """Score = the loss against a fixed pool of captions, or 1 - cosine, in some epochs of a training on the scanned data."""

    when: Annotated[Literal["early", "late", "rise"], "first epochs, last epoch, or the first ones less the last"] = "early"
    direction: Annotated[Literal["low", "high"], "which end is suspicious"] = "high"
    of: Annotated[Literal["loss", "disagreement"], "loss, or one minus the cosine of image and caption"] = "loss"
    epochs: Annotated[int, "how many of the first epochs are averaged"] = 2
    network: Annotated[str, "the small model: a spec"] = traces.NETWORK
    objective: Annotated[str, "how it is trained: a spec"] = traces.OBJECTIVE
    side: Annotated[int, "images are brought to this many pixels at most"] = traces.SIDE
    seed: Annotated[int, "of the training and of the pool"] = 0

    needs: ClassVar[tuple[str, ...]] = ("report",)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.side < 1:
            raise ValueError(f"needs epochs >= 1 and side >= 1; got {self.epochs}, {self.side}")
        registry.make("network", self.network)
        if self.epochs > registry.make("objective", self.objective).epochs:
            raise ValueError(f"epochs={self.epochs} is more than objective {self.objective!r} trains for")

    def __call__(self, encoder: Any, source: Any, report: Report = traces.silent) -> Scores:
        """-> Scores: nats, or cosines; only the device is taken of the encoder."""
        trace = traces.trace(source, self.network, self.objective, self.seed, encoder.device, self.side, report)
        value = self.value(trace)
        return Scores(trace.ids, value if self.direction == "high" else -value)

    def value(self, trace: Trace) -> Tensor:
        """float32 (N,): how badly each pair fits, then and there."""
        each = trace.loss if self.of == "loss" else 1 - trace.agreement
        early, late = each[: self.epochs].mean(0), each[-1]
        return {"early": early, "late": late, "rise": early - late}[self.when]
