"""Neural Cleanse: is there a class that a far smaller trigger leads to (Wang et al., S&P 2019)?"""

from __future__ import annotations

from typing import Annotated, ClassVar

from torch import Tensor

from bezoar.auditing import trigger_inversion
from bezoar.auditing.norm_outliers import OutlierStatistic, outlier_verdict
from bezoar.auditing.trigger_inversion import TriggerObjective
from bezoar.auditing.trigger_search import InversionRecipe
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.evaluation.verdict import Verdict
from bezoar.registry import method


@method
class Cleanse:
    """Value = log(median |m|_1 / least |m|_1) over the classes' masks m.

    For each class t lowers CE(head(f(stamped)), t) + weight |m_t|_1, all classes in one batch.

    The paper's value is the anomaly index, |L1 - median| / (1.4826 MAD) of a class below the
    median, flagged above 2 (`score=anomaly_index`; it is always in the evidence). It cannot exceed
    median / (1.4826 MAD), about 2.4 on small CLIPs, however small the trigger, and it varies with
    the spread of the harmless classes: on one backdoored CLIP whose trigger came out at 22 to 26
    pixels with each of three seeds, the index of logarithms (`score=log_anomaly_index`) was 3.3,
    3.0 and 1.9, while clean encoders reach 1.8. The ratio does not vary so, and means the same with
    few classes. With fewer than ten classes the index means nothing, and `limits` says so.

    Published (the authors' and BackdoorBench's): weight=1e-3, up 1.5, down 1.5^1.5, lr=0.1, goal
    0.99, patience 5 to 10.
    """

    steps: Annotated[int, "steps of Adam at most"] = 120
    batch: Annotated[int, "clean images a step, stamped by the trigger of every class"] = 8
    goal: Annotated[
        float, "share of a step's images that the class's trigger is to turn into it"
    ] = 0.99
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

    def __post_init__(self) -> None:
        self.recipe()

    def recipe(self) -> InversionRecipe:
        """The search for each class's trigger. Raises ValueError for fields out of range."""
        return InversionRecipe.from_fields(self, lr=(self.lr,))

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
            triggers = trigger_inversion.invert_triggers(
                tower, clean, objective, len(names), self.recipe(), seed, report
            )
        notes = {"head": classifier.how}
        return outlier_verdict(triggers, names, "class", self.score, clean, notes)


def reach_class(classifier: Classifier) -> TriggerObjective:
    """The objective of inversion t: the head reads stamped images as class t."""

    def objective(z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        g, n, _ = z.shape
        logits = classifier.head(z.flatten(0, 1)).view(g, n, -1)  # (g, n, C)
        target = indices[:, None, None].expand(g, n, 1)
        loss = -logits.log_softmax(2).gather(2, target).mean((1, 2))
        return loss, (logits.argmax(2) == indices[:, None]).to(z.dtype).mean(1)

    return objective
