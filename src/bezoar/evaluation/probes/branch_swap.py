"""Branch swap (DIFE audit, 2026): swaps towers with a clean twin to find the backdoored one."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import sample_rows
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation import success
from bezoar.evaluation.probes import MAIN_MEASURES, add_prefix, select_measures
from bezoar.evaluation.scores import Measure, average
from bezoar.registry import method


@method
class BranchSwap:
    """Results `neither`, `vision`, `text` and `both` name the towers that come from the encoder.

    The published audit swaps towers between a model and one fine-tuned from it, which share a space
    (align=none). The spaces of encoders that were trained separately differ by a rotation, which is
    fitted on clean pairs; it neither adds nor removes a backdoor. A swap is meaningful if its clean
    accuracy is close to that of `both` and `neither`.
    """

    align: Annotated[
        Literal["procrustes", "none"], "rotate one space onto the other, or take them as shared"
    ] = "procrustes"
    pairs: Annotated[
        int, "clean pairs that the rotation is found on, a fixed sample of the training data"
    ] = 5000

    @property
    def needs(self) -> tuple[str, ...]:
        """The probe's further arguments; clean pairs are only needed to align the spaces."""
        return ("baseline",) if self.align == "none" else ("train", "baseline")

    def __post_init__(self) -> None:
        if self.pairs < 2:
            raise ValueError("needs pairs >= 2")

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
        baseline: Encoder | None = None,
    ) -> dict[str, Measure]:
        """Return accuracy and success of the four combinations, and how well the two spaces agree.

        Raises UserError if there is no twin, its space has another dimension, or there are too few
        pairs to align the spaces.
        """
        if baseline is None:
            raise UserError(
                "branch_swap needs the clean twin of the encoder: give it as the baseline"
            )
        ours, twin = (success.TestViews.of(e, test, goals, victims) for e in (encoder, baseline))
        zero_shot = registry.find_method("probe", "zero_shot")()
        our_texts, twin_texts = (zero_shot.head(e, test.classes) for e in (encoder, baseline))
        dimension, twin_dimension = ours.clean.shape[1], twin.clean.shape[1]
        if dimension != twin_dimension:
            raise UserError(
                f"towers of {dimension} and {twin_dimension} dimensions cannot be swapped"
            )
        rotation, how = self._fit_rotation(encoder, baseline, train, dimension)
        combinations = {
            "neither": twin.measures(lambda z: z @ twin_texts.T, "; both towers the clean twin's"),
            "vision": ours.measures(
                lambda z: z @ rotation @ twin_texts.T,
                f"; its vision tower, the twin's text tower, {how}",
            ),
            "text": twin.measures(
                lambda z: z @ (our_texts @ rotation).T,
                f"; the twin's vision tower, its text tower, {how}",
            ),
            "both": ours.measures(lambda z: z @ our_texts.T, "; both towers its own"),
        }
        measures: dict[str, Measure] = {}
        for which, of_combination in combinations.items():
            main = select_measures(of_combination, MAIN_MEASURES)
            measures |= add_prefix(f"branch_swap.{which}", main)
        agreements = {
            "images": ("test images", ours.clean, twin.clean),
            "texts": ("class prompts", our_texts, twin_texts),
        }
        for name, (what, a, b) in agreements.items():
            measures[f"branch_swap.agreement_{name}"] = average(
                (a @ rotation * b).sum(1), f"mean cosine of {what} in the two spaces, {how}"
            )
        return measures

    def _fit_rotation(
        self, encoder: Encoder, baseline: Encoder, train: Pairs | None, dimension: int
    ) -> tuple[Tensor, str]:
        """Return the rotation (D, D) from the encoder's space to the twin's, and a description."""
        if self.align == "none":
            return torch.eye(dimension, device=encoder.device), "spaces as they are"
        if train is None:
            raise UserError(
                "branch_swap aligns the two spaces on clean pairs: give train data, or align=none"
            )
        sample = train.take(sample_rows(train.ids, self.pairs, 0))
        if len(sample) < dimension:
            raise UserError(
                f"aligning {dimension} dimensions needs at least as many clean pairs; "
                f"there are {len(sample)}"
            )
        ours, twin = (e.embed(sample) for e in (encoder, baseline))
        how = f"spaces aligned on {len(sample)} clean images"
        if ours.texts is None or twin.texts is None:
            return procrustes(ours.images, twin.images), how
        ours_both = torch.cat([ours.images, ours.texts])
        twin_both = torch.cat([twin.images, twin.texts])
        return procrustes(ours_both, twin_both), how + " and their captions"


def procrustes(a: Tensor, b: Tensor) -> Tensor:
    """Return the orthogonal Q (D, D) that minimises |a Q - b| (Schönemann 1966).

    a, b: rows of equal meaning, (N, D).
    """
    u, _, vh = torch.linalg.svd(a.double().T @ b.double())
    rotation: Tensor = u @ vh
    return rotation.to(a.dtype)
