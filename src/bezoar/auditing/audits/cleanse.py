"""Neural Cleanse: is there a class that a far smaller trigger leads to (Wang et al., S&P 2019)?"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from bezoar.auditing import norm_outliers, students, trigger_inversion, unaided_verdict
from bezoar.auditing.evidence import exact_measure
from bezoar.auditing.norm_outliers import OutlierStatistic
from bezoar.auditing.random_probes import PATCH_KINDS, apply_probe
from bezoar.auditing.trigger_inversion import (
    ImageTower,
    InvertedTriggers,
    TowerCost,
    TriggerObjective,
)
from bezoar.auditing.trigger_search import InversionRecipe
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.classifiers import Classifier, reach_class
from bezoar.evaluation.scores import Measure, proportion
from bezoar.evaluation.verdict import Verdict
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

HELD_OUT = 4  # one of so many clean images takes no part in the search
# What a search that would cost too much is changed to; and the sweep before it.
QUICK: dict[str, Any] = {
    "starts": 2,
    "steps": 100,
    "batch": 4,
    "halvings": 1,
    "confirm": 16,
    "lr": (0.2,),
    "window": 0.25,
    "cells": 32,
}
SWEEP: dict[str, Any] = {**QUICK, "starts": 8, "steps": 16, "halvings": 0, "confirm": 0}
# What the search for patterns that are blended over the whole image differs by.
BLEND: dict[str, Any] = {
    "starts": 1,
    "steps": 50,
    "batch": 16,
    "halvings": 0,
    "growing": False,
    "confirm": 32,
    "goal": 0.9,
    "even": True,
}
PROBES = 8  # random patches of each kind that precede it
QUICK_IMAGES = 64  # clean images that it uses, and the sweep
SWEEP_IMAGES = 16
SUSPECTS = 3  # classes that are taken from the random patches, and from the sweep


@method
class Cleanse:
    """Value = log(median |m|_1 / least |m|_1) over the classes' masks m.

    For each class t lowers CE(head(f(stamped)), t) + weight |m_t|_1, all classes in one batch.

    A search from one start often ends at a direction that the class has by nature: of four starts
    on a backdoored CIFAR-10 network two did. So each class has several; the worse half is given up
    `halvings` times, evenly spread over the steps, and the others see twice as many images a step.
    Once, half-way, is right: earlier masks still shrink and do not tell yet. A mask counts when its
    trigger succeeds on `confirm` images beside those of its step, and in the end on all clean
    images but for .05, of which a quarter took no part in the search. A class without such a mask
    is searched for again from other starts; one that nothing reaches then has no part in the value
    (`unreached`).

    Then each class is searched for the least share of one pattern that is blended into every image
    (`BLEND`): a mask of one value. A class that stands apart so is evidence of its own, and no part
    of the value. What would be accused is searched for in students of the encoder too
    (`auditing.students`): there it tells what is natural, and takes no part in the value.

    Where that would cost more than `most`, few classes are searched for, by fewer steps and with
    masks of 32 cells a side that start from a window: those that random patches lead to, those that
    searches lead to which may each choose their class (`reach_any`), and others that are drawn. The
    p-value is that of one class chosen from all of them; where a mask lies says nothing then.

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
    halvings: Annotated[int, "how often the worse half of a class's searches is given up"] = 1
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

    most: Annotated[
        float, "arithmetic operations up to which all classes are searched for, and in full"
    ] = 1.1e14
    few: Annotated[int, "classes that are searched for where that would cost more"] = 10

    needs: ClassVar[tuple[str, ...]] = ("classifier", "report")
    unaided: ClassVar[bool] = True  # its evidence is a verdict without a bank

    def __post_init__(self) -> None:
        if self.again < 0 or self.few < 3:
            raise ValueError("again must be at least 0, few at least 3")
        self.recipe()

    def recipe(self, changes: Mapping[str, Any] = MappingProxyType({})) -> InversionRecipe:
        """The search for the classes' triggers. Raises ValueError for fields out of range."""
        return InversionRecipe.from_fields(self, **({"lr": (self.lr,)} | dict(changes)))

    def image_passes(self, images: int, classes: int, cost: TowerCost) -> int:
        """Images that the encoder reads at most, but for classes that are searched for again."""
        if self.searches_all(classes, cost):
            passes = self.recipe().image_passes() + self.recipe(BLEND).image_passes()
            return classes * (passes + 2 * images)
        images = min(images, QUICK_IMAGES)
        quick, sweep = self.recipe(QUICK), self.recipe(SWEEP)
        count = min(self.few, classes)
        patches = 1 + PROBES * len(PATCH_KINDS)
        swept = sweep.image_passes() + SWEEP_IMAGES * (2 * sweep.starts + patches)
        return swept * (count < classes) + count * (quick.image_passes() + images)

    def searches_all(self, classes: int, cost: TowerCost) -> bool:
        """Whether all classes of an encoder are searched for in full."""
        return classes * self.recipe().image_passes() * cost.total <= self.most

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
                "Neural Cleanse compares the classes of a head with one another; this head has "
                "only one"
            )
        trigger_inversion.check_image_count(clean)
        objective = reach_class(classifier)
        classes = torch.arange(len(names))
        notes: dict[str, Any] = {"head": classifier.how, "unaided": self.unaided}
        recipe = self.recipe()
        pull = None
        with trigger_inversion.freeze_tower(encoder, classifier.raw) as tower:
            if not self.searches_all(len(names), tower.cost):
                recipe = self.recipe(QUICK)
                clean = clean.take(range(min(len(clean), QUICK_IMAGES)))
                classes, led_to, pull = self.choose_classes(tower, clean, classifier, seed, report)
                notes["searched"] = describe_choice(led_to, classes, names)
            triggers = self.invert(tower, clean, objective, classes, recipe, seed, report)
            blends = None
            if "searched" not in notes:
                blend = self.recipe(BLEND)
                blends = self.invert(tower, clean, objective, classes, blend, seed, report)
        verdict = norm_outliers.outlier_verdict(
            triggers,
            [names[c] for c in classes.tolist()],
            "class",
            self.score,
            clean,
            notes,
            excluding=True,
            among=len(names) if len(classes) < len(names) else 0,
        )
        if blends is not None:
            evidence, least = norm_outliers.blend_evidence(blends, names, len(clean))
            verdict.evidence.update(evidence)
            verdict.notes["blend_target"] = names[least]
            verdict.notes["blends"] = norm_outliers.list_targets(blends, names)
            verdict.evidence.update(self.ask_students(verdict, clean, classifier, seed, report))
        else:
            verdict.notes["limits"].append(notes["searched"])
            verdict.evidence["concentration"] = exact_measure(
                0.0, len(clean), "not counted: the searches started from windows"
            )
            if pull is not None:
                verdict.evidence["patch_pull"] = pull
        return verdict

    def ask_students(
        self,
        verdict: Verdict,
        clean: Pairs,
        classifier: Classifier,
        seed: int,
        report: ProgressReport,
    ) -> dict[str, Measure]:
        """Whether what this verdict would accuse is natural, as evidence."""
        evidence = {name: measure.json() for name, measure in verdict.evidence.items()}
        accused = {}
        if unaided_verdict.mask_statistic(evidence) >= unaided_verdict.SOME:
            accused["mask"] = verdict.notes["target"]
        if unaided_verdict.blend_statistic(evidence) >= unaided_verdict.SOME:
            accused["blend"] = verdict.notes["blend_target"]

        def search(changes: Mapping[str, Any], tower: ImageTower, student: Classifier) -> Tensor:
            classes, objective = torch.arange(len(student.classes)), reach_class(student)
            recipe = self.recipe(changes)
            least = self.invert(tower, clean, objective, classes, recipe, seed, report)
            return least.norms.where(least.reached, torch.inf)

        searches = {"mask": partial(search, {}), "blend": partial(search, BLEND)}
        return students.compare_students(classifier, clean, accused, searches, seed)

    def choose_classes(
        self,
        tower: ImageTower,
        clean: Pairs,
        classifier: Classifier,
        seed: int,
        report: ProgressReport,
    ) -> tuple[Tensor, list[int], Measure | None]:
        """The classes that are searched for, int64 (few,) in order; those that were led to; and how
        many images random patches lead to the foremost of them."""
        count = len(classifier.classes)
        if count <= self.few:
            return torch.arange(count), [], None
        few = clean.take(range(min(len(clean), SWEEP_IMAGES)))
        images = few.images
        patches = (
            apply_probe(images, kind, number, seed)
            for kind in PATCH_KINDS
            for number in range(PROBES)
        )
        patched = count_drawn(tower, classifier, images, patches)  # (C,)
        objective, aims = reach_any(classifier), torch.zeros(1, dtype=torch.long)
        triggers = trigger_inversion.invert_triggers(
            tower, few, objective, aims, self.recipe(SWEEP), seed, report
        )
        inversions = triggers.inversions([""] * len(triggers.aims))
        stamped = count_drawn(tower, classifier, images, (stamp(images) for stamp in inversions))
        suspects = [n.topk(SUSPECTS).indices.tolist() for n in (patched, stamped)]
        led_to = list(dict.fromkeys(itertools.chain(*suspects)))
        drawn = torch.randperm(count, generator=generator(seed, 13)).tolist()
        chosen = list(dict.fromkeys([*led_to, *drawn]))[: self.few]
        foremost = led_to[0]
        pull = proportion(
            max(0, int(patched[foremost])),
            len(images) * PROBES * len(PATCH_KINDS),
            f"clean images that random patches turn into {classifier.classes[foremost]!r}, less "
            "those that they take from it",
        )
        return torch.tensor(sorted(chosen)), led_to, pull

    def invert(
        self,
        tower: ImageTower,
        clean: Pairs,
        objective: TriggerObjective,
        classes: Tensor,
        recipe: InversionRecipe,
        seed: int,
        report: ProgressReport,
    ) -> InvertedTriggers:
        """The best trigger for each of some classes; `reached` and `success` are of all images."""
        searched = clean.take(range(len(clean) - len(clean) // HELD_OUT))
        best: InvertedTriggers | None = None
        aims = classes
        rounds = 1 + self.again if recipe == self.recipe() else 1
        for round_ in range(rounds):
            best = trigger_inversion.invert_triggers(
                tower, searched, objective, aims, recipe, seed + round_ * 7919, report, clean
            ).best_of_aims(best)
            aims = best.aims[~best.reached].cpu()
            if not len(aims):
                break
        assert best is not None
        return best


def describe_choice(led_to: Sequence[int], classes: Tensor, names: Sequence[str]) -> str:
    """Which classes were searched for, and how, where it was not all of them in full."""
    text = (
        f"to save time {len(classes)} of {len(names)} classes were searched for, in fewer steps, "
        f"with masks of {QUICK['cells']} cells a side, which no finer trigger fits"
    )
    if not led_to:
        return text
    chosen = ", ".join(names[c] for c in led_to)
    return (
        f"{text}: {chosen}, which random patches or a search free to choose its class led to, and "
        "others that were drawn"
    )


@torch.no_grad()
def count_drawn(
    tower: ImageTower, classifier: Classifier, images: Tensor, changed: Iterable[Tensor]
) -> Tensor:
    """How many more of the changed images than of these are read as each class, over all changes,
    int64 (C,).

    images, and each of the changed: uint8 (N, 3, H, W).
    """

    def count_readings(x: Tensor) -> Tensor:
        z = trigger_inversion.embed_clean(tower, x)  # (N, D)
        return classifier.head(z).argmax(1).bincount(minlength=len(classifier.classes))

    before = count_readings(images)  # (C,)
    return torch.stack([count_readings(x) - before for x in changed]).sum(0)


def reach_any(classifier: Classifier) -> TriggerObjective:
    """The objective of a sweep: stamped images are read as one class, whichever is nearest."""

    def objective(z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        g, n, _ = z.shape
        logits = classifier.head(z.flatten(0, 1)).view(g, n, -1)  # (g, n, C)
        mean = logits.log_softmax(2).mean(1)  # (g, C)
        nearest = mean.argmax(1)  # (g,)
        hits = logits.argmax(2) == nearest[:, None]  # (g, n)
        return -mean.logsumexp(1), hits.to(z.dtype).mean(1)

    return objective
