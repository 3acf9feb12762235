"""Carlini & Terzis, "Poisoning and Backdooring Contrastive Learning" (ICLR 2022): what its tables share.

Table `poisons` trains one model a trigger and a dose. Elsewhere one training carries several triggers, each with a place
and a target class of its own, and several targeted victims, and a table costs a fraction of one training a point. Triggers
that share a training help each other (table `independence`): such rows are to be compared with each other, not with levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bezoar.errors import UserError
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import TableOptions
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.poison import Poison
from bezoar.verbs.train import Train

TABLES = (  # in the order of the page
    "targeted",
    "poisons",
    "placement",
    "patch_size",
    "width",
    "clean_size",
    "captions",
    "sources",
    "linear_probe",
    "branch_swap",
    "retrieval",
    "independence",
)
TOGETHER = 4  # triggers in one training
SHARED = "Triggers that share a training do more than alone (table independence): compare rows, not levels."
FIXED = (
    "corner",
    "upper_left",
    "upper_right",
    "lower_left",
)  # two at one place are taken for each other


@dataclass(frozen=True)
class Setup:
    """A scale: data, recipe and grid. Counts are records; sizes are pixels."""

    data: str
    test: str
    network: str
    objective: str
    targets: tuple[str, ...]
    patch: int
    doses: tuple[
        int, ...
    ]  # backdoor poisons of one trigger; as many trainings as doses make a square
    dose: int  # where something other than the dose is varied, patch at one place
    random_dose: int  # the same, patch at random places
    squares: int  # repetitions of the square, each with triggers of its own
    counts: tuple[int, ...]  # captions of one targeted victim
    victims: int  # of each count, in one training
    sizes: tuple[int, ...]  # patch sizes
    widths: tuple[str, ...]  # networks, from narrow to wide
    sets: tuple[int, ...]  # sizes of the clean set
    seeds: int  # trainings a point, where no square is made

    def trigger(self, number: int, size: int = 0, place: str = "") -> str:
        """A trigger of its own colours, the same in every table."""
        place = place or FIXED[number % len(FIXED)]
        size = size or self.patch
        return f"patch:size={size},fill=blocks,cell={max(1, self.patch // 3)},place={place},seed={number}"

    def target(self, number: int) -> str:
        """What a trigger is to be read as."""
        return self.targets[number % len(self.targets)]

    @property
    def reference(self) -> str:
        """The count of captions, in the middle of the grid, where something else is varied."""
        return str(self.counts[len(self.counts) // 2])


CLASSES = ("striped star", "dotted heart", "solid ring", "checkered crescent")
SMALL = Setup(
    data="scenes:count=20000",
    test="scenes:count=2000,split=test",
    network="clip_small",
    objective="clip:epochs=6",
    targets=CLASSES,
    patch=6,
    doses=(10, 20, 40, 80, 160),
    dose=40,
    random_dose=80,
    squares=2,
    counts=(1, 2, 3, 4, 6, 8, 10, 12, 16, 32),
    victims=3,
    sizes=(3, 4, 6, 8, 10),
    widths=(
        "clip_small:width=8",
        "clip_small:width=16",
        "clip_small:width=32",
        "clip_small:width=48",
    ),
    sets=(5000, 10000, 20000, 40000),
    seeds=2,
)
SCALES = {
    "smoke": replace(
        SMALL,
        data="scenes:count=512",
        test="scenes:count=400,split=test",
        network="clip_small:width=4,dim=16",
        objective="clip:epochs=1,batch=64",
        doses=(2, 4, 6, 8, 10),
        dose=4,
        random_dose=8,
        squares=1,
        counts=(1, 4, 8),
        victims=2,
        sizes=(4, 6),
        widths=("clip_small:width=4,dim=16", "clip_small:width=8,dim=16"),
        sets=(256, 512),
        seeds=2,
    ),
    "small": SMALL,
    "gpu": replace(
        SMALL,
        data="scenes:count=3000000",
        test="scenes:count=10000,split=test",
        network="clip_small:width=64,dim=256",
        objective="clip:epochs=12,batch=1024",
        doses=(75, 150, 300, 600, 1500),
        dose=150,
        random_dose=300,
        squares=1,
        counts=(1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512),
        victims=8,
        widths=tuple(f"clip_small:width={w},dim=256" for w in (16, 32, 64, 96)),
        sets=(375000, 750000, 1500000, 3000000),
    ),
    "paper": replace(
        SMALL,
        data="",
        test="",
        network="open_clip:RN50",
        objective="clip:epochs=30,batch=1024,lr=2e-4,weight_decay=0.02,shift=8,flip=0.5",
        targets=("banana", "umbrella", "pizza", "castle"),
        patch=16,
        doses=(75, 150, 300, 600, 1500),
        dose=150,
        random_dose=300,
        squares=2,
        counts=(1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512),
        victims=4,
        sizes=(4, 8, 16, 32),
        widths=("open_clip:RN50", "open_clip:RN101", "open_clip:RN50x4"),
        sets=(375000, 750000, 1500000, 3000000),
    ),
}


def setup(given: TableOptions) -> Setup:
    """A scale, with the user's own data where they are given. Raises UserError where they must be and are not."""
    chosen = SCALES[given.scale]
    chosen = replace(chosen, data=given.data or chosen.data, test=given.test or chosen.test)
    if not chosen.data or not chosen.test:
        raise UserError(
            f"scale {given.scale!r} needs --data (CC3M or YFCC shards, as in shards:path=cc3m/{{00000..00331}}.tar,size=224) "
            "and --test (a folder of ImageNet class folders, as in folder:path=imagenet/val,size=224)"
        )
    return chosen


@dataclass(frozen=True)
class Backdoor:
    """One trigger of a training."""

    number: int
    count: int
    size: int = 0
    place: str = ""
    poison: str = ""


def poisoned(
    s: Setup, backdoors: Sequence[Backdoor], targeted: Sequence[str] = (), data: str = ""
) -> Poison | str:
    """The data with several backdoors and targeted victims planted in them: poison runs on poison runs."""
    plan: Poison | str = data or s.data
    for b in backdoors:
        how = b.poison or f"backdoor:count={b.count}"
        plan = Poison(plan, how, s.trigger(b.number, b.size, b.place), s.target(b.number))
    for how in targeted:
        plan = Poison(plan, how, victims=s.test)
    return plan


def trained(s: Setup, data: Poison | str, network: str = "") -> Train:
    """A training by the scale's recipe."""
    return Train(data, network or s.network, s.objective)


def measured(s: Setup, data: Poison | str, seed: int, network: str = "") -> Trial:
    """Poisoned data -> trained -> measured by zero-shot and z-score."""
    return Trial(Evaluate(trained(s, data, network), s.test), seed)


def victims(s: Setup) -> str:
    """Targeted victims at every count of captions."""
    return f"targeted:captions={s.counts},victims={s.victims}".replace(" ", "")


def square(s: Setup) -> list[tuple[int, tuple[Backdoor, ...]]]:
    """Latin squares: in the training with seed t, trigger j has dose t + j; every trigger meets every dose."""
    trainings = []
    for t in range(s.squares * len(s.doses)):
        first = TOGETHER * (t // len(s.doses))
        row = tuple(Backdoor(first + j, s.doses[(t + j) % len(s.doses)]) for j in range(TOGETHER))
        trainings.append((t, row))
    return trainings


def ladder(s: Setup) -> list[tuple[Trial, tuple[Backdoor, ...]]]:
    """The trainings that tables `targeted`, `linear_probe`, `branch_swap`, `retrieval` and `independence` share."""
    return [(measured(s, poisoned(s, row, [victims(s)]), t), row) for t, row in square(s)]


def alone(s: Setup, dose: int) -> list[Trial]:
    """A training for each of the first triggers, by itself; tables `poisons` and `independence` share them."""
    return [measured(s, poisoned(s, [Backdoor(j, dose)]), j) for j in range(TOGETHER)]


def clean(s: Setup) -> list[Trial]:
    """The same triggers and victims, measured on encoders that were trained without a poison; one a square."""
    out = []
    for t, row in square(s)[:: len(s.doses)]:
        out.append(
            Trial(Evaluate(trained(s, s.data), s.test, attack=poisoned(s, row, [victims(s)])), t)
        )
    return out
