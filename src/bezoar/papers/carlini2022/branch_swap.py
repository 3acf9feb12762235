"""Which tower carries the backdoor: towers swapped with a clean twin's (after the DIFE audit, 2026)."""

from dataclasses import replace

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers.carlini2022 import TOGETHER, ladder, setup, trained
from bezoar.registry import method
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions, readings

ROWS = {
    "neither": "clean vision, clean text",
    "vision": "poisoned vision, clean text",
    "text": "clean vision, poisoned text",
    "both": "poisoned vision, poisoned text",
}
PRINTED = {
    "neither": 0.0991,
    "vision": 0.9999,
    "text": 0.0994,
    "both": 1.0,
}  # DIFE, CIFAR-10 classes


@method
class BranchSwap:
    """Towers of the encoders of table `poisons` and of a clean twin, in all four combinations."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        twin, strong = trained(s, s.data), s.doses[-2:]
        found = []
        for trial, row in ladder(s)[: len(s.doses)]:
            asked = Trial(replace(trial.verb, probe=("branch_swap",), baseline=twin), trial.seed)
            found += [(asked, j) for j, b in enumerate(row) if b.count in strong]
        trials = list(dict.fromkeys(t for t, _ in found))
        rows = []
        for which, name in ROWS.items():
            asr = tuple((t, f"branch_swap.{which}.attack_success@{j}") for t, j in found)
            rows.append(
                Row(
                    name,
                    (
                        Cell("ASR", asr, PRINTED[which]),
                        Cell("CA", readings(trials, f"branch_swap.{which}.clean_accuracy")),
                    ),
                )
            )

        def carries(r: Results, which: str) -> Contrast:
            return r.compare_rows("ASR", ROWS[which], ROWS["neither"], paired=True)

        return Table(
            "Which tower carries the backdoor",
            "The vision tower alone carries it (printed by the DIFE audit, where the target's own images count in).",
            "",
            tuple(rows),
            (
                Claim(
                    "The vision tower carries the backdoor",
                    "printed in DIFE",
                    "+",
                    lambda r: carries(r, "vision"),
                ),
                Claim(
                    "The text tower does not",
                    "printed in DIFE",
                    "same",
                    lambda r: carries(r, "text"),
                    0.1,
                ),
            ),
            notes=(
                f"{' and '.join(map(str, strong))} poisons a trigger, {TOGETHER} a training. The twin is trained apart: "
                "its space is first rotated onto the encoder's on clean pairs, and CA says whether that served.",
            ),
        )
