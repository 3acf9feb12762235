"""Loss terms dropped (Jia, Liu, Gong 2022, ablation)."""

from bezoar.papers.badencoder2022 import ablation, get_setup
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions


@method
class LossTerms:
    """All three terms, and each of them left out."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        task = setup.tasks[0]
        attacks = {"all terms": setup.change_attack()}
        for term in ("l0", "l1", "l2"):
            attacks[f"without {term.upper()}"] = setup.change_attack(**{term: 0.0})
        return ablation(
            setup,
            "BadEncoder: loss terms",
            "Without L0 success falls to the baseline; without L1 it drops on some tasks; "
            "without L2 accuracy drops and success stays (recalled).",
            {name: setup.attack_task(task, attack=attack) for name, attack in attacks.items()},
            expected={
                "without L0": {"ASR": "-"},
                "without L1": {"ASR": "-"},
                "without L2": {"ASR": "same", "BA": "-"},
            },
        )
