"""Loss terms dropped (Jia, Liu, Gong 2022, ablation)."""

from dataclasses import replace

from bezoar.papers.badencoder2022 import ablation, attacked, best, setup
from bezoar.registry import make, method, spec
from bezoar.tables import Given, Table


@method
class LossTerms:
    """All three terms, and each of them left out."""

    def __call__(self, given: Given) -> Table:
        """The table at a scale."""
        s = setup(given)
        task = s.tasks[0]
        usual = make("attack", s.attack)
        ways = {"all terms": usual} | {f"without {n.upper()}": replace(usual, **{n: 0.0}) for n in ("l0", "l1", "l2")}
        variants = [(name, attacked(s, task, best(task), attack=spec(attack))) for name, attack in ways.items()]
        paper = (
            "Without L0 success falls to the baseline; without L1 it drops on some tasks; without L2 accuracy drops (recalled)."
        )
        falls = {"without L0": "ASR", "without L1": "ASR", "without L2": "BA"}
        return ablation(s, "BadEncoder: loss terms", paper, variants, falls=falls)
