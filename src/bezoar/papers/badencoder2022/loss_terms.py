"""Loss terms dropped (Jia, Liu, Gong 2022, ablation)."""

from collections.abc import Mapping
from dataclasses import replace

from bezoar.papers.badencoder2022 import Expected, ablation, attacked, best, setup
from bezoar.registry import make, method, spec
from bezoar.runs.tables import Table, TableOptions

FAILS: Mapping[str, Expected] = {"ASR": "-"}


@method
class LossTerms:
    """All three terms, and each of them left out."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        task = s.tasks[0]
        usual = make("attack", s.attack)
        ways = {"all terms": usual} | {
            f"without {n.upper()}": replace(usual, **{n: 0.0}) for n in ("l0", "l1", "l2")
        }
        variants = [
            (name, attacked(s, task, best(task), attack=spec(attack)))
            for name, attack in ways.items()
        ]
        paper = (
            "Without L0 success falls to the baseline; without L1 it drops on some tasks; without L2 accuracy drops and "
            "success stays (recalled)."
        )
        expected: dict[str, Mapping[str, Expected]] = {
            "without L0": FAILS,
            "without L1": FAILS,
            "without L2": {"ASR": "same", "BA": "-"},
        }
        return ablation(s, "BadEncoder: loss terms", paper, variants, expected=expected)
