"""Accuracy and success after repairs (CleanCLIP, ICCV 2023; PAR, CVPR 2026).

The first rows are about the default repair, on three encoders of each of four attacks with
different triggers, targets and data. These are the encoders of `TEST_SEEDS`, which influenced no
setting. The default was chosen on the encoders of `DEVELOPMENT_SEEDS`, a patch of
`matrix/strangers` and its two towers attacked by BadEncoder. Both lists were fixed before the first
test encoder was trained. The other rows compare repairs on one encoder of each attack of the
matrix.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from bezoar.papers.matrix import BADENCODER, BLEND, PATCH, Attack, Setup, get_setup
from bezoar.registry import method
from bezoar.runs.tables import Cell, Row, Table, TableOptions, mean_cells
from bezoar.runs.verb import Trial
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.repair import Repair

DEVELOPMENT_SEEDS = (7001,)
TEST_SEEDS = (7100, 7101, 7102)
FILTERS = ("nashville", "kelvin", "faded")  # of the encoders of a group, in turn

COLUMNS = {
    "CA before": "before.{}clean_accuracy",
    "ASR before": "before.{}attack_success",
    "CA after": "after.{}clean_accuracy",
    "ASR after": "after.{}attack_success",
    "ASR, ten poisons later": "revived_poisons.{}attack_success",
    "ASR, ten of another": "revived_other.{}attack_success",
}


ATTACKS = (  # that the default repair is measured on
    Attack("patch", "backdoor", 150, PATCH),
    Attack("blend", "backdoor", 300, BLEND),
    Attack("filter", "backdoor", 1000, "filter:preset={preset}"),
)


@method
class Repairs:
    """Attack by repair. No repair knows the trigger, and none is given an audit."""

    only: Annotated[Literal["default", "all"], "the rows of the default repair alone, or all"] = (
        "all"
    )

    takes: ClassVar[tuple[str, ...]] = ("repair", "trigger")

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        added = options.added_specs("repair")
        rows = default_rows(options.scale, setup)
        if self.only == "default":
            return declare_table(rows)
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
        return declare_table(rows)


def declare_table(rows: Sequence[Row]) -> Table:
    """The table of these rows."""
    note = (
        "Clean data: 4,000 records (CIFAR-10: images that pre-training has seen too). "
        "Learning rates are chosen on a fifth of them, never by the attack. Ten poisons: a "
        "short fine-tune with ten stamped records, of this trigger or another. The default: of "
        "`bezoar repair ENCODER --data CLEAN`, on encoders that set nothing. ASR-B: what a clean "
        "tower reads the triggered images as; of ten classes a weak one reads some as any class."
    )
    return Table(title="Repairs", axis="repair", rows=tuple(rows), notes=(note,), grid="ASR after")


def default_rows(scale: str, setup: Setup) -> list[Row]:
    """The default repair on the test encoders of each attack that it is to hold against."""
    seeds: Sequence[int] = TEST_SEEDS
    attacks: Sequence[Attack] = ATTACKS
    if scale == "small":
        setup = replace(
            setup,
            records=10000,
            network="clip_small:width=16",
            objective="clip:epochs=8,batch=64",
            images=f"{setup.images.rpartition(',limit=')[0]},limit=6000",
            shadow=f"{setup.shadow.rpartition(',limit=')[0]},limit=2000",
            tower="tower:width=24,dim=96",
            simclr="simclr:epochs=4",
        )
    elif scale == "smoke":
        seeds, attacks = TEST_SEEDS[:1], (replace(ATTACKS[2], count=9),)
    rows = []
    for attack in attacks:
        trials = []
        for i, seed in enumerate(seeds):
            trigger = attack.trigger.replace("{preset}", FILTERS[i % len(FILTERS)])
            encoder = setup.poisoned_clip(replace(attack, trigger=trigger), seed)
            trials.append(repair_clip(setup, encoder))
        rows.append(repair_row(attack.name, "the default", trials))
    towers = [(setup.clean_tower(seed), setup.attacked_tower(seed)) for seed in seeds]
    trials, clean_twins = [], []
    for clean, tower in towers:
        trials.append(repair_tower(setup, tower))
        evaluate = Evaluate(
            tower.verb, setup.held_out, ("linear",), baseline=clean.verb, train=setup.labelled
        )
        clean_twins.append(Trial(evaluate, tower.seed))
    row = repair_row(BADENCODER, "the default", trials, "linear.")
    twin = Cell.mean("ASR-B", clean_twins, "linear.attack_success_baseline")
    return [*rows, replace(row, cells=(*row.cells, twin))]


def repair_clip(setup: Setup, encoder: Trial, *repair: str) -> Trial:
    """A CLIP repaired with clean records, by default without a name, and measured zero-shot."""
    return Trial(Repair(encoder.verb, setup.fresh, repair, setup.test), encoder.seed)


def repair_tower(setup: Setup, encoder: Trial, *repair: str) -> Trial:
    """A tower repaired with clean images, and measured by a linear head."""
    images, test, labelled = setup.fresh_images, setup.held_out, setup.labelled
    return Trial(Repair(encoder.verb, images, repair, test, labelled=labelled), encoder.seed)


def repair_row(attack: str, repair: str, trials: Sequence[Trial], prefix: str = "") -> Row:
    """A row of the table. prefix: of the metrics of the head that the encoders are read by."""
    columns = {name: metric.format(prefix) for name, metric in COLUMNS.items()}
    return Row(repair_name(repair), mean_cells(trials, columns), curve=attack)


def repair_name(repair: str) -> str:
    """`finetune:objective=(par:epochs=8)` -> `finetune, par`."""
    name, _, fields = repair.partition(":")
    objective = fields.partition("objective=(")[2].partition(":")[0]
    return f"{name}, {objective}" if objective else name
