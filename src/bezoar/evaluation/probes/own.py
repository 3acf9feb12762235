"""The network's own head: what a classifier that came with its last layers says, as it is served (BadNets, Gu et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation import classifiers, success
from bezoar.evaluation.probes import add_prefix
from bezoar.evaluation.scores import Measure
from bezoar.registry import method


@method
class Own:
    """CA/BA and ASR by the network's head. A class that the test set lacks counts as wrong."""

    batch: Annotated[int, "images at a time"] = 512

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError("needs batch >= 1")

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """Return what `TestViews.measures` defines, as `own.*`; see `Probe`.

        Raises UserError if the encoder has no head of its own, or one of other classes.
        """
        classifier = classifiers.own_classifier(encoder)
        columns, order = order_columns(classifier.classes, test.classes)
        how = f"; {classifier.how}, {len(columns)} classes{order}"
        logits = LogitEncoder(classifier, columns)
        views = success.TestViews.of(logits, test, goals, victims, self.batch)
        return add_prefix("own", views.measures(lambda z: z, how))


def order_columns(head: Sequence[str], test: Sequence[str]) -> tuple[list[int], str]:
    """Order a head's columns: the test set's classes first, in their order.

    Where the head's classes are numbers alone, as many as the test set's, they are taken in their
    order.

    Args:
        head: names of the head's classes.
        test: names of the test set's classes.

    Returns:
        The columns, and what to say of their order.

    Raises:
        UserError: if a class of the test set is none of the head's.
    """
    is_unnamed = tuple(head) == tuple(map(str, range(len(head))))
    if is_unnamed and set(test) - set(head):
        if len(head) != len(test):
            raise UserError(
                f"the head has {len(head)} classes without names, the test set {len(test)}; "
                "name the head's"
            )
        return list(range(len(head))), ", taken in the test set's order"
    column_of = {name: column for column, name in enumerate(head)}
    if unknown := [name for name in test if name not in column_of]:
        listed = ", ".join(head[:8]) + (", ..." if len(head) > 8 else "")
        raise UserError(f"the head knows no class {unknown[0]!r}; it has {listed}")
    first = [column_of[name] for name in test]
    return first + sorted(set(range(len(head))) - set(first)), ""


@dataclass(frozen=True)
class LogitEncoder:
    """A classifier in the place of an encoder: its vectors are its logits, in a given order."""

    classifier: classifiers.Classifier
    columns: list[int]

    def eval(self) -> LogitEncoder:
        """Put the encoder into evaluation mode."""
        self.classifier.encoder.eval()
        return self

    def encode_images(self, x: Tensor) -> Tensor:
        """Return logits, float32 (B, C), of images uint8 (B, 3, H, W)."""
        return self.classifier(x)[:, self.columns]
