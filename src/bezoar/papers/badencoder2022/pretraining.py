"""How the encoder was pre-trained (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers.badencoder2022 import ablation, attacked, best, setup
from bezoar.registry import make, method, spec
from bezoar.tables import Given, Table

WAYS = ("simclr", "moco", "simsiam")


@method
class Pretraining:
    """SimCLR, MoCo and SimSiam, for as many epochs."""

    def __call__(self, given: Given) -> Table:
        """The table at a scale."""
        s = setup(given)
        task, usual = s.tasks[0], make("objective", s.objective)
        ways = {"simclr": s.objective} | {w: f"{w}:epochs={usual.epochs},batch={usual.batch}" for w in WAYS[1:]}
        variants = [(w, attacked(s, task, best(task), objective=spec(make("objective", o)))) for w, o in ways.items()]
        return ablation(s, "BadEncoder: pre-training method", "No qualitative change (recalled).", variants)
