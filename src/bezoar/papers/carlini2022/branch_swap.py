"""Which tower carries the backdoor: towers swapped with a clean encoder's (DIFE audit, 2026)."""

from bezoar.papers.carlini2022 import TOGETHER, change_verb, get_setup
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Row, Table, TableOptions, row_difference

ROWS = {
    "neither": "clean vision, clean text",
    "vision": "poisoned vision, clean text",
    "text": "clean vision, poisoned text",
    "both": "poisoned vision, poisoned text",
}
PUBLISHED = {"neither": 0.0991, "vision": 0.9999, "text": 0.0994, "both": 1.0}  # DIFE, CIFAR-10


@method
class BranchSwap:
    """Towers of the encoders of table `targeted` and of a clean one, in four combinations."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        clean = setup.train(setup.data)
        doses = setup.doses[-2:]
        attacks = []
        for training in setup.shared_trainings()[: len(setup.doses)]:
            trial = change_verb(training.trial, probe=("branch_swap",), baseline=clean)
            strong = [j for j, b in enumerate(training.backdoors) if b.count in doses]
            attacks += [(trial, number) for number in strong]
        trials = list(dict.fromkeys(trial for trial, _ in attacks))
        rows = []
        for towers, name in ROWS.items():
            prefix = f"branch_swap.{towers}"
            success = tuple((trial, f"{prefix}.attack_success@{j}") for trial, j in attacks)
            accuracy = Cell.mean("CA", trials, f"{prefix}.clean_accuracy")
            rows.append(Row(name, (Cell("ASR", success, PUBLISHED[towers]), accuracy)))

        return Table(
            title="Which tower carries the backdoor",
            paper_finding=(
                "The vision tower alone carries it (printed by the DIFE audit, which counts the "
                "target's own images)."
            ),
            rows=tuple(rows),
            claims=(
                Claim(
                    "The vision tower carries the backdoor",
                    "printed in DIFE",
                    "+",
                    row_difference("ASR", ROWS["vision"], ROWS["neither"], paired=True),
                ),
                Claim(
                    "The text tower does not",
                    "printed in DIFE",
                    "same",
                    row_difference("ASR", ROWS["text"], ROWS["neither"], paired=True),
                    0.1,
                ),
            ),
            notes=(
                f"{' and '.join(map(str, doses))} poisons a trigger, {TOGETHER} triggers a "
                "training. The clean encoder is trained separately: its space is first rotated "
                "onto the other's on clean pairs; CA says whether that worked.",
            ),
        )
