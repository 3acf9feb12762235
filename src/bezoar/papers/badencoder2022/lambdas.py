"""Weights of L1 and L2 (Jia, Liu, Gong 2022, ablation)."""

from dataclasses import replace

from bezoar.papers.badencoder2022 import ablation, attacked, best, setup
from bezoar.registry import make, method, spec
from bezoar.runs.tables import Table, TableOptions


@method
class Lambdas:
    """Each weight a quarter and four times the scale's own."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        task = s.tasks[0]
        usual = make("attack", s.attack)
        ways = {f"l1 = {usual.l1:g}, l2 = {usual.l2:g}": usual}
        for name in ("l1", "l2"):
            for times in (0.25, 4.0):
                weight = times * getattr(usual, name)
                ways[f"{name} = {weight:g}"] = replace(usual, **{name: weight})
        variants = [
            (name, attacked(s, task, best(task), attack=spec(attack)))
            for name, attack in ways.items()
        ]
        return ablation(
            s,
            "BadEncoder: weights of the loss terms",
            "Flat over about an order of magnitude (recalled).",
            variants,
        )
