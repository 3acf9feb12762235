"""Zero-shot against a linear probe and nearest neighbours (Carlini & Terzis 2022, section 5: evaluation)."""

from dataclasses import replace

from bezoar import laws
from bezoar.papers.carlini2022 import ladder, setup
from bezoar.registry import method
from bezoar.sweep import Trial
from bezoar.tables import Cell, Claim, Given, Results, Row, Table

HEADS = {"zero-shot": "", "linear probe": "linear.", "nearest neighbours": "knn."}


@method
class LinearProbe:
    """The encoders of table `poisons`, with heads that are fitted on clean, labelled data."""

    def __call__(self, given: Given) -> Table:
        """The table at a scale."""
        s = setup(given)
        rows = []
        for dose in s.doses[len(s.doses) // 2 :]:
            found = []
            for trial, row in ladder(s):
                asked = Trial(replace(trial.verb, probe=("zero_shot", "linear", "knn")), trial.seed)
                found += [(asked, j) for j, b in enumerate(row) if b.count == dose]
            cells = [Cell(f"ASR, {n}", tuple((t, f"{g}attack_success@{j}") for t, j in found)) for n, g in HEADS.items()]
            trials = list(dict.fromkeys(t for t, _ in found))
            cells += [Cell(f"CA, {n}", tuple((t, f"{g}clean_accuracy") for t in trials)) for n, g in HEADS.items()]
            rows.append(Row(str(dose), tuple(cells), dose))

        def less(r: Results, head: str) -> laws.Contrast:
            names = [row.name for row in rows]
            shot, other = ([v for n in names for v in r.values(n, f"ASR, {h}")] for h in ("zero-shot", head))
            return laws.difference(shot, other, paired=True)

        return Table(
            "Zero-shot against fitted heads",
            "Zero-shot classification is attacked more easily than a linear probe (recalled; RVPT prints 82.7 -> 3.1 %).",
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
            notes=("Heads are fitted on clean, labelled training data; their protocols are those of `bezoar list probe`.",),
        )
