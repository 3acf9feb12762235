"""MLP head in-512-256-C on frozen unit features, as in BadEncoder (Jia, Liu, Gong 2022)."""

from collections.abc import Sequence
from typing import Annotated

from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation import heads, success
from bezoar.evaluation.probes import add_prefix, check_limit
from bezoar.evaluation.scores import Measure
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method


@method
class Mlp:
    """The mean over several heads with different initial weights, order and dropout.

    ReLU; dropout after the first hidden layer; Adam on cross-entropy, to the last epoch. The
    published code trains one head and does not shuffle (shuffle=false).
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

    needs = ("train", "report")

    def __post_init__(self) -> None:
        if min(self.hidden, default=1) < 1 or not 0 <= self.dropout < 1:
            raise ValueError("needs widths of at least 1 and 0 <= dropout < 1")
        if not self.lr > 0 or min(self.batch, self.epochs, self.seeds) < 1:
            raise ValueError("needs lr > 0, and batch, epochs and seeds of at least 1")
        check_limit(self.limit)

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
        report: ProgressReport = no_report,
    ) -> dict[str, Measure]:
        """Return the measures of `TestViews.measures` as `mlp.*`; see `Probe`."""
        views = success.TestViews.of(encoder, test, goals, victims)
        labelled = success.embed_labelled(encoder, train, test, goals, self.limit)
        stack = heads.fit(labelled.z, labelled.labels, len(test.classes), self, report)
        widths = "-".join(map(str, (labelled.z.shape[1], *self.hidden, len(test.classes))))
        how = f"; head {widths} on {len(labelled)} labelled records, {self.epochs} epochs"
        of_heads = [views.measures(stack.one(i), how) for i in range(len(stack))]
        return add_prefix("mlp", heads.average_measures(of_heads, f"{self.seeds} heads"))
