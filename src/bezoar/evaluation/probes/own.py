"""The network's own head: what a classifier that came with its last layers says, as it is served (BadNets, Gu et al. 2017)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation import classifiers, success
from bezoar.evaluation.scores import Measure
from bezoar.registry import method


@method
class Own:
    """CA/BA and ASR by the head that came with the weights. A class that the test set does not have counts as wrong."""

    batch: Annotated[int, "images at a time"] = 512

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """Everything that `success` defines, as `own.*`. Raises UserError for an encoder without a head, or other classes."""
        classifier = classifiers.own_classifier(encoder)
        order, how = self.order(classifier, test.classes)
        seen = success.TestViews.of(Logits(classifier, order), test, goals, victims, self.batch)
        return {f"own.{name}": m for name, m in seen.measures(lambda z: z, how).items()}

    def order(
        self, classifier: classifiers.Classifier, classes: Sequence[str]
    ) -> tuple[list[int], str]:
        """The head's columns with the test set's classes first, in their order, and what to say of it.

        Raises UserError when a class of the test set is none of the head's. Where the head's classes are numbers alone, as
        many as the test set's, they are taken in their order.
        """
        own = classifier.classes
        how = f"; {classifier.how}, {len(own)} classes"
        if own == tuple(map(str, range(len(own)))) and set(classes) - set(own):
            if len(own) != len(classes):
                raise UserError(
                    f"the head has {len(own)} classes without names, the test set {len(classes)}; name the head's"
                )
            return list(range(len(own))), how + ", taken in the test set's order"
        row = {name: i for i, name in enumerate(own)}
        if strange := [c for c in classes if c not in row]:
            raise UserError(
                f"the head knows no class {strange[0]!r}; it has {', '.join(own[:8])}{', ...' * (len(own) > 8)}"
            )
        first = [row[c] for c in classes]
        return first + sorted(set(range(len(own))) - set(first)), how

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError("needs batch >= 1")


@dataclass(frozen=True)
class Logits:
    """A classifier where `success` sees images through an encoder: its vectors are logits, its columns in an `order`."""

    classifier: classifiers.Classifier
    order: list[int]

    def eval(self) -> "Logits":
        """The encoder as it is served."""
        self.classifier.encoder.eval()
        return self

    def encode_images(self, x: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, C)."""
        return self.classifier(x)[:, self.order]
