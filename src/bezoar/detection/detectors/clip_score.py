"""Disagreement of image and caption: one minus their cosine (CLIPScore, Hessel et al., EMNLP 2021)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from bezoar import registry
from bezoar.detection import training_traces
from bezoar.detection.detectors import RecordEncoder, Records, caption_cosines
from bezoar.detection.reference_reading import open_reference, reference_files
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method


@method
class ClipScore:
    """1 - cos(f_I(x), f_T(t)), by one of three models.

    By default it is the scan's encoder. When that is the model trained on the suspect data, the
    sign turns during its training: poisons agree least early and, once they have taken, most late.
    `encoder` names an independent one, which is what the field uses. `epoch` takes a small model
    trained on the scanned data as it was after so many epochs, before it has learnt the poisons.
    """

    encoder: Annotated[
        str,
        "an independent encoder: a file of weights, a run's directory or a spec; empty: the scan's",
    ] = ""
    epoch: Annotated[
        int,
        "epoch of a training on the scanned data after which the model is taken; 0: no training",
    ] = 0
    network: Annotated[str, "spec of the model that is trained"] = training_traces.NETWORK
    objective: Annotated[str, "spec of its training"] = training_traces.OBJECTIVE
    side: Annotated[int, "images are reduced to this side in pixels"] = training_traces.SIDE
    seed: Annotated[int, "seed of that training"] = 0

    needs: ClassVar[tuple[str, ...]] = ("report",)

    def __post_init__(self) -> None:
        if self.epoch < 0 or self.side < 1:
            raise ValueError(f"needs epoch >= 0 and side >= 1; got {self.epoch}, {self.side}")
        if self.epoch and self.encoder:
            raise ValueError("give either an independent encoder or an epoch of the own one")
        registry.make("network", self.network)
        if self.epoch > registry.make("objective", self.objective).epochs:
            raise ValueError(
                f"epoch={self.epoch} is more than objective {self.objective!r} trains for"
            )

    def files(self) -> list[Path]:
        """Return what the scores depend on besides the fields: the weights of the independent encoder."""
        return reference_files(self.encoder)

    def __call__(
        self, encoder: RecordEncoder, source: Records, report: ProgressReport = no_report
    ) -> Scores:
        """-> Scores in [0, 2]; a caption that does not fit its image is suspicious."""
        if self.epoch:
            trace = training_traces.trace(
                source,
                self.network,
                self.objective,
                self.seed,
                encoder.device,
                self.side,
                report,
                upto=self.epoch,
            )
            return Scores(trace.ids, 1 - trace.agreement[self.epoch - 1])
        judge = open_reference(self.encoder, encoder.device) if self.encoder else encoder
        embedded = judge.embed(source)
        return Scores(embedded.ids, 1 - caption_cosines(embedded, "'clip_score'"))
