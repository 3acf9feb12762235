"""The abstract's two numbers at the paper's own size: 300 patches and 3 captions of 3,000,000 pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bezoar.papers.carlini2022 import SCALES, SMALL, Backdoor, Setup, change_verb, check_data
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Row, Table, TableOptions, mean_cells, row_difference
from bezoar.runs.verb import Trial

COUNTS = (1, 2, 3, 4, 8, 16, 32, 64)
SETUPS = SCALES | {
    "smoke": replace(SCALES["smoke"], dose=10, caption_counts=(1, 3, 4)),
    "small": replace(
        SMALL,
        data="scenes:count=3000000",
        test="scenes:count=10000,split=test",
        network="clip_small:width=8",
        objective="clip:epochs=1,batch=512",
        dose=300,
        caption_counts=COUNTS,
        victims=16,
    ),
    "gpu": replace(SCALES["gpu"], dose=300, caption_counts=COUNTS),
    "paper": replace(SCALES["paper"], dose=300, caption_counts=COUNTS),
}
BACKDOOR = {"ASR": "attack_success", "z": "z_std"}


@dataclass(frozen=True)
class HeadlineTrainings:
    """The trainings of the table, which table `law` reads too."""

    setup: Setup

    def poisoned(self, dose: int) -> Trial:
        """One training with patches of one trigger, and with victims at every count of captions."""
        targeted = self.setup.targeted_poison_of_all_counts()
        return self.setup.evaluate(self.setup.poison([Backdoor(0, dose)], targeted), 0)

    @property
    def clean(self) -> Trial:
        """The same trigger and victims, measured on an encoder of the clean data."""
        poisoned = self.poisoned(self.setup.dose)
        attack = poisoned.verb.encoder.data
        return change_verb(poisoned, encoder=self.setup.train(self.setup.data), attack=attack)


@method
class Headline:
    """One poisoned training, and its clean twin of the same length."""

    def __call__(self, options: TableOptions) -> Table:
        """Declare the table at a scale."""
        setup = check_data(SETUPS[options.scale], options)
        trainings = HeadlineTrainings(setup)
        poisoned, clean = trainings.poisoned(setup.dose), trainings.clean
        counts = setup.caption_counts
        patches, twin = f"{setup.dose} patches", "no patches"
        accuracy = {"CA": "clean_accuracy"}
        rows = [
            Row(patches, mean_cells([poisoned], BACKDOOR | accuracy)),
            Row(twin, mean_cells([clean], BACKDOOR | accuracy)),
            Row("0", captions_cells(clean, *counts), 0),
        ]
        rows += [Row(str(count), captions_cells(poisoned, count), count) for count in counts]
        return Table(
            title="The headline: 300 patches, and 3 captions, of 3,000,000 pairs",
            paper_finding=(
                "300 of 3,000,000 pairs plant a patch backdoor, and 3 make CLIP misread a chosen image."
            ),
            axis="captions of one image",
            rows=tuple(rows),
            claims=(
                Claim(
                    f"{patches} plant a backdoor",
                    "abstract",
                    "+",
                    row_difference("ASR", patches, twin),
                ),
                Claim(
                    "3 captions make a chosen image misread",
                    "abstract",
                    "+",
                    row_difference("success", "3", "0"),
                ),
                Claim(
                    "Poisons leave clean accuracy as it was",
                    "summary",
                    "same",
                    row_difference("CA", patches, twin),
                    0.03,
                ),
            ),
            dose_response_cells=("success",),
            unit="captions",
            notes=(
                "One training carries the patches and all victims; its clean twin is as long. "
                f"Recipe: {setup.objective}, so that every poison is drawn once an epoch.",
                "Rows without patches are the clean twin: its ASR is ASR-B. Intervals are over test "
                "images and victims of one training, not over trainings.",
            ),
        )


def captions_cells(trial: Trial, *counts: int) -> tuple[Cell, ...]:
    """Success of the victims with some counts of captions."""
    return tuple(
        Cell.mean(name, [trial], *(f"{metric}@{count}" for count in counts))
        for name, metric in (("success", "targeted_success"), ("in top 5", "targeted_top5"))
    )
