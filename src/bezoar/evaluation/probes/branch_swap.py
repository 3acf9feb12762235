"""Branch swap: which tower carries the backdoor? Towers of an encoder and of its clean twin, combined (DIFE audit, 2026)."""

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
from bezoar.evaluation.scores import Measure, average
from bezoar.registry import method

SHOWN = ("clean_accuracy", "attack_success", "attack_success_without_trigger", "targeted_success")


@method
class BranchSwap:
    """`neither`, `vision`, `text`, `both`: which towers are those of the encoder; the others are the clean twin's.

    The published audit swaps towers of a model and of one fine-tuned from it, which share a space (align=none). Encoders
    trained apart do not: their spaces differ by a rotation, found on clean pairs. An isometry fitted to clean data neither
    makes nor removes a backdoor. A swap means something where its clean accuracy is near that of `both` and `neither`.
    """

    align: Annotated[
        Literal["procrustes", "none"], "rotate one space onto the other, or take them as shared"
    ] = "procrustes"
    pairs: Annotated[
        int, "clean pairs that the rotation is found on, a fixed sample of the training data"
    ] = 5000
    templates: Annotated[str, "simple (5), openai (80), or a text that holds {}"] = "simple"
    batch: Annotated[int, "images at a time"] = 512

    @property
    def needs(self) -> tuple[str, ...]:
        """What else it is called with."""
        return ("baseline",) if self.align == "none" else ("train", "baseline")

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
        baseline: Encoder | None = None,
    ) -> dict[str, Measure]:
        """Accuracy and success of the four combinations, and how well the two spaces agree on the test set.

        Raises UserError without a twin, when the spaces have different dimensions, or with too few pairs to align them.
        """
        if baseline is None:
            raise UserError(
                "branch_swap needs the clean twin of the encoder: give it as the baseline"
            )
        own, twin = (
            success.TestViews.of(e, test, goals, victims, self.batch) for e in (encoder, baseline)
        )
        zero_shot = registry.find_method("probe", "zero_shot")(templates=self.templates)
        own_texts, twin_texts = (zero_shot.head(e, test.classes) for e in (encoder, baseline))
        if own.clean.shape[1] != twin.clean.shape[1]:
            raise UserError(
                f"towers of {own.clean.shape[1]} and {twin.clean.shape[1]} dimensions cannot be swapped"
            )
        turn, how = self.rotation(encoder, baseline, train, own.clean.shape[1])
        combined = {
            "neither": twin.measures(lambda z: z @ twin_texts.T, "; both towers the clean twin's"),
            "vision": own.measures(
                lambda z: z @ turn @ twin_texts.T,
                f"; its vision tower, the twin's text tower, {how}",
            ),
            "text": twin.measures(
                lambda z: z @ (own_texts @ turn).T,
                f"; the twin's vision tower, its text tower, {how}",
            ),
            "both": own.measures(lambda z: z @ own_texts.T, "; both towers its own"),
        }
        out = {
            f"branch_swap.{which}.{name}": m
            for which, found in combined.items()
            for name, m in found.items()
            if name.partition("@")[0] in SHOWN
        }
        for name, a, b in (("images", own.clean, twin.clean), ("texts", own_texts, twin_texts)):
            what = "test images" if name == "images" else "class prompts"
            cosines = (a @ turn * b).sum(1)
            out[f"branch_swap.agreement_{name}"] = average(
                cosines, f"mean cosine of {what} in the two spaces, {how}"
            )
        return out

    def rotation(
        self, encoder: Encoder, baseline: Encoder, train: Pairs | None, dimension: int
    ) -> tuple[Tensor, str]:
        """float32 (D, D), from the encoder's space to the twin's, and what it was found on."""
        if self.align == "none":
            return torch.eye(dimension, device=encoder.device), "spaces as they are"
        if train is None:
            raise UserError(
                "branch_swap aligns the two spaces on clean pairs: give train data, or align=none"
            )
        chosen = train.take(sample_rows(train.ids, self.pairs, 0))
        if len(chosen) < dimension:
            raise UserError(
                f"aligning {dimension} dimensions needs at least as many clean pairs; there are {len(chosen)}"
            )
        own, twin = (e.embed(chosen, self.batch) for e in (encoder, baseline))
        how = f"spaces aligned on {len(chosen)} clean images"
        if own.texts is None or twin.texts is None:
            return procrustes(own.images, twin.images), how
        both = (torch.cat([e.images, e.texts]) for e in (own, twin) if e.texts is not None)
        return procrustes(*both), how + " and their captions"

    def __post_init__(self) -> None:
        if self.pairs < 2 or self.batch < 1:
            raise ValueError("needs pairs >= 2, batch >= 1")


def procrustes(a: Tensor, b: Tensor) -> Tensor:
    """The orthogonal Q (D, D) that makes |a Q - b| least (Schönemann 1966), for rows a, b (N, D) of equal meaning."""
    u, _, v = torch.linalg.svd(a.double().T @ b.double())
    return (u @ v).to(a.dtype)
