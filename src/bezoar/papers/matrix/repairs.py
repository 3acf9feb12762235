"""Repairs of attacked encoders: what is left of accuracy and of the backdoor (CleanCLIP, ICCV 2023; PAR, CVPR 2026)."""

from bezoar.papers.matrix import ENCODER, Setup, setup
from bezoar.registry import method
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import Cell, Row, Table, TableOptions, readings
from bezoar.verbs.audit import Audit
from bezoar.verbs.repair import Repair

CELLS = {
    "CA before": "before.{}clean_accuracy",
    "ASR before": "before.{}attack_success",
    "CA after": "after.{}clean_accuracy",
    "ASR after": "after.{}attack_success",
    "ASR, ten poisons later": "revived_poisons.{}attack_success",
    "ASR, ten of another": "revived_other.{}attack_success",
}


@method
class Repairs:
    """Attack x repair. None is told the trigger; `unlearn` has what an audit inverted."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        rows = []
        for attack in (*(a for a in s.attacks if a.trigger), None):
            name = attack.name if attack else ENCODER
            victims = [
                s.poisoned(attack, k) if attack else s.injected(k) for k in s.seeds(name)[: s.each]
            ]
            for repair in s.repairs if attack else s.image_repairs:
                trials = [Trial(repaired(s, t, repair, attack is None), t.seed) for t in victims]
                group = "" if attack else "linear."
                cells = tuple(
                    Cell(label, readings(trials, metric.format(group)))
                    for label, metric in CELLS.items()
                )
                rows.append(Row(called(repair), cells, curve=name))
        note = (
            "Clean data: 4,000 records (CIFAR-10: images that pre-training has seen too). Learning rates are chosen on a fifth "
            "of them, never by the attack. Ten poisons: a short fine-tune with ten stamped records, of this trigger or another."
        )
        return Table("Repairs", "", "repair", tuple(rows), notes=(note,), grid="ASR after")


def repaired(s: Setup, encoder: Trial, repair: str, image_only: bool) -> Repair:
    """A repair by clean records; by those and an audit's triggers, for one that unlearns them."""
    data, test = (s.fresh_images, s.held_out) if image_only else (s.fresh, s.test)
    audit = (
        Audit(encoder.verb, test, ("cleanse",), bank=()) if repair.startswith("unlearn") else None
    )
    return Repair(encoder.verb, data, (repair,), test, audit, s.labelled if image_only else None)


def called(repair: str) -> str:
    """`finetune:objective=(par:epochs=8)` -> `finetune, par`."""
    name, _, fields = repair.partition(":")
    objective = fields.partition("objective=(")[2].partition(":")[0]
    return f"{name}, {objective}" if objective else name
