"""Neural Cleanse: is there a class that a far smaller trigger leads to (Wang et al., S&P 2019)?"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from bezoar.auditing import norm_outliers, trigger_inversion
from bezoar.auditing.norm_outliers import OutlierStatistic
from bezoar.auditing.trigger_inversion import ImageTower, InvertedTriggers, TriggerObjective
from bezoar.auditing.trigger_search import InversionRecipe
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.evaluation.verdict import Verdict
from bezoar.registry import method

HELD_OUT = 4  # one of so many clean images takes no part in the search


@method
class Cleanse:
    """Value = log(median |m|_1 / least |m|_1) over the classes' masks m.

    For each class t lowers CE(head(f(stamped)), t) + weight |m_t|_1, all classes in one batch.

    A search from one start often ends at a direction that the class has by nature: of four starts
    on a backdoored CIFAR-10 network two did. So each class has several; the
    worse half is given up `halvings` times, and the others see twice as many images a step. A mask
    counts when its trigger succeeds on `confirm` images beside those of its step, and in the end on
    all clean images but for .05, of which a quarter took no part in the search. A class without such a mask is
    searched for again from other starts; one that nothing reaches then has no part in the value
    (`unreached`).

    The paper's value is the anomaly index, |L1 - median| / (1.4826 MAD) of a class below the
    median, flagged above 2 (`score=anomaly_index`; it is always in the evidence). It cannot exceed
    median / (1.4826 MAD), however small the trigger, and varies with the spread of the harmless
    classes. The ratio does not, and means the same with few classes. With fewer than ten classes
    the index means nothing, and `limits` says so.

    Published (the authors' and BackdoorBench's): starts=1,halvings=0,confirm=0,again=0,weight=1e-3,
    up 1.5, down 1.5^1.5, lr=0.1, goal 0.99, patience 5 to 10.
    """

    starts: Annotated[int, "searches for each class, each from a start of its own"] = 4
    steps: Annotated[int, "steps of Adam at most"] = 90
    batch: Annotated[int, "clean images a step, stamped by the trigger of every class"] = 8
    halvings: Annotated[int, "how often the worse half of a class's searches is given up"] = 2
    growing: Annotated[bool, "twice as many images a step after every halving"] = True
    confirm: Annotated[int, "further images that a trigger must succeed on before it counts"] = 64
    again: Annotated[int, "further rounds for classes that no trigger has reached"] = 1
    goal: Annotated[float, "share of all images that a class's trigger is to turn into it"] = 0.95
    lr: Annotated[float, "learning rate"] = 0.1
    weight: Annotated[float, "weight of the mask's size in pixels at the start"] = 3e-3
    up: Annotated[float, "factor on the weight after `patience` successes in a row"] = 1.5
    down: Annotated[float, "divisor of the weight after `patience` failures in a row"] = 1.5**1.5
    patience: Annotated[int, "successes or failures in a row that change the weight"] = 3
    wait: Annotated[int, "steps without progress after which the search for a class ends"] = 25
    score: Annotated[
        OutlierStatistic,
        "the value: log(median / least), or the anomaly index of norms or of their logarithms",
    ] = "log_ratio"

    needs: ClassVar[tuple[str, ...]] = ("classifier", "report")
    unaided: ClassVar[bool] = True  # its evidence is a verdict without a bank

    def __post_init__(self) -> None:
        if self.again < 0:
            raise ValueError("again must be at least 0")
        self.recipe()

    def recipe(self) -> InversionRecipe:
        """The search for the classes' triggers. Raises ValueError for fields out of range."""
        return InversionRecipe.from_fields(self, lr=(self.lr,))

    def image_passes(self, images: int, classes: int) -> int:
        """Images that go through the encoder, at most but for classes that are searched for again."""
        return classes * (self.recipe().image_passes() + 2 * images)

    def __call__(
        self,
        encoder: Encoder,
        clean: Pairs,
        seed: int,
        classifier: Classifier,
        report: ProgressReport = no_report,
    ) -> Verdict:
        """Audit an encoder through a classifier that reads its vectors.

        Raises:
            UserError: for a classifier of one class, fewer than 8 images, or NaN.
        """
        names = classifier.classes
        if len(names) < 2:
            raise UserError(
                "Neural Cleanse compares the classes of a head with one another; this head has only one"
            )
        trigger_inversion.check_image_count(clean)
        objective = reach_class(classifier)
        with trigger_inversion.freeze_tower(encoder, classifier.raw) as tower:
            triggers = self.invert(tower, clean, objective, len(names), seed, report)
        notes = {"head": classifier.how, "unaided": self.unaided}
        return norm_outliers.outlier_verdict(
            triggers, names, "class", self.score, clean, notes, excluding=True
        )

    def invert(
        self,
        tower: ImageTower,
        clean: Pairs,
        objective: TriggerObjective,
        count: int,
        seed: int,
        report: ProgressReport,
    ) -> InvertedTriggers:
        """The best trigger for each of `count` classes; `reached` and `success` are of all images."""
        searched = clean.take(range(len(clean) - len(clean) // HELD_OUT))
        best: InvertedTriggers | None = None
        aims = torch.arange(count)
        for round_ in range(1 + self.again):
            triggers = trigger_inversion.invert_triggers(
                tower, searched, objective, aims, self.recipe(), seed + round_ * 7919, report
            ).best_of_aims()
            triggers = trigger_inversion.measure_again(tower, triggers, clean, objective, self.goal)
            best = triggers.best_of_aims(best)
            aims = best.aims[~best.reached].cpu()
            if not len(aims):
                break
        assert best is not None
        return best


def reach_class(classifier: Classifier) -> TriggerObjective:
    """The objective of inversion t: the head reads stamped images as class t."""

    def objective(z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        g, n, _ = z.shape
        logits = classifier.head(z.flatten(0, 1)).view(g, n, -1)  # (g, n, C)
        target = indices[:, None, None].expand(g, n, 1)
        loss = -logits.log_softmax(2).gather(2, target).mean((1, 2))
        return loss, (logits.argmax(2) == indices[:, None]).to(z.dtype).mean(1)

    return objective
