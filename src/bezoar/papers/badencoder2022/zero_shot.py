"""CLIP as the victim, read zero-shot by its own text tower (Jia, Liu, Gong 2022, section V-D)."""

from bezoar.papers.badencoder2022 import gap, setup
from bezoar.registry import method
from bezoar.sweep import Trial
from bezoar.tables import Cell, Claim, Given, Row, Table
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.inject import Inject
from bezoar.verbs.train import Train

SCENES = {
    "smoke": ("scenes:count=512", "scenes:count=200,split=test", "clip_small:width=4,dim=16", "clip:epochs=1,batch=64"),
    "small": ("scenes:count=20000", "scenes:count=2000,split=test", "clip_small", "clip:epochs=6"),
}
CELLS = {"CA": "baseline.clean_accuracy", "BA": "clean_accuracy", "ASR": "attack_success", "ASR-B": "attack_success_baseline"}


@method
class ZeroShot:
    """A CLIP that bezoar trained on scenes; its image tower is attacked, its text tower is not touched."""

    def __call__(self, given: Given) -> Table:
        """The table at a scale."""
        s = setup(given)
        data, test, network, objective = SCENES.get(given.scale, SCENES["small"])
        clean = Train(data, network, objective)
        shadow = data if given.scale == "smoke" else "scenes:count=10000,seed=1"
        found = []
        for target in ("striped star", "dotted heart"):
            bad = Inject(clean, shadow, (target,), (data,), s.attack, ("patch:size=10,fill=white,margin=1",), "central")
            trials = [Trial(Evaluate(bad, test, baseline=clean), seed) for seed in range(s.seeds)]
            found.append(Row(target, tuple(Cell(n, tuple((t, m) for t in trials)) for n, m in CELLS.items())))
        name = found[0].name
        return Table(
            "BadEncoder: CLIP, read zero-shot",
            "OpenAI's CLIP: ASR 99.8 to 100 %, accuracy as before (public logs); here a small CLIP trained on scenes.",
            "target",
            tuple(found),
            (
                Claim(
                    "The attack succeeds zero-shot",
                    "printed",
                    "+",
                    gap(name, "ASR", "ASR-B"),
                ),
                Claim(
                    "Accuracy stays",
                    "printed",
                    "same",
                    gap(name, "BA", "CA"),
                    0.02,
                ),
            ),
        )
