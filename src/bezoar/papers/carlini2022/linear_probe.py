"""Zero-shot against a linear probe and nearest neighbours (Carlini & Terzis 2022, section 5: evaluation)."""

from dataclasses import replace

from bezoar.evaluation import dose_response
from bezoar.papers.carlini2022 import ladder, setup
from bezoar.registry import method
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions

HEADS = {"zero-shot": "", "linear probe": "linear.", "nearest neighbours": "knn."}


@method
class LinearProbe:
    """The encoders of table `poisons`, with heads that are fitted on clean, labelled data."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        doses = [str(d) for d in s.doses[len(s.doses) // 2 :]]
        rows = []
        for head, group in HEADS.items():
            for dose in doses:
                found = []
                for trial, row in ladder(s):
                    asked = Trial(
                        replace(trial.verb, probe=("zero_shot", "linear", "knn")), trial.seed
                    )
                    found += [(asked, j) for j, b in enumerate(row) if str(b.count) == dose]
                success = Cell("ASR", tuple((t, f"{group}attack_success@{j}") for t, j in found))
                right = Cell(
                    "CA",
                    tuple(
                        (t, f"{group}clean_accuracy") for t in dict.fromkeys(t for t, _ in found)
                    ),
                )
                rows.append(Row(dose, (success, right), float(dose), head))

        def less(r: Results, head: str) -> dose_response.Contrast:
            shot, other = ([r.cell(d, "ASR", h) for d in doses] for h in ("zero-shot", head))
            return r.compare_cells(shot, other, paired=True)

        return Table(
            "Zero-shot against fitted heads",
            "Zero-shot classification is attacked more easily than a linear probe (recalled; RVPT prints 82.7 to 3.1 %).",
            "poisoned pairs",
            tuple(rows),
            (
                Claim(
                    "Zero-shot is attacked more easily than a linear probe",
                    "recalled, RVPT",
                    "+",
                    lambda r: less(r, "linear probe"),
                ),
                Claim(
                    "Zero-shot is attacked more easily than nearest neighbours",
                    "direction of ours",
                    "+",
                    lambda r: less(r, "nearest neighbours"),
                ),
            ),
            notes=(
                "Heads are fitted on clean, labelled training data; their protocols are those of `bezoar list probe`.",
            ),
        )
