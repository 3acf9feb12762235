"""Size of the shadow data (Jia, Liu, Gong 2022, ablation)."""

from dataclasses import replace

from bezoar.papers.badencoder2022 import attacked, best, rows, setup
from bezoar.registry import make, method, spec
from bezoar.runs.tables import Claim, Table, TableOptions


@method
class ShadowSize:
    """The same number of passes over fewer images."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        task, data = s.tasks[0], make("data", s.shadow)
        name = "limit" if hasattr(data, "limit") else "count"
        found = []
        for n in s.shadows:
            bad = attacked(s, task, best(task), shadow=spec(replace(data, **{name: n})))
            found += rows(s, task, "", bad, float(n))
        fifth, most = s.shadows[-2:]  # of the pre-training set, and as many as there are
        return Table(
            "BadEncoder: size of the shadow data",
            "A fifth of the pre-training set suffices (recalled).",
            "shadow images",
            tuple(found),
            (
                Claim(
                    f"{fifth:,} shadow images do as well as {most:,}: success",
                    "recalled",
                    "same",
                    lambda r: r.compare_rows("ASR", f"{fifth:g}", f"{most:g}", "linear", True),
                    0.1,
                ),
            ),
            notes=(
                f"Task {task.name}, target {task.target!r}; the same passes over the shadow data, so fewer steps on fewer.",
                *s.notes,
            ),
        )
