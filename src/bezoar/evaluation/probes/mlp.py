"""MLP head: in-512-256-C on frozen unit features, the downstream classifier of BadEncoder (Jia, Liu, Gong 2022)."""

from collections.abc import Sequence
from typing import Annotated

from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation import heads, success
from bezoar.evaluation.scores import Measure
from bezoar.registry import method


@method
class Mlp:
    """Several heads at once, each with its own start, order and dropout; the mean over them, measured after the last epoch.

    ReLU; dropout after the first hidden layer; Adam on cross-entropy. The published code does not shuffle (shuffle=false)
    and trains one head.
    """

    hidden: Annotated[tuple[int, ...], "widths of the hidden layers"] = (512, 256)
    dropout: Annotated[float, "share of the first hidden layer's units left out at a step"] = 0.5
    lr: Annotated[float, "learning rate of Adam"] = 1e-4
    batch: Annotated[int, "labelled records a step"] = 64
    epochs: Annotated[int, "passes over the labelled records"] = 500
    shuffle: Annotated[
        bool, "another order every epoch; false keeps that of the records, as published"
    ] = True
    seeds: Annotated[int, "heads, trained at once"] = 3
    limit: Annotated[int | None, "labelled records at most, a fixed sample"] = None
    images: Annotated[int, "images at a time through the encoder"] = 512

    needs = ("train", "report")

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
        report: heads.ProgressReport = heads.no_report,
    ) -> dict[str, Measure]:
        """Everything that `success` defines, as `mlp.*`. Raises UserError without labelled data."""
        seen = success.TestViews.of(encoder, test, goals, victims, self.images)
        known = success.embed_labelled(encoder, train, test, goals, self.limit, self.images)
        stack = heads.fit(known.z, known.labels, len(test.classes), self, report)
        widths = "-".join(map(str, (known.z.shape[1], *self.hidden, len(test.classes))))
        how = f"; head {widths} on {len(known)} labelled records, {self.epochs} epochs"
        found = [seen.measures(stack.one(i), how) for i in range(len(stack))]
        return {
            f"mlp.{name}": m
            for name, m in heads.average_measures(found, f"{self.seeds} heads").items()
        }

    def __post_init__(self) -> None:
        if min(self.hidden, default=1) < 1 or not 0 <= self.dropout < 1:
            raise ValueError("needs widths of at least 1 and 0 <= dropout < 1")
        if not self.lr > 0 or min(self.batch, self.epochs, self.seeds, self.images) < 1:
            raise ValueError("needs lr > 0, and batch, epochs, seeds and images of at least 1")
        if self.limit is not None and self.limit < 2:
            raise ValueError("limit must be at least 2")
