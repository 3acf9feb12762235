"""What a second encoder, which cannot carry the same backdoor, does not explain (Platonic Defense,
2026).
"""

from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from bezoar.data.pairs import Pairs
from bezoar.detection.left_out_ridge import fit_ridge, stack_float64
from bezoar.detection.reference_reading import open_reference, reference_files
from bezoar.encoders.encoder import Encoder, embed_records
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.registry import method

MIN_CLEAN = 20  # clean images of which a map between two spaces can say anything


@method
class CrossEncoder:
    """Score: the length of what a map from the reference's space leaves of the image's vector.

    A ridge regression maps the reference's vectors of the clean images to the encoder's. A clean
    image lies where its content puts it, which both see; a trigger moves it in one space alone. No
    class is read, so the check serves any encoder.

    After "Platonic Defense" (arXiv 2606.29451, 2026), of which the README alone could be read. Its
    map is trained; ours is the closed form, with the strength that predicts left-out images best.
    """

    reference: Annotated[
        str,
        "needed: an encoder of other origin: a file of weights, a run's directory or a spec",
    ] = ""

    run_fields: ClassVar[dict[str, str]] = {"reference": "encoder"}
    needs: ClassVar[tuple[str, ...]] = ("clean",)

    def files(self) -> list[Path]:
        """Return what the scores depend on besides the fields: the weights of the reference."""
        return reference_files(self.reference)

    def __call__(self, encoder: Encoder, images: Pairs, clean: Pairs) -> Scores:
        """-> Scores. Raises UserError without a reference, and for too few clean images."""
        if not self.reference:
            raise UserError("check 'cross_encoder' needs reference=, an encoder of other origin")
        if len(clean) < MIN_CLEAN:
            raise UserError(
                f"cross_encoder needs at least {MIN_CLEAN} clean images; there are {len(clean)}"
            )
        reference = open_reference(self.reference, encoder.device)

        def embed(records: Pairs) -> tuple[Tensor, Tensor]:
            vectors = (embed_records(e, records) for e in (reference, encoder))
            x, y = (stack_float64(v, encoder.device) for v in vectors)
            return x, y

        if not reference.reads_images:
            raise UserError(
                f"check 'cross_encoder': the reference {self.reference} reads no images"
            )
        x, y = embed(clean)
        if x.shape == y.shape and torch.equal(x, y):
            raise UserError(
                "check 'cross_encoder': the reference is this encoder itself, which explains "
                "everything; give one of other origin"
            )
        fit = fit_ridge(x, y)
        x, y = embed(images)
        length = (y - fit.predict(x)).norm(dim=1)
        notes = {"clean": len(clean), "clean_length": float(fit.left_out.norm(dim=1).mean())}
        return Scores(images.ids, length.float().cpu(), notes=notes)
