"""Defences against BadEncoder: Neural Cleanse, MNTD, a certificate (Jia, Liu, Gong 2022, section VI), DECREE (CVPR 2023)."""

from collections.abc import Callable

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers import matrix
from bezoar.papers.badencoder2022 import Setup, Task, attacked, best, clean, setup
from bezoar.registry import method
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions, readings
from bezoar.verbs.audit import Audit
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.shadows import Shadows

FLAGGED = 2.0  # the anomaly index from which Neural Cleanse calls a classifier backdoored
PATCH = 10  # pixels: the trigger's side, which the certificate is for
SHADOWS, META = (
    5,
    "MNTD, shadow encoders",
)  # of each kind at least: 4 are fitted on when one is held out
QUICK, USUAL = ("cleanse:steps=3", "decree:steps=3"), ("cleanse", "decree")


@method
class Defences:
    """Each task's linear classifier on the attacked encoder and on the clean one: is it found, is it certified?"""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        audits = QUICK if given.scale == "smoke" else USUAL
        found, claims = [], []
        for task in s.tasks:
            for kind in ("clean", "attacked"):
                found.append(Row(f"{task.name}, {kind}", self.cells(s, task, kind, audits)))
            name = f"{task.name}, attacked"
            claims.append(
                Claim(
                    f"Neural Cleanse misses it: {name}",
                    "recalled",
                    "-",
                    over(name, "anomaly index", FLAGGED),
                )
            )
            claims.append(
                Claim(
                    f"Nothing is certified: {name}",
                    "recalled",
                    "same",
                    over(name, "certified accuracy", 0),
                    0.05,
                )
            )
        found.append(Row(META, (Cell("MNTD AUROC", ((self.shadows(given), "auroc"),)),)))
        claims.append(
            Claim(
                "MNTD does no better than chance",
                "recalled",
                "same",
                over(META, "MNTD AUROC", 0.5),
                0.1,
            )
        )
        return Table(
            "BadEncoder: defences",
            "Neural Cleanse, MNTD and PatchGuard are insufficient (abstract); the index stays under 2, and next to nothing is "
            "certified (recalled).",
            "",
            tuple(found),
            tuple(claims),
            notes=(
                "Neural Cleanse and the certificate read a linear head. PatchCleanser stands for PatchGuard: both mask; it "
                f"certifies against any patch of {PATCH} px. DECREE is later than the paper.",
                "MNTD is fitted on encoders, not on classifiers, those of table `matrix/audits`: clean ones, and attacked ones "
                "made from some of them. AUROC by cross-validation: each is judged by a meta-classifier that saw neither it "
                "nor its lineage, but others with the same attack. The clean ones were not tuned further: it may be the tuning "
                "that it tells. The published form takes hundreds of shadows.",
                *s.notes,
            ),
        )

    @staticmethod
    def shadows(given: TableOptions) -> Trial:
        """A meta-classifier over encoders, each with a seed of its own."""
        s = matrix.setup(given)
        good, bad = s.towers(SHADOWS)
        quick = {"queries": 4, "steps": 3} if given.scale == "smoke" else {}
        return Trial(Shadows(tuple(good), tuple(bad), s.held_out, **quick))

    @staticmethod
    def cells(s: Setup, task: Task, kind: str, audits: tuple[str, ...]) -> tuple[Cell, ...]:
        """Anomaly index, PL1, certified accuracy, and success behind the masks, of one encoder a seed."""
        bad = attacked(s, task, best(task))
        verb = clean(s) if kind == "clean" else bad
        seeds = range(s.seeds)
        cleanse, decree = (
            [Trial(Audit(verb, task.test, (a,), "linear", bank=()), k) for k in seeds]
            for a in audits
        )
        probe = (f"patch_cleanser:patch={PATCH},head=linear,limit=200",)
        masked = [Trial(Evaluate(verb, task.test, probe, train=task.train), k) for k in seeds]
        out = (
            Cell("anomaly index", readings(cleanse, "cleanse.anomaly_index")),
            Cell("DECREE, PL1", readings(decree, "decree.pl1")),
            Cell("certified accuracy", readings(masked, "patch_cleanser.certified_accuracy")),
            Cell("accuracy behind masks", readings(masked, "patch_cleanser.clean_accuracy")),
        )
        success = Cell("ASR behind masks", readings(masked, "patch_cleanser.attack_success"))
        return out if kind == "clean" else (*out, success)


def over(row: str, cell: str, bound: float) -> Callable[[Results], Contrast]:
    """A cell less a number."""
    return lambda r: r.compare_with_bound(r.cell(row, cell), bound)
