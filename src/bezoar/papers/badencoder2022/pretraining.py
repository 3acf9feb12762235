"""How the encoder was pre-trained (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers.badencoder2022 import attacked, best, gap, rows, setup
from bezoar.registry import make, method, spec
from bezoar.runs.tables import Claim, Table, TableOptions

WAYS = ("simclr", "moco", "simsiam")


@method
class Pretraining:
    """SimCLR, MoCo and SimSiam, for as many epochs."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale. Each encoder is held to its own clean twin: how good that is, is no matter of the attack."""
        s = setup(given)
        task, usual = s.tasks[0], make("objective", s.objective)
        ways = {"simclr": s.objective} | {
            w: f"{w}:epochs={usual.epochs},batch={usual.batch}" for w in WAYS[1:]
        }
        found, claims = [], []
        for name, way in ways.items():
            found += rows(
                s, task, name, attacked(s, task, best(task), objective=spec(make("objective", way)))
            )
            row = f"{name}, linear"
            claims.append(
                Claim(f"{name}: the attack succeeds", "recalled", "+", gap(row, "ASR", "ASR-B"))
            )
            claims.append(
                Claim(
                    f"{name}: accuracy stays that of the clean encoder",
                    "recalled",
                    "same",
                    gap(row, "BA", "CA"),
                    0.02,
                )
            )
        return Table(
            "BadEncoder: pre-training method",
            "No qualitative change (recalled).",
            "",
            tuple(found),
            tuple(claims),
            notes=(f"Task {task.name}, target {task.target!r}.", *s.notes),
        )
