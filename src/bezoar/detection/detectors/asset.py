"""Records that do not cancel against clean ones: ASSET's offset (Zeng et al., USENIX Security
2023).
"""

import copy
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.detection.detectors import RecordEncoder, Records, caption_cosines
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method
from bezoar.runs import inputs
from bezoar.runs.verb import spec_of_path

DECAY = 0.01


@method
class Asset:
    """Tune a copy of the encoder to fit clean pairs and, at once, to misfit the scanned ones.

    The two aims cancel for what both sets hold. Nothing clean holds a poison's trigger together
    with its caption, so there the second aim has its way. Score: minus the cosine of image and
    caption under the tuned copy.

    The objective is mean_D cos(z, w) - weight mean_B cos(z, w), minimised by AdamW over batches of
    the scanned data D and of the clean set B, with the norms' statistics as they are. With a weight
    of 1 it has the form of the paper's outer loop, whose losses are those of classifiers and of
    encoders without captions; then clean pairs drifted too (AUROC of 200 patches .96, with 2
    1.000). The paper's inner loop, a second network that fills batches with likely poisons, is left
    out, and so is its threshold.
    """

    clean: Annotated[
        str, "needed: pairs known to be clean and like the scanned ones: a path or a spec"
    ] = ""
    steps: Annotated[int, "of AdamW"] = 200
    batch: Annotated[int, "pairs of either set in a step"] = 128
    lr: Annotated[float, "learning rate"] = 3e-4
    weight: Annotated[float, "of a clean pair, that of a scanned one being 1"] = 2.0
    seed: Annotated[int, "seed of the batches"] = 0

    needs: ClassVar[tuple[str, ...]] = ("report",)
    reads_training: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (
            not 1 <= self.steps <= 1_000_000
            or not 2 <= self.batch <= 1 << 16
            or not 0 < self.lr < 1
        ):
            raise ValueError("needs steps in 1..1000000, batch in 2..65536 and lr in (0, 1)")
        if not 0 < self.weight <= 1000:
            raise ValueError(f"weight is above 0 and at most 1000; got {self.weight}")
        if self.clean:
            self.clean_source()

    def clean_source(self) -> Any:
        """The configured source of the clean pairs. Raises UserError where there is none."""
        return registry.make("data", spec_of_path("data", self.clean))

    def files(self) -> list[Any]:
        """Return what the scores depend on besides the fields: the files of the clean pairs."""
        return registry.input_files(self.clean_source()) if self.clean else []

    def __call__(
        self, encoder: RecordEncoder, source: Records, report: ProgressReport = no_report
    ) -> Scores:
        """-> Scores. Raises UserError without clean pairs, captions, or an encoder to tune."""
        if not self.clean:
            raise UserError("detector 'asset' needs clean=, pairs that are known to be clean")
        if not isinstance(encoder, Encoder):
            raise UserError("detector 'asset' tunes a copy of the encoder; here are vectors alone")
        if encoder.text is None or not source.take([0]).captions:
            raise UserError("detector 'asset' needs captions; the data or the encoder has none")
        clean = inputs.read_pairs(self.clean_source())
        if not clean.captions:
            raise UserError(
                f"detector 'asset' needs captions; the clean pairs {self.clean} have none"
            )
        tuned = self.tune(encoder, source, clean, report).embed(source)
        return Scores(tuned.ids, -caption_cosines(tuned, "'asset'"))

    def tune(
        self, encoder: Encoder, source: Records, clean: Pairs, report: ProgressReport
    ) -> Encoder:
        """A copy of the encoder after the steps."""
        tuned = copy.deepcopy(encoder).requires_grad_(True).eval()
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=self.lr, weight_decay=DECAY)
        for step in range(self.steps):
            draw = generator(self.seed, step)
            suspects = source.take(torch.randint(len(source), (self.batch,), generator=draw))
            base = clean.take(torch.randint(len(clean), (self.batch,), generator=draw))
            loss = mean_cosine(tuned, suspects) - self.weight * mean_cosine(tuned, base)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report(step + 1, self.steps, "steps")
        return tuned


def mean_cosine(encoder: Encoder, pairs: Pairs) -> Tensor:
    """The mean cosine of the images with their captions, a scalar."""
    images = encoder.encode_images(pairs.images.to(encoder.device))
    captions = encoder.encode_tokens(encoder.tokenize(pairs.captions))
    return (images * captions).sum(1).mean()
