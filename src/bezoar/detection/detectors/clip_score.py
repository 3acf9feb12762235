"""Disagreement of image and caption: one minus their cosine (CLIPScore, Hessel et al., EMNLP
2021).
"""

from pathlib import Path
from typing import Annotated, ClassVar

from bezoar.detection.detectors import RecordEncoder, Records, caption_cosines
from bezoar.detection.reference_reading import open_reference, reference_files
from bezoar.evaluation.scores import Scores
from bezoar.registry import method


@method
class ClipScore:
    """1 - cos(f_I(x), f_T(t)).

    By default by the scan's encoder. When that is the model trained on the suspect data, the sign
    turns during its training: poisons agree least early (`loss_trace:of=disagreement,epochs=1`)
    and, once they have taken, most late. `encoder` names an independent one, which is what the
    field uses.
    """

    encoder: Annotated[
        str,
        "an independent encoder: a file of weights, a run's directory or a spec; empty: the scan's",
    ] = ""

    run_fields: ClassVar[dict[str, str]] = {"encoder": "encoder"}

    def files(self) -> list[Path]:
        """Return what scores depend on besides the fields: weights of the independent encoder."""
        return reference_files(self.encoder)

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores in [0, 2]; a caption that does not fit its image is suspicious."""
        judge = open_reference(self.encoder, encoder.device) if self.encoder else encoder
        embedded = judge.embed(source)
        return Scores(embedded.ids, 1 - caption_cosines(embedded, "'clip_score'"))
