"""What an encoder that never saw the data does not explain (Platonic Defense, 2026)."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.randomness import sample_rows
from bezoar.detection.detectors import RecordEncoder, Records, caption_cosines, require_texts
from bezoar.detection.left_out_ridge import fit_ridge, stack_float64
from bezoar.detection.pseudo_classes import SAMPLE, assign_centres
from bezoar.detection.reference_reading import open_reference, reference_files
from bezoar.encoders.encoder import EmbeddedRecords
from bezoar.errors import UserError
from bezoar.evaluation.kmeans import cluster_centres
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

Evidence = Literal["auto", "gain", "caption", "length"]


@method
class CrossEncoder:
    """Compare what the suspect encoder and a reference encoder make of the same records.

    `length` and `caption`: a ridge regression maps the reference's vectors of the images to the
    suspect's. Each record is predicted by the regression without it (the closed form of
    leave-one-out), with the strength whose predictions err least. A clean image lies where its
    content puts it, which the reference sees too; a trigger moves it in the suspect's space alone.
    The residual counts by its length, or by how far it points to the mean caption of the record's
    caption group. `gain`, for a reference that reads captions: by how much the caption fits the
    image better for the suspect than for the reference.

    After "Platonic Defense" (arXiv 2606.29451, 2026), of which the README alone could be read: a
    vector is predicted from an independent encoder's, and the residual's length shows a trigger.
    Ours are leave-one-out in place of held-out clean data, which a scan does not have, `caption`
    and `gain`. AUROC on 20,000 scenes with a patch (200 records) and a colour filter (400), the
    reference a small CLIP of other scenes: gain .993, .976; caption .993, .856; length .943, .731;
    clip_score .878, .908. Units of each caption group (medians and their deviations) made all of
    them worse: the poisons of a target are half of its captions.
    """

    reference: Annotated[
        str,
        "needed: an encoder that never saw the data: a file of weights, a run's directory or a "
        "spec",
    ] = ""
    evidence: Annotated[
        Evidence, "what counts; auto: gain where both read captions, else caption, else length"
    ] = "auto"
    groups: Annotated[int, "caption groups (k-means of the captions' vectors)"] = 32
    seed: Annotated[int, "seed of the groups"] = 0

    run_fields: ClassVar[dict[str, str]] = {"reference": "encoder"}

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1; got {self.groups}")

    def files(self) -> list[Path]:
        """Return what the scores depend on besides the fields: the weights of the reference."""
        return reference_files(self.reference)

    def __call__(self, encoder: RecordEncoder, source: Records) -> Scores:
        """-> Scores; what only the suspect sees is suspicious.

        Raises:
            UserError: Where the reference cannot be opened, or captions are asked for without any.
        """
        embedded = encoder.embed(source)
        device = encoder.device
        reference = self.open_reference(device).embed(source)
        evidence = self.evidence
        if evidence == "auto" and embedded.texts is not None:
            evidence = "caption" if reference.texts is None else "gain"
        if evidence == "gain":
            suspect_fit, reference_fit = (
                caption_cosines(e, "'cross_encoder' with evidence=gain")
                for e in (embedded, reference)
            )
            return Scores(embedded.ids, suspect_fit - reference_fit)
        residual = fit_ridge(
            stack_float64(reference.images, device), stack_float64(embedded.images, device)
        ).left_out
        if evidence != "caption":
            return Scores(embedded.ids, residual.norm(dim=1).float().cpu())
        groups, centres = group_captions(embedded, self.groups, self.seed, device)
        directions = centres[groups.to(device)].double()  # (N, D)
        return Scores(embedded.ids, (residual * directions).sum(1).float().cpu())

    def open_reference(self, device: torch.device) -> RecordEncoder:
        """The encoder that the field names. Raises UserError for neither a run nor a network."""
        if not self.reference:
            raise UserError(
                "detector 'cross_encoder' needs reference=, an encoder that never saw these data"
            )
        return open_reference(self.reference, device)


def group_captions(
    embedded: EmbeddedRecords, count: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The caption group of each record, int64 (N,), and the direction of each, unit (G, D).

    Groups are those of k-means on a sample of the captions' vectors, at most `count`.
    """
    texts = require_texts(embedded, "'cross_encoder' with evidence=caption")
    rows = torch.from_numpy(sample_rows(embedded.ids, SAMPLE, seed))
    centres = cluster_centres(texts[rows.to(texts.device)].to(device).float(), count, seed)
    return assign_centres(texts, centres), F.normalize(centres, dim=1)
