"""The least colour filter, blur, warp or wave that leads to each class: does one stand apart?

The counterpart of `cleanse` for triggers that change the whole image (filters in Liu et al. 2019,
"ABS"; WaNet, Nguyen and Tran 2021; SIG, Barni et al. 2019; CTRL, Li et al. 2023), of which no mask
and no blend is small. Ours; no published target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from bezoar.auditing import (
    image_changes,
    norm_outliers,
    students,
    trigger_inversion,
    unaided_verdict,
)
from bezoar.auditing.evidence import exact_measure
from bezoar.auditing.image_changes import FAMILIES, ChangeFamily, LeastChanges
from bezoar.auditing.trigger_inversion import ImageTower, TowerCost
from bezoar.auditing.trigger_search import InversionRecipe
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.classifiers import Classifier, reach_class
from bezoar.evaluation.scores import Measure, proportion
from bezoar.evaluation.verdict import Verdict
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

HELD_OUT = 4  # one of so many clean images takes no part in the search
EXAMPLES = 8  # clean images whose readings are kept
FEWEST = 3  # classes that can be compared with one another
DEVIATION = 0.25  # of the sizes' logarithms; few reached classes tell no smaller one
RATES = (1.5, 0.6)  # factors on a family's learning rate, in the first half of the steps and after
LIMITS = [
    "It finds triggers that curves of the colour channels, a kernel of 5 pixels, a smooth warp or "
    "plane waves of at most 16 periods a side come near to; noise, pictures and patches are for "
    "`cleanse`.",
    "A class that a change leads to by nature, such as what spoilt images look like, hides a "
    "backdoor whose trigger is not far weaker.",
]


@method
class ImageChange:
    """Value = log(median size / least size) of four families of changes, the largest of the four.

    For each class t and each family lowers CE(head(f(change(x))), t) + weight size(change), all
    classes in one batch: curves of the colour channels, a kernel of 5 x 5 pixels, a smooth warp,
    and plane waves. So few numbers leave little room for adversarial noise, and most classes of a
    clean encoder are not reached before the change spoils the images: these count with the family's
    limit. A change counts when it succeeds on `confirm` images, and in the end on all clean images
    but for .05, of which a quarter took no part in the search.

    The verdict without a bank takes a family's value as far as the p-value of the least size says
    that it is no accident (Student's law fitted to the logarithms of the others, times the number
    of classes and families), and as nothing where it is natural: where students of the encoder
    (`auditing.students`) are led to the same class most easily.

    Where all classes would cost more than `most`, nothing is searched for, and the value says
    nothing.
    """

    steps: Annotated[int, "steps of Adam, of each family"] = 60
    batch: Annotated[int, "clean images a step, changed for every class"] = 12
    confirm: Annotated[int, "further images that a change must succeed on before it counts"] = 64
    goal: Annotated[float, "share of these images that a change is to turn into its class"] = 0.9
    weight: Annotated[float, "factor on the weight of the changes' sizes at the start"] = 1.0
    up: Annotated[float, "factor on the weight after `patience` successes in a row"] = 1.5
    down: Annotated[float, "divisor of the weight after `patience` failures in a row"] = 1.8
    patience: Annotated[int, "successes or failures in a row that change the weight"] = 2
    most: Annotated[float, "arithmetic operations up to which classes are searched for"] = 1e14

    needs: ClassVar[tuple[str, ...]] = ("classifier", "report")
    unaided: ClassVar[bool] = True  # its evidence is a verdict without a bank

    def __post_init__(self) -> None:
        if self.confirm < 1:
            raise ValueError("confirm must be at least 1")
        self.recipe(next(iter(FAMILIES.values())))

    def recipe(self, family: ChangeFamily) -> InversionRecipe:
        """The search for a family's changes. Raises ValueError for fields out of range."""
        return InversionRecipe.from_fields(
            self,
            lr=tuple(family.rate * factor for factor in RATES),
            until=(self.steps // 2,),
            weight=self.weight * family.weight,
        )

    def image_passes(self, images: int, classes: int, cost: TowerCost) -> int:
        """Images that the encoder reads at most."""
        if not self.searches_all(classes, cost):
            return 0
        return classes * sum(self.recipe(f).image_passes() + 2 * images for f in FAMILIES.values())

    def searches_all(self, classes: int, cost: TowerCost) -> bool:
        """Whether the classes of an encoder are searched for."""
        passes = sum(self.recipe(family).image_passes() for family in FAMILIES.values())
        return classes * passes * cost.total <= self.most

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
            UserError: for a classifier of fewer than three classes, fewer than 8 images, or NaN.
        """
        names = classifier.classes
        if len(names) < FEWEST:
            raise UserError(
                f"image_change compares the classes of a head with one another; this head has "
                f"{len(names)}, and {FEWEST} are needed"
            )
        trigger_inversion.check_image_count(clean)
        evidence: dict[str, Measure] = {}
        changes: list[dict[str, Any]] = []
        with trigger_inversion.freeze_tower(encoder, classifier.raw) as tower:
            if not self.searches_all(len(names), tower.cost):
                return skipped_verdict(len(names))
            for name, family in FAMILIES.items():
                least = self.search(family, tower, clean, classifier, seed, report)
                evidence |= describe_family(name, family, least, names, len(clean))
                facts = list_changes(name, family, least, names)
                changes.append(facts | read_examples(family, facts, tower, clean, classifier))
        evidence |= self.ask_students(evidence, changes, clean, classifier, seed, report)
        notes = {
            "head": classifier.how,
            "unaided": "change",
            "changes": changes,
            "limits": [*LIMITS, *trigger_inversion.inversion_limits(clean)[1:]],
        }
        value = max(evidence[f"{name}_ratio"].value for name in FAMILIES)
        return Verdict(value, evidence, notes=notes)

    def ask_students(
        self,
        evidence: Mapping[str, Measure],
        changes: Sequence[Mapping[str, Any]],
        clean: Pairs,
        classifier: Classifier,
        seed: int,
        report: ProgressReport,
    ) -> dict[str, Measure]:
        """Whether what this evidence would accuse is natural, as evidence.

        changes: the families' facts, as in the notes.
        """
        measures = {name: measure.json() for name, measure in evidence.items()}
        accused = {
            facts["family"]: facts["target"]
            for facts in changes
            if unaided_verdict.change_statistic(measures, facts["family"]) >= unaided_verdict.SOME
        }

        def search(family: ChangeFamily, tower: ImageTower, student: Classifier) -> Tensor:
            least = self.search(family, tower, clean, student, seed, report)
            return count_sizes(family, least)

        searches = {name: partial(search, family) for name, family in FAMILIES.items()}
        return students.compare_students(classifier, clean, accused, searches, seed)

    def search(
        self,
        family: ChangeFamily,
        tower: ImageTower,
        clean: Pairs,
        classifier: Classifier,
        seed: int,
        report: ProgressReport,
    ) -> LeastChanges:
        """The least change of a family for every class."""
        return image_changes.search_changes(
            family,
            tower,
            clean.take(range(len(clean) - len(clean) // HELD_OUT)),
            clean,
            reach_class(classifier),
            len(classifier.classes),
            self.recipe(family),
            seed,
            report,
        )


def skipped_verdict(classes: int) -> Verdict:
    """What is said where a search would take too long: nothing, and why."""
    limit = (
        f"nothing was searched for, because {classes} classes of a network of this cost would take "
        "too long (most)"
    )
    return Verdict(0.0, notes={"limits": [limit]})


def describe_family(
    name: str, family: ChangeFamily, least: LeastChanges, names: Sequence[str], n: int
) -> dict[str, Measure]:
    """What the sizes of a family's changes say; those of targets not reached count as its limit.

    n: number of clean images.
    """
    sizes = count_sizes(family, least)
    smallest = int(sizes.argmin())
    median = sizes.quantile(0.5)
    p = norm_outliers.outlier_p_value(
        sizes.log(), len(FAMILIES) * len(names), capped=True, deviation=DEVIATION
    )
    what = f"{int(least.reached.sum())} of {len(names)} classes reached, {n} clean images"
    facts = {
        "ratio": (float((median / sizes[smallest]).log()), "log(median size / least size)"),
        "p": (p, "chance of so small a least size, by Student's law fitted to the others"),
        "least": (float(sizes[smallest]), f"{family.unit}, of {names[smallest]!r}"),
        "median": (float(median), f"{family.unit}, of the median class"),
    }
    evidence = {
        f"{name}_{key}": exact_measure(value, n, f"{how}; {what}")
        for key, (value, how) in facts.items()
    }
    hits = float(least.success[smallest]) * n if bool(least.reached[smallest]) else 0.0
    evidence[f"{name}_success"] = proportion(
        round(hits), n, f"clean images that the least change makes {names[smallest]!r}"
    )
    return evidence


def count_sizes(family: ChangeFamily, least: LeastChanges) -> Tensor:
    """The sizes that are compared, float64 (C,) on the CPU."""
    return least.sizes.where(least.reached, family.limit).double().cpu()


def list_changes(
    name: str, family: ChangeFamily, least: LeastChanges, names: Sequence[str]
) -> dict[str, Any]:
    """A family's changes for the notes: every class, the least first, with the least's numbers."""
    sizes = count_sizes(family, least)
    order = sizes.argsort(stable=True).tolist()
    rows = [
        {
            "target": names[c],
            "size": round(float(sizes[c]), 4),
            "success": round(float(least.success[c]), 4),
            "reached": bool(least.reached[c]),
        }
        for c in order
    ]
    numbers = least.numbers[order[0]].tolist()
    return {
        "family": name,
        "unit": family.unit,
        "limit": family.limit,
        "target": names[order[0]],
        "targets": rows,
        "numbers": [[i, round(value, 6)] for i, value in enumerate(numbers) if value],
    }


@torch.no_grad()
def read_examples(
    family: ChangeFamily,
    facts: Mapping[str, Any],
    tower: ImageTower,
    clean: Pairs,
    classifier: Classifier,
) -> dict[str, list[str]]:
    """What the head reads the first clean images as before and after a family's least change."""
    x = clean.images[:EXAMPLES].to(tower.device, tower.dtype) / 255
    numbers = image_changes.restore_numbers(family, facts["numbers"], *x.shape[2:])
    assert numbers is not None
    changed = family.change(numbers.to(x), x)[0]  # (N, 3, H, W)
    return {
        key: [classifier.classes[c] for c in classifier.head(tower(images)).argmax(1).tolist()]
        for key, images in (("before", x), ("after", changed))
    }
