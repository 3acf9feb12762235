"""Accuracy and attack success with few labels a class (Radford et al. 2021, section 3.1.4)."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation import heads, success
from bezoar.evaluation.probes import MAIN_MEASURES, add_prefix, check_limit, select_measures
from bezoar.evaluation.scores import Measure
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method


@method
class FewShot:
    """Fits the linear probe's head on K random records of every class, and on all records.

    A class with fewer than K records gives all of them. A K of at least the largest class is left
    out. Draws are nested: each holds the records of the same draw with a smaller K.
    """

    shots: Annotated[tuple[int, ...], "labelled records a class"] = (1, 2, 5, 10, 20, 50, 100)
    draws: Annotated[int, "draws of each; the mean is over them"] = 5
    c: Annotated[float, "weight of the data against the penalty, as of the linear probe"] = 0.316
    limit: Annotated[int | None, "labelled records at most, a fixed sample"] = None

    needs = ("train", "report")

    def __post_init__(self) -> None:
        if min(self.shots, default=1) < 1 or not self.c > 0 or self.draws < 1:
            raise ValueError("needs shots >= 1, draws >= 1, c > 0")
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
        """Return `few_shot.K.clean_accuracy` and the like, K a number or `all`; see `Probe`."""
        views = success.TestViews.of(encoder, test, goals, victims)
        labelled = success.embed_labelled(encoder, train, test, goals, self.limit)
        linear = registry.find_method("probe", "linear")(self.c)
        classes = labelled.labels.cpu().numpy()
        largest_class = int(np.bincount(classes).max())
        trials = [
            (k, seed)
            for k in sorted(set(self.shots))
            if k < largest_class
            for seed in range(self.draws)
        ]
        trials.append((largest_class, 0))
        measures_of: dict[int, list[dict[str, Measure]]] = {}
        for i, (k, seed) in enumerate(trials):
            report(i, len(trials), f"{k} labelled records a class")
            rows = draw_per_class(labelled.ids, classes, k, seed)
            head = linear.fit(labelled.z[rows], labelled.labels[rows], len(test.classes))
            which = "all" if k == largest_class else f"{k} a class at most"
            how = f"; linear head on {len(rows)} labelled records, {which}"
            measures_of.setdefault(k, []).append(views.measures(head, how))
        measures: dict[str, Measure] = {}
        for k, draws_of_k in measures_of.items():
            averages = heads.average_measures(draws_of_k, f"{self.draws} draws")
            name = "all" if k == largest_class else str(k)
            measures |= add_prefix(f"few_shot.{name}", select_measures(averages, MAIN_MEASURES))
        return measures


def draw_per_class(ids: Sequence[str], classes: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw at most `count` records of each class. The draw depends on the seed and their ids.

    ids: N record ids. classes: int64 (N,). Returns their rows, ascending.
    """
    order = np.lexsort((np.asarray(ids), draws(seed, ids, 1, "few_shot")[:, 0], classes))
    sizes = np.bincount(classes)
    place_in_class = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[place_in_class < count])
