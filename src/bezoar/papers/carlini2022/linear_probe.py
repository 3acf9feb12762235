"""Zero-shot against a linear probe and nearest neighbours (Carlini & Terzis 2022, section 5)."""

from collections.abc import Callable

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers.carlini2022 import Training, change_verb, get_setup, select_attacks
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions

HEADS = {"zero-shot": "", "linear probe": "linear.", "nearest neighbours": "knn."}


@method
class LinearProbe:
    """The encoders of table `targeted`, with heads that are fitted on clean, labelled data."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        doses = setup.doses[len(setup.doses) // 2 :]
        probes = ("zero_shot", "linear", "knn")
        trainings = [
            Training(change_verb(training.trial, probe=probes), training.backdoors)
            for training in setup.shared_trainings()
        ]
        rows = []
        for head, prefix in HEADS.items():
            for dose in doses:
                attacks = select_attacks(trainings, count=dose)
                trials = list(dict.fromkeys(trial for trial, _ in attacks))
                success = tuple((trial, f"{prefix}attack_success@{j}") for trial, j in attacks)
                accuracy = Cell.mean("CA", trials, f"{prefix}clean_accuracy")
                rows.append(Row(str(dose), (Cell("ASR", success), accuracy), float(dose), head))

        def excess_over(head: str) -> Callable[[Results], Contrast]:
            def contrast(results: Results) -> Contrast:
                zero_shot = [results.cell(str(dose), "ASR", "zero-shot") for dose in doses]
                fitted = [results.cell(str(dose), "ASR", head) for dose in doses]
                return results.compare_cells(zero_shot, fitted, paired=True)

            return contrast

        return Table(
            title="Zero-shot against fitted heads",
            paper_finding=(
                "Zero-shot classification is attacked more easily than a linear probe (recalled; "
                "RVPT prints 82.7 to 3.1 %)."
            ),
            axis="poisoned pairs",
            rows=tuple(rows),
            claims=(
                Claim(
                    "Zero-shot is attacked more easily than a linear probe",
                    "recalled, RVPT",
                    "+",
                    excess_over("linear probe"),
                ),
                Claim(
                    "Zero-shot is attacked more easily than nearest neighbours",
                    "direction of ours",
                    "+",
                    excess_over("nearest neighbours"),
                ),
            ),
            notes=(
                "Heads are fitted on clean, labelled training data; `bezoar list probe` states "
                "their protocols.",
            ),
        )
