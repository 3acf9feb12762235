"""Neural Cleanse: how small a trigger turns all images into a class, and is one class far easier (Wang et al., S&P 2019)?"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from torch import Tensor

from bezoar.auditing import trigger_inversion
from bezoar.auditing.trigger_inversion import InversionRecipe, OutlierStatistic, TriggerObjective
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

    For each class t lowers CE(head(f(stamped)), t) + weight |m_t|_1, all classes in one batch. The paper's value is the
    anomaly index, |L1 - median| / (1.4826 MAD) of a class below the median, flagged above 2 (`score=anomaly_index`; always in
    the evidence). It cannot exceed median / (1.4826 MAD), about 2.4 on small CLIPs, however small the trigger, and moves
    with the spread of the harmless classes: on one backdoored CLIP whose trigger came out at 22 to 26 pixels with each of
    three seeds, the index of logarithms (`score=log_anomaly_index`) was 3.3, 3.0 and 1.9, and clean ones reach 1.8. The ratio
    does not, and means the same with few classes. Under ten the index means nothing, and `limits` says so.

    Published (the authors' and BackdoorBench's): weight=1e-3, up 1.5, down 1.5^1.5, lr=0.1, goal 0.99, patience 5 to 10.
    """

    steps: Annotated[int, "of Adam at most"] = 120
    batch: Annotated[int, "clean images a step, stamped by every class's trigger"] = 8
    goal: Annotated[
        float, "share of a step's images that the class's trigger is to turn into it"
    ] = 0.99
    lr: Annotated[float, "learning rate"] = 0.1
    weight: Annotated[float, "of the mask's size in pixels at the start"] = 3e-3
    up: Annotated[float, "the weight is multiplied by this after `patience` successes"] = 1.5
    down: Annotated[float, "... and divided by this after as many failures"] = 1.5**1.5
    patience: Annotated[int, "successes or failures in a row that change the weight"] = 3
    wait: Annotated[int, "steps without progress after which a class is done"] = 25
    score: Annotated[
        OutlierStatistic,
        "the value: log(median / least), or the anomaly index of norms or of their logarithms",
    ] = "log_ratio"

    needs: ClassVar[tuple[str, ...]] = ("classifier", "report")

    def __post_init__(self) -> None:
        self.descent()

    def descent(self) -> InversionRecipe:
        """The search for each class's trigger."""
        return InversionRecipe(
            self.steps,
            self.batch,
            (self.lr,),
            weight=self.weight,
            up=self.up,
            down=self.down,
            patience=self.patience,
            goal=self.goal,
            wait=self.wait,
        )

    def __call__(
        self,
        encoder: Encoder,
        clean: Pairs,
        seed: int,
        classifier: Classifier,
        report: ProgressReport = no_report,
    ) -> Verdict:
        """classifier: reads the encoder's vectors. Raises UserError for one class, fewer than 8 images, or NaN."""
        names = classifier.classes
        if len(names) < 2:
            raise UserError(
                "Neural Cleanse compares the classes of a head with one another; this head has one alone"
            )
        trigger_inversion.check_image_count(clean)
        with trigger_inversion.freeze_tower(encoder, classifier.raw) as see:
            found = trigger_inversion.invert_triggers(
                see, clean, into(classifier), len(names), self.descent(), seed, report
            )
        verdict = trigger_inversion.outlier_verdict(found, names, "class", self.score, len(clean))
        limits = [*trigger_inversion.inversion_limits(clean), *verdict.notes["limits"]]
        return replace(verdict, notes={"head": classifier.how, **verdict.notes, "limits": limits})


def into(classifier: Classifier) -> TriggerObjective:
    """The aim of inversion t: images that the head reads as class t."""

    def aim(z: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        g, n, _ = z.shape
        logits = classifier.head(z.flatten(0, 1)).view(g, n, -1)
        loss = -logits.log_softmax(2).gather(2, which[:, None, None].expand(g, n, 1)).mean((1, 2))
        return loss, (logits.argmax(2) == which[:, None]).to(z.dtype).mean(1)

    return aim
