"""Disagreement of image and caption: one minus their cosine (CLIPScore, Hessel et al., EMNLP 2021)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import torch

from bezoar import registry
from bezoar.detection import training_traces
from bezoar.detection.detectors import RecordEncoder, Records, require_texts
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.evaluation.scores import Scores
from bezoar.registry import method
from bezoar.runs import inputs
from bezoar.runs.run import Run
from bezoar.runs.verb import input_files

ROWS = 1 << 16  # vectors in memory at a time


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
        "an independent encoder: a run's directory or a network's spec; empty: that of the scan",
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
        """What the scores depend on besides the fields: the weights of the independent encoder."""
        if not self.encoder:
            return []
        weights = Path(self.encoder) / "encoder.safetensors"
        if weights.is_file():
            return [weights]
        files: list[Path] = input_files(registry.make("network", self.encoder))
        return files

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
        judge = self.independent_encoder(encoder.device) if self.encoder else encoder
        embedded = judge.embed(source)
        texts = require_texts(embedded, "'clip_score'")
        parts = zip(embedded.images.split(ROWS), texts.split(ROWS), strict=True)
        values = [1 - (z * w.to(z.device)).sum(1).float().cpu() for z, w in parts]
        return Scores(embedded.ids, torch.cat(values))

    def independent_encoder(self, device: torch.device) -> RecordEncoder:
        """The encoder that the field names. Raises UserError for neither a run nor a network."""
        path = Path(self.encoder)
        model = Run(path) if path.is_dir() else registry.make("network", self.encoder)
        return inputs.load_encoder(model, device)
