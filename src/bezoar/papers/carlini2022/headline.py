"""The abstract's two numbers at the paper's size: 300 patches and 3 captions of 3,000,000 pairs."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers.carlini2022 import HEADLINE_SCALES, captions_cells, check_data
from bezoar.registry import method
from bezoar.runs.tables import (
    NORMAL_80,
    NORMAL_975,
    Claim,
    Results,
    Row,
    Table,
    TableOptions,
    mean_cells,
)

BACKDOOR = {"ASR": "attack_success", "z": "z_std"}


@method
class Headline:
    """One poisoned training, and its clean twin of the same length."""

    epochs: Annotated[int, "epochs of both trainings; 0: those of the scale"] = 0
    width: Annotated[int, "channels of `clip_small` in place of the scale's network; 0: that"] = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.width < 0:
            raise ValueError(f"epochs and width are 0 or more; got {self.epochs}, {self.width}")

    def __call__(self, options: TableOptions) -> Table:
        setup = check_data(HEADLINE_SCALES[options.scale], options)
        if self.epochs:
            objective = re.sub(r"epochs=\d+", f"epochs={self.epochs}", setup.objective)
            setup = replace(setup, objective=objective)
        if self.width:
            setup = replace(setup, network=f"clip_small:width={self.width}")
        poisoned, clean = setup.poisoned_trial(setup.dose), setup.clean_twin(setup.dose)
        counts = setup.caption_counts
        patches, twin = f"{setup.dose} patches", "no patches"
        accuracy = {"CA": "clean_accuracy"}
        rows = [
            Row(patches, mean_cells([poisoned], BACKDOOR | accuracy)),
            Row(twin, mean_cells([clean], BACKDOOR | accuracy)),
            Row("0", captions_cells([clean], *counts), 0),
        ]
        rows += [Row(str(count), captions_cells([poisoned], count), count) for count in counts]
        return Table(
            title="The headline: 300 patches, and 3 captions, of 3,000,000 pairs",
            paper_finding=(
                "300 of 3,000,000 pairs plant a patch backdoor, and 3 make CLIP misread a chosen "
                "image."
            ),
            axis="captions of one image",
            rows=tuple(rows),
            claims=(
                Claim(
                    f"{patches} plant a backdoor",
                    "abstract",
                    "+",
                    share_difference("ASR", patches, twin),
                ),
                Claim(
                    "3 captions make a chosen image misread",
                    "abstract",
                    "+",
                    share_difference("success", "3", "0"),
                ),
                Claim(
                    "Poisons leave clean accuracy as it was",
                    "summary",
                    "same",
                    share_difference("CA", patches, twin),
                    0.03,
                ),
            ),
            dose_response_cells=("success",),
            unit="captions",
            notes=(
                "One training carries the patches and all victims; its clean twin is as long. "
                f"Recipe: {setup.network} by {setup.objective}, so that every poison is drawn "
                "once an epoch.",
                "Rows without patches are the clean twin: its ASR is ASR-B. Intervals are over "
                "test images and victims of one training, not over trainings.",
            ),
        )


def share_difference(cell: str, row: str, base_row: str) -> Callable[[Results], Contrast]:
    """A contrast: a share in one row minus that in another, each of a single training.

    The interval is Newcombe's hybrid of the two shares' own: it speaks of other images and victims,
    and not of other trainings.
    """

    def contrast(results: Results) -> Contrast:
        a, b = (results.point(results.cell(name, cell)) for name in (row, base_row))
        value = a.value - b.value
        low = value - math.hypot(a.value - a.low, b.high - b.value)
        high = value + math.hypot(a.high - a.value, b.value - b.low)
        detectable = (NORMAL_975 + NORMAL_80) * (high - low) / (2 * NORMAL_975)
        how = "difference of two shares of one training each, Newcombe's hybrid score interval"
        return Contrast(value, low, high, a.n + b.n, detectable, how)

    return contrast
