"""What repairs leave of accuracy and of the backdoor (CleanCLIP, ICCV 2023; PAR, CVPR 2026)."""

from collections.abc import Sequence
from typing import ClassVar

from bezoar.papers.matrix import BADENCODER, Setup, get_setup
from bezoar.registry import method
from bezoar.runs.tables import Row, Table, TableOptions, mean_cells
from bezoar.runs.verb import Trial
from bezoar.verbs.audit import Audit
from bezoar.verbs.repair import Repair

COLUMNS = {
    "CA before": "before.{}clean_accuracy",
    "ASR before": "before.{}attack_success",
    "CA after": "after.{}clean_accuracy",
    "ASR after": "after.{}attack_success",
    "ASR, ten poisons later": "revived_poisons.{}attack_success",
    "ASR, ten of another": "revived_other.{}attack_success",
}


@method
class Repairs:
    """Attack by repair. No repair knows the trigger; `unlearn` is given what an audit inverted."""

    takes: ClassVar[tuple[str, ...]] = ("repair", "trigger")

    def __call__(self, options: TableOptions) -> Table:
        """Declare the table at a scale."""
        setup = get_setup(options)
        added = options.added_specs("repair")
        rows = []
        for attack in (attack for attack in setup.attacks if attack.trigger):
            seeds = setup.seeds(attack.name)[: setup.each]
            encoders = [setup.poisoned_clip(attack, seed) for seed in seeds]
            for repair in (*setup.repairs, *added):
                trials = [repair_clip(setup, encoder, repair) for encoder in encoders]
                rows.append(repair_row(attack.name, repair, trials))
        towers = [setup.attacked_tower(s) for s in setup.seeds(BADENCODER)[: setup.each]]
        for repair in (*setup.image_repairs, *added):
            trials = [repair_tower(setup, tower, repair) for tower in towers]
            rows.append(repair_row(BADENCODER, repair, trials, "linear."))
        note = (
            "Clean data: 4,000 records (CIFAR-10: images that pre-training has seen too). "
            "Learning rates are chosen on a fifth of them, never by the attack. Ten poisons: a "
            "short fine-tune with ten stamped records, of this trigger or another."
        )
        return Table(
            title="Repairs", axis="repair", rows=tuple(rows), notes=(note,), grid="ASR after"
        )


def repair_clip(setup: Setup, encoder: Trial, repair: str) -> Trial:
    """A CLIP repaired with clean records, and measured zero-shot."""
    audit = audit_for(repair, encoder, setup.test)
    verb = Repair(encoder.verb, setup.fresh, (repair,), setup.test, audit)
    return Trial(verb, encoder.seed)


def repair_tower(setup: Setup, encoder: Trial, repair: str) -> Trial:
    """A tower repaired with clean images, and measured by a linear head."""
    audit = audit_for(repair, encoder, setup.held_out)
    verb = Repair(
        encoder.verb, setup.fresh_images, (repair,), setup.held_out, audit, setup.labelled
    )
    return Trial(verb, encoder.seed)


def audit_for(repair: str, encoder: Trial, test: str) -> Audit | None:
    """The audit whose triggers `unlearn` unlearns; None for a repair that needs none."""
    if not repair.startswith("unlearn"):
        return None
    return Audit(encoder.verb, test, ("cleanse",), bank=())


def repair_row(attack: str, repair: str, trials: Sequence[Trial], prefix: str = "") -> Row:
    """A row of the table. prefix: of the metrics of the head that the encoders are read by."""
    columns = {name: metric.format(prefix) for name, metric in COLUMNS.items()}
    return Row(repair_name(repair), mean_cells(trials, columns), curve=attack)


def repair_name(repair: str) -> str:
    """`finetune:objective=(par:epochs=8)` -> `finetune, par`."""
    name, _, fields = repair.partition(":")
    objective = fields.partition("objective=(")[2].partition(":")[0]
    return f"{name}, {objective}" if objective else name
