"""How fast a pair is learnt: loss or agreement while a small model is trained (ABL, Li et al.,
NeurIPS 2021; in CLIP).
"""

from typing import Annotated, ClassVar, Literal

from torch import Tensor

from bezoar import registry
from bezoar.detection import training_traces
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.detection.training_traces import Trace
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method


@method
class LossTrace:
    """Score = the loss against fixed captions, or 1 - cosine, in some epochs of a training on the
    scanned data.

    early, high: not yet learnt: captions that do not fit, wrong ones and poisons alike. early, low:
    learnt fast, which is ABL's sign of a backdoor in a classifier; here it is the wrong way round.
    late, high: never learnt: wrong captions, and poisons that did not take. rise: learnt after all,
    the poisons rather than the wrong captions, where the backdoor takes.

    AUROC on scenes with 5 % wrong captions, six epochs, the first two averaged, for two backdoors
    of 0.2 % (20,000 records) and, among 5,552 records, four backdoors and targeted victims, 5 %
    each: early high 0.81, 0.96, 0.62, 0.81; the same of 1 - cosine 0.75, 0.96, 0.67, 0.81; early
    low 0.19, 0.04, 0.38, 0.19; late high 0.69, 0.94, 0.64, 0.70; rise 0.81, 0.77, 0.48, 0.60, whose
    recall in the worst 1 % was the best of the first two, 0.07 and 0.28. Wrong captions fill the
    top: precision is low with every setting.
    """

    when: Annotated[
        Literal["early", "late", "rise"],
        "first epochs, last epoch, or the first ones less the last",
    ] = "early"
    direction: Annotated[Literal["low", "high"], "which end is suspicious"] = "high"
    of: Annotated[
        Literal["loss", "disagreement"], "loss, or one minus the cosine of image and caption"
    ] = "loss"
    epochs: Annotated[int, "how many of the first epochs are averaged"] = 2
    network: Annotated[str, "spec of the small model"] = training_traces.NETWORK
    objective: Annotated[str, "spec of its training"] = training_traces.OBJECTIVE
    side: Annotated[int, "images are reduced to this many pixels a side"] = training_traces.SIDE
    seed: Annotated[int, "seed of the training and of the captions"] = 0

    needs: ClassVar[tuple[str, ...]] = ("report",)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.side < 1:
            raise ValueError(f"needs epochs >= 1 and side >= 1; got {self.epochs}, {self.side}")
        registry.make("network", self.network)
        if self.epochs > registry.make("objective", self.objective).epochs:
            raise ValueError(
                f"epochs={self.epochs} is more than objective {self.objective!r} trains for"
            )

    def __call__(
        self, encoder: RecordEncoder, source: Records, report: ProgressReport = no_report
    ) -> Scores:
        """-> Scores: nats, or cosines. Of the encoder only the device is used."""
        trace = training_traces.trace(
            source,
            self.network,
            self.objective,
            self.seed,
            encoder.device,
            self.side,
            report,
            upto=self.epochs if self.when == "early" else 0,
        )
        value = self.misfit(trace)
        return Scores(trace.ids, value if self.direction == "high" else -value)

    def misfit(self, trace: Trace) -> Tensor:
        """float32 (N,): how badly each pair fits in the chosen epochs."""
        epochs = trace.loss if self.of == "loss" else 1 - trace.agreement
        early, late = epochs[: self.epochs].mean(0), epochs[-1]
        return {"early": early, "late": late, "rise": early - late}[self.when]
