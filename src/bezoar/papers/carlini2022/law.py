"""Does the number of poisons that half of the attacks need grow with the data? Four sizes."""

import math
import re
from dataclasses import replace
from typing import Annotated

import numpy as np

from bezoar.evaluation.dose_response import Contrast
from bezoar.evaluation.scores import Measure
from bezoar.papers.carlini2022 import HEADLINE_SCALES, Setup, captions_cells
from bezoar.registry import method
from bezoar.runs.tables import NORMAL_80, NORMAL_975, Cell, Claim, Results, Row, Table, TableOptions

MARGIN = 0.25  # exponents of growth up to this one count as none; proportional growth is 1
HEADLINE = HEADLINE_SCALES["small"]
SMALLER = replace(HEADLINE, test="scenes:count=2000,split=test")
# Records of the clean set -> what is trained on them. Each has the epochs that its size needs.
# The doses of the headline do nothing at its size in one epoch: a second setup has more of both.
SIZES: dict[int, tuple[Setup, ...]] = {
    20_000: (
        replace(
            SMALLER,
            data="scenes:count=20000",
            objective="clip:epochs=30",
            doses=(20, 40, 80, 160, 320),
            dose=320,
            victims=3,
            seeds=3,
        ),
    ),
    100_000: (
        replace(
            SMALLER,
            data="scenes:count=100000",
            objective="clip:epochs=12",
            doses=(20, 40, 80, 160, 320),
            dose=320,
            victims=8,
            seeds=1,
        ),
    ),
    500_000: (
        replace(
            SMALLER,
            data="scenes:count=500000",
            objective="clip:epochs=4,batch=512",
            doses=(40, 80, 160, 320, 640),
            dose=640,
            victims=8,
            seeds=1,
        ),
    ),
    3_000_000: (
        replace(HEADLINE, doses=(150, 300, 600), seeds=1),
        replace(
            HEADLINE,
            doses=(3000, 15000),
            dose=15000,
            caption_counts=(128, 256, 512, 1024),
            victims=8,
            seeds=1,
        ),
    ),
}
SMOKE = replace(HEADLINE_SCALES["smoke"], doses=(4, 8, 16), dose=16, seeds=1)


@method
class Law:
    """At each size, one trigger a training at several doses, and victims at all caption counts."""

    sizes: Annotated[tuple[int, ...], "records of the clean sets: some of the four"] = tuple(SIZES)
    epochs: Annotated[
        int, "of every training, so that a poison is drawn as often at every size"
    ] = 0

    def __post_init__(self) -> None:
        if not self.sizes or not set(self.sizes) <= SIZES.keys():
            raise ValueError(f"sizes are some of {', '.join(map(str, SIZES))}")
        if not 0 <= self.epochs <= 1000:
            raise ValueError(
                f"needs epochs in 0..1000, 0 for those of each size; got {self.epochs}"
            )

    def __call__(self, options: TableOptions) -> Table:
        """Declare the table. It draws its own data; scales `gpu` and `paper` equal `small`."""
        rows = []
        for size in self.sizes:
            setups = self.setups(size)
            if options.scale == "smoke":
                setups = (replace(SMOKE, data=f"scenes:count={256 + size // 20_000}"),)
            rows += rows_of_size(setups, f"{size:,}")
        claims = [self.growth_claim(what) for what in ("patches", "captions")]
        recipes = ", ".join(f"{size:,}: {self.setups(size)[0].objective}" for size in self.sizes)
        return Table(
            title="The law: poisons that half of the attacks need, against the size of the data",
            paper_finding="Success hardly depends on the size of the clean data (recalled).",
            axis="patches of one trigger, or captions of one image",
            rows=tuple(rows),
            claims=tuple(claims),
            dose_response_cells=("success",),
            notes=(
                f"Recipes: {recipes}. Every poison is drawn once an epoch: a number of poisons "
                "times the epochs is that of exposures.",
                "The exponent of growth e is that of poisons = constant x records^e: 0 is no "
                "growth, 1 a constant share of the data.",
            ),
        )

    def setups(self, size: int) -> tuple[Setup, ...]:
        """What is trained at a size, with this table's number of epochs if it has one."""
        if not self.epochs:
            return SIZES[size]
        epochs = f"epochs={self.epochs}"
        return tuple(
            replace(setup, objective=re.sub(r"epochs=\d+", epochs, setup.objective))
            for setup in SIZES[size]
        )

    def growth_claim(self, what: str) -> Claim:
        """The claim about the number of patches or of captions."""
        return Claim(
            f"The number of {what} that half of the attacks need hardly grows with the data",
            "recalled",
            "same",
            lambda results: growth_exponent(results, what, self.sizes),
            MARGIN,
        )


def rows_of_size(setups: tuple[Setup, ...], size: str) -> list[Row]:
    """The rows of one size: a curve over patches, and one over captions."""
    patches, captions = f"{size} pairs, patches", f"{size} pairs, captions"
    rows = []
    for setup in setups:
        seeds = range(setup.seeds)
        clean = [setup.clean_twin(setup.dose, seed) for seed in seeds]
        by_dose = {
            dose: [setup.poisoned_trial(dose, seed) for seed in seeds] for dose in setup.doses
        }
        counts = setup.caption_counts
        if setup is setups[0]:
            rows.append(Row("0", (Cell.mean("success", clean, "attack_success"),), 0, patches))
            rows.append(Row("0", captions_cells(clean, *counts), 0, captions))
        for dose, trials in by_dose.items():
            cell = Cell.mean("success", trials, "attack_success")
            rows.append(Row(str(dose), (cell,), dose, patches))
        poisoned = [trial for trials in by_dose.values() for trial in trials]
        for count in counts:
            rows.append(Row(str(count), captions_cells(poisoned, count), count, captions))
    return sorted(rows, key=lambda row: row.curve == captions)


def growth_exponent(results: Results, what: str, sizes: tuple[int, ...]) -> Contrast:
    """The exponent e of x50 = constant x records^e, by weighted least squares of the logarithms.

    Sizes whose x50 the data do not bound on both sides have no weight. Without two others the
    interval is open.
    """
    doses = [results.fit_dose_response("success", f"{size:,} pairs, {what}").x50 for size in sizes]
    return fit_exponent(sizes, doses)


def fit_exponent(sizes: tuple[int, ...], doses: list[Measure]) -> Contrast:
    """See `growth_exponent`. doses: x50 at each size, with its interval."""
    bounded = [
        (math.log(n), math.log(m.value), math.log(m.high / m.low) / (2 * NORMAL_975))
        for n, m in zip(sizes, doses, strict=True)
        if 0 < m.low < m.high < math.inf
    ]
    how = f"exponent of growth over {len(bounded)} sizes whose x50 is bounded"
    if len(bounded) < 2:
        return Contrast(0.0, -math.inf, math.inf, len(bounded), math.inf, how)
    x, y, error = np.array(bounded).T  # (sizes,) each
    weight = error**-2
    x -= np.average(x, weights=weight)
    spread = float((weight * x**2).sum())
    value, half = float((weight * x * y).sum()) / spread, NORMAL_975 / spread**0.5
    detectable = (NORMAL_975 + NORMAL_80) / spread**0.5
    return Contrast(value, value - half, value + half, len(bounded), detectable, how)
