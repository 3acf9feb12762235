"""Weights of L1 and L2 (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers.badencoder2022 import ablation, get_setup
from bezoar.registry import make, method
from bezoar.runs.tables import Table, TableOptions


@method
class Lambdas:
    """Each weight at a quarter and at four times the scale's own."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        task = setup.tasks[0]
        usual = make("attack", setup.attack)
        attacks = {f"l1 = {usual.l1:g}, l2 = {usual.l2:g}": setup.change_attack()}
        for term in ("l1", "l2"):
            for factor in (0.25, 4.0):
                weight = factor * getattr(usual, term)
                attacks[f"{term} = {weight:g}"] = setup.change_attack(**{term: weight})
        return ablation(
            setup,
            "BadEncoder: weights of the loss terms",
            "Flat over about an order of magnitude (recalled).",
            {name: setup.attack_task(task, attack=attack) for name, attack in attacks.items()},
        )
