"""Weights of L1 and L2 (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers.badencoder2022 import ablation, attacked, best, setup
from bezoar.registry import method
from bezoar.tables import Given, Table


@method
class Lambdas:
    """Each weight a quarter and four times the published one."""

    def __call__(self, given: Given) -> Table:
        """The table at a scale."""
        s = setup(given)
        task = s.tasks[0]
        joint = "," if ":" in s.attack else ":"
        ways = {"1 and 1": "", **{f"{n} = {v:g}": f"{n}={v:g}" for n in ("l1", "l2") for v in (0.25, 4.0)}}
        variants = [(n, attacked(s, task, best(task), attack=s.attack + (joint + w if w else ""))) for n, w in ways.items()]
        return ablation(
            s, "BadEncoder: weights of the loss terms", "Flat over about an order of magnitude (recalled).", variants
        )
