"""How the encoder was pre-trained (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers.badencoder2022 import get_setup, keeps_accuracy, succeeds
from bezoar.registry import make, method, spec
from bezoar.runs.tables import Claim, Row, Table, TableOptions


@method
class Pretraining:
    """SimCLR, MoCo and SimSiam; each attacked encoder is compared with its clean original."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        task = setup.tasks[0]
        usual = make("objective", setup.objective)
        objectives = {"simclr": setup.objective}
        for name in ("moco", "simsiam"):
            objectives[name] = f"{name}:epochs={usual.epochs},batch={usual.batch}"
        rows: list[Row] = []
        claims: list[Claim] = []
        for name, text in objectives.items():
            attacked = setup.attack_task(task, objective=spec(make("objective", text)))
            rows += setup.rows(task, attacked, name)
            row = f"{name}, linear"
            claims.append(succeeds(row, f"{name}: the attack succeeds"))
            claims.append(keeps_accuracy(row, f"{name}: accuracy stays that of the clean encoder"))
        return Table(
            title="BadEncoder: pre-training method",
            paper_finding="No qualitative change (recalled).",
            rows=tuple(rows),
            claims=tuple(claims),
            notes=setup.task_notes(task),
        )
