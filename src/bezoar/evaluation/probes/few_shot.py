"""Few labels: accuracy and attack success by the number of labelled examples a class (Radford et al. 2021, section 3.1.4)."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation import heads, success
from bezoar.evaluation.scores import Measure
from bezoar.registry import method

SHOWN = ("clean_accuracy", "attack_success", "attack_success_without_trigger", "targeted_success")


@method
class FewShot:
    """The head of the linear probe on K records of every class, drawn by their ids; and on all of them.

    Of a class with fewer than K records all are taken; a K that no class exceeds is that of all records, and left out. The
    records of a draw with K are among those of the same draw with a larger K.
    """

    shots: Annotated[tuple[int, ...], "labelled records a class"] = (1, 2, 5, 10, 20, 50, 100)
    draws: Annotated[int, "draws of each; the mean is over them"] = 5
    c: Annotated[float, "weight of the data against the penalty, as of the linear probe"] = 0.316
    standardise: Annotated[
        bool, "scale every feature to mean 0 and variance 1 over the drawn records"
    ] = True
    limit: Annotated[int | None, "labelled records at most, a fixed sample"] = None
    batch: Annotated[int, "images at a time"] = 512

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
        """`few_shot.K.clean_accuracy` and the like, K a number or `all`. Raises UserError without labelled data."""
        seen = success.TestViews.of(encoder, test, goals, victims, self.batch)
        known = success.embed_labelled(encoder, train, test, goals, self.limit, self.batch)
        linear = registry.find_method("probe", "linear")(self.c, self.standardise)
        classes = known.labels.cpu().numpy()
        most = int(np.bincount(classes).max())
        asked = [
            (k, seed) for k in sorted(set(self.shots)) if k < most for seed in range(self.draws)
        ] + [(most, 0)]
        each: dict[int, list[dict[str, Measure]]] = {}
        for i, (k, seed) in enumerate(asked):
            report(i, len(asked), f"{k} labelled records a class")
            rows = stratified(known.ids, classes, k, seed)
            head = linear.fit(known.z[rows], known.labels[rows], len(test.classes))
            how = f"; linear head on {len(rows)} labelled records, {'all' if k == most else f'{k} a class at most'}"
            each.setdefault(k, []).append(seen.measures(head, how))
        out: dict[str, Measure] = {}
        for k, found in each.items():
            means = heads.average_measures(found, f"{self.draws} draws")
            name = "all" if k == most else str(k)
            out |= {
                f"few_shot.{name}.{key}": m
                for key, m in means.items()
                if key.partition("@")[0] in SHOWN
            }
        return out

    def __post_init__(self) -> None:
        if min(self.shots, default=1) < 1 or not self.c > 0 or min(self.draws, self.batch) < 1:
            raise ValueError("needs shots >= 1, draws >= 1, c > 0, batch >= 1")
        if self.limit is not None and self.limit < 2:
            raise ValueError("limit must be at least 2")


def stratified(ids: Sequence[str], classes: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows, ascending, of the `count` records of each class that come first by a draw that belongs to their ids."""
    order = np.lexsort((np.asarray(ids), draws(seed, ids, 1, "few_shot")[:, 0], classes))
    sizes = np.bincount(classes)
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within its class
    return np.sort(order[place < count])
