"""Defences: Neural Cleanse, MNTD, a certificate (Jia, Liu, Gong 2022, VI), DECREE (2023)."""

from collections.abc import Callable

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers import matrix
from bezoar.papers.badencoder2022 import Setup, Task, get_setup
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions
from bezoar.runs.verb import Trial
from bezoar.verbs.audit import Audit
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.shadows import Shadows

ANOMALY_THRESHOLD = 2.0  # the index from which Neural Cleanse calls a classifier backdoored
PATCH = 10  # side in pixels of the patch that accuracy is certified against: the trigger's
SHADOWS = 5  # shadow encoders of each kind at least: one is held out, four are fitted on
MNTD_ROW = "MNTD, shadow encoders"
NOTES = (
    "Neural Cleanse and the certificate read a linear head. PatchCleanser stands for PatchGuard: "
    f"both mask; it certifies against any patch of {PATCH} px. DECREE is later than the paper.",
    "MNTD is fitted on encoders, not on classifiers, those of table `matrix/audits`: clean ones, "
    "and attacked ones made from some of them. AUROC by cross-validation: each is judged by a "
    "meta-classifier that saw neither it nor its lineage, but others with the same attack. The "
    "clean ones were not tuned further, so MNTD may detect the tuning instead of the attack. The "
    "published form takes hundreds of shadows.",
)


@method
class Defences:
    """Whether each task's linear classifier is flagged, and its certified accuracy."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        steps = ":steps=3" if options.scale == "smoke" else ""
        rows: list[Row] = []
        claims: list[Claim] = []
        for task in setup.tasks:
            name = f"{task.name}, attacked"
            rows.append(Row(f"{task.name}, clean", defence_cells(setup, task, False, steps)))
            rows.append(Row(name, defence_cells(setup, task, True, steps)))
            below_threshold = excess(name, "anomaly index", ANOMALY_THRESHOLD)
            claims.append(
                Claim(f"Neural Cleanse misses it: {name}", "recalled", "-", below_threshold)
            )
            certified = excess(name, "certified accuracy", 0)
            claims.append(
                Claim(f"Nothing is certified: {name}", "recalled", "same", certified, 0.05)
            )
        rows.append(Row(MNTD_ROW, (Cell.mean("MNTD AUROC", [fit_mntd(options)], "auroc"),)))
        above_chance = excess(MNTD_ROW, "MNTD AUROC", 0.5)
        claims.append(
            Claim("MNTD does no better than chance", "recalled", "same", above_chance, 0.1)
        )
        return Table(
            title="BadEncoder: defences",
            paper_finding=(
                "Neural Cleanse, MNTD and PatchGuard are insufficient (abstract); the index stays "
                "under 2, and next to nothing is certified (recalled)."
            ),
            rows=tuple(rows),
            claims=tuple(claims),
            notes=(*NOTES, *setup.notes),
        )


def fit_mntd(options: TableOptions) -> Trial:
    """A meta-classifier over encoders with different seeds."""
    setup = matrix.get_setup(options)
    clean, attacked = setup.towers(SHADOWS)
    quick = {"queries": 4, "steps": 3} if options.scale == "smoke" else {}
    return Trial(Shadows(tuple(clean), tuple(attacked), setup.held_out, **quick))


def defence_cells(setup: Setup, task: Task, attacked: bool, steps: str) -> tuple[Cell, ...]:
    """Anomaly index, PL1, certified accuracy and success with masks, over seeds."""
    encoder = setup.attack_task(task) if attacked else setup.pretrain()
    probe = (f"patch_cleanser:patch={PATCH},head=linear,limit=200",)

    def trials(verb: Audit | Evaluate) -> list[Trial]:
        return [Trial(verb, seed) for seed in range(setup.seeds)]

    cleanse = trials(Audit(encoder, task.test, (f"cleanse{steps}",), "linear", bank=()))
    decree = trials(Audit(encoder, task.test, (f"decree{steps}",), "linear", bank=()))
    masked = trials(Evaluate(encoder, task.test, probe, train=task.train))
    cells = [
        Cell.mean("anomaly index", cleanse, "cleanse.anomaly_index"),
        Cell.mean("DECREE, PL1", decree, "decree.pl1"),
        Cell.mean("certified accuracy", masked, "patch_cleanser.certified_accuracy"),
        Cell.mean("accuracy behind masks", masked, "patch_cleanser.clean_accuracy"),
    ]
    if attacked:
        cells.append(Cell.mean("ASR behind masks", masked, "patch_cleanser.attack_success"))
    return tuple(cells)


def excess(row: str, cell: str, bound: float) -> Callable[[Results], Contrast]:
    """A cell minus a number."""
    return lambda results: results.compare_with_bound(results.cell(row, cell), bound)
