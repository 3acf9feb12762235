"""Loss terms dropped (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers.badencoder2022 import ablation, attacked, best, setup
from bezoar.registry import method
from bezoar.tables import Given, Table


@method
class LossTerms:
    """All three terms, and each of them left out."""

    def __call__(self, given: Given) -> Table:
        """The table at a scale."""
        s = setup(given)
        task = s.tasks[0]
        joint = "," if ":" in s.attack else ":"
        ways = {"all terms": "", **{f"without {n.upper()}": f"{n}=0" for n in ("l0", "l1", "l2")}}
        variants = [(n, attacked(s, task, best(task), attack=s.attack + (joint + w if w else ""))) for n, w in ways.items()]
        paper = (
            "Without L0 success falls to the baseline; without L1 it drops on some tasks; without L2 accuracy drops (recalled)."
        )
        return ablation(s, "BadEncoder: loss terms", paper, variants)
