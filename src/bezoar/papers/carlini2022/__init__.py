"""Carlini & Terzis, "Poisoning and Backdooring Contrastive Learning", ICLR 2022: shared setups.

Table `poisons` trains one model for each trigger and dose. In the other tables one training has
several triggers, each with its own place and target class, and several targeted victims; this makes
a point much cheaper. Triggers that share a training help each other (table `independence`), so
compare such rows with each other, but do not read them as absolute values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from bezoar.errors import UserError
from bezoar.papers import FIXED_PLACES, SCENE_CLASSES
from bezoar.runs.tables import Cell, TableOptions
from bezoar.runs.verb import Trial
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.poison import Poison
from bezoar.verbs.train import Train

TABLES = (  # in the order of the page
    "headline", "law", "targeted", "poisons", "placement", "patch_size", "width", "clean_size",
    "captions", "sources", "linear_probe", "branch_swap", "retrieval", "independence",
)  # fmt: skip
TOGETHER = 4  # triggers in one training
SHARED_NOTE = (
    "Triggers that share a training do more than each alone (table independence): compare rows, "
    "not levels."
)
Attack = tuple[Trial, int]  # an evaluated training, and the number of one of its backdoors
T = TypeVar("T")


@dataclass(frozen=True)
class Backdoor:
    """One trigger of a training."""

    number: int  # which trigger; it decides colours, place and target, the same in every table
    count: int  # records that carry it
    size: int = 0  # side of the patch in pixels; 0 for the scale's own
    place: str = ""  # where the patch is; "" for the trigger's own corner
    options: str = ""  # further fields of the poison `backdoor`

    @property
    def poison(self) -> str:
        """The spec of the poison."""
        return ",".join(filter(None, (f"backdoor:count={self.count}", self.options)))


@dataclass(frozen=True)
class Training:
    """A training with several backdoors in its data, and its evaluation."""

    trial: Trial
    backdoors: tuple[Backdoor, ...]


@dataclass(frozen=True)
class Setup:
    """The specs of a scale, and the values that its tables vary."""

    data: str  # spec of the training data
    test: str  # spec of the test data, which victims are drawn from too
    network: str  # spec of the network
    objective: str  # spec of the objective, recipe included
    targets: tuple[str, ...]  # target classes, used in turn
    patch_size: int  # side of the patch in pixels, where it is not varied
    doses: tuple[int, ...]  # poisons of one trigger; a Latin square takes as many trainings
    dose: int  # the number of poisons where something else is varied and the patch is at one place
    random_dose: int  # the same for a patch at random places
    squares: int  # number of Latin squares, each with other triggers
    caption_counts: tuple[int, ...]  # captions of one targeted victim
    victims: int  # targeted victims at each count of captions, in one training
    patch_sizes: tuple[int, ...]  # sides of the patch in pixels, for table `patch_size`
    networks: tuple[str, ...]  # specs from narrow to wide, for table `width`
    clean_sizes: tuple[int, ...]  # records of the clean set, for table `clean_size`
    seeds: int  # trainings a point, in tables without a Latin square

    @property
    def captions(self) -> int:
        """Captions of a targeted victim where something else is varied: the middle count."""
        return self.caption_counts[len(self.caption_counts) // 2]

    @property
    def targeted_success(self) -> str:
        """The metric of victims with that many captions."""
        return f"targeted_success@{self.captions}"

    def trigger(self, number: int, size: int = 0, place: str = "") -> str:
        """The spec of a trigger; its colours belong to its number, the same in every table."""
        cell = max(1, self.patch_size // 3)
        place = place or FIXED_PLACES[number % len(FIXED_PLACES)]
        return (
            f"patch:size={size or self.patch_size},fill=blocks,cell={cell},"
            f"place={place},seed={number}"
        )

    def target(self, number: int) -> str:
        """The class that a trigger is to be read as."""
        return self.targets[number % len(self.targets)]

    def targeted_poison(self, victims: int, options: str = "") -> str:
        """Targeted victims at the middle count of captions."""
        spec = f"targeted:captions={self.captions},victims={victims}"
        return ",".join(filter(None, (spec, options)))

    def targeted_poison_of_all_counts(self) -> str:
        """Targeted victims at every count of captions."""
        counts = ",".join(map(str, self.caption_counts))
        return f"targeted:captions=({counts}),victims={self.victims}"

    def poison(
        self, backdoors: Sequence[Backdoor], targeted: str = "", data: str = ""
    ) -> Poison | str:
        """The training data with backdoors and targeted victims: poison runs on poison runs.

        Args:
            backdoors: The triggers.
            targeted: Spec of the poison that adds victims; "" for none.
            data: Spec of the clean data; "" for the scale's own.
        """
        poisoned: Poison | str = data or self.data
        for b in backdoors:
            trigger = self.trigger(b.number, b.size, b.place)
            poisoned = Poison(poisoned, b.poison, trigger, self.target(b.number))
        return Poison(poisoned, targeted, victims=self.test) if targeted else poisoned

    def train(self, data: Poison | str, network: str = "") -> Train:
        """A training by the scale's recipe."""
        return Train(data, network or self.network, self.objective)

    def evaluate(self, data: Poison | str, seed: int, network: str = "") -> Trial:
        """Trained on the data with a seed, then measured zero-shot and by z-score."""
        return Trial(Evaluate(self.train(data, network), self.test), seed)

    def evaluate_seeds(self, data: Poison | str, network: str = "") -> list[Trial]:
        """The same with every seed of the scale."""
        return [self.evaluate(data, seed, network) for seed in range(self.seeds)]

    def usual_attack_cells(self, data: str = "", network: str = "") -> tuple[Cell, ...]:
        """Success and clean accuracy of `TOGETHER` triggers and twice as many victims.

        Args:
            data: Spec of the clean data; "" for the scale's own.
            network: Spec of the network; "" for the scale's own.
        """
        backdoors = [Backdoor(j, self.dose) for j in range(TOGETHER)]
        poisoned = self.poison(backdoors, self.targeted_poison(2 * TOGETHER), data)
        trials = self.evaluate_seeds(poisoned, network)
        return (
            Cell.mean("targeted success", trials, self.targeted_success),
            *attack_cells(all_attacks(trials), {"ASR": "attack_success", "z": "z_std"}),
            Cell.mean("CA", trials, "clean_accuracy"),
        )

    def latin_squares(self) -> list[tuple[Backdoor, ...]]:
        """The backdoors of each training: in a square, every trigger meets every dose once."""
        rows = []
        for square in range(self.squares):
            first = TOGETHER * square
            for doses in rotate(self.doses, len(self.doses)):
                rows.append(tuple(Backdoor(first + j, dose) for j, dose in enumerate(doses)))
        return rows

    def shared_trainings(self) -> list[Training]:
        """The trainings of targeted, linear_probe, branch_swap, retrieval and independence."""
        targeted = self.targeted_poison_of_all_counts()
        return [
            Training(self.evaluate(self.poison(backdoors, targeted), seed), backdoors)
            for seed, backdoors in enumerate(self.latin_squares())
        ]

    def single_trigger_trials(self, dose: int) -> list[Trial]:
        """A training for each of the first triggers alone, for `poisons` and `independence`."""
        return [self.evaluate(self.poison([Backdoor(j, dose)]), j) for j in range(TOGETHER)]

    def poisoned_trial(self, dose: int, seed: int = 0) -> Trial:
        """One training with patches of one trigger, and with victims at every count of captions."""
        targeted = self.targeted_poison_of_all_counts()
        return self.evaluate(self.poison([Backdoor(seed, dose)], targeted), seed)

    def clean_twin(self, dose: int, seed: int = 0) -> Trial:
        """The trigger and victims of such a training, measured on an encoder of the clean data."""
        poisoned = self.poisoned_trial(dose, seed)
        attack = poisoned.verb.encoder.data
        return change_verb(poisoned, encoder=self.train(self.data), attack=attack)

    def clean_trials(self) -> list[Trial]:
        """Each square's first triggers and victims, measured on an encoder of clean data."""
        trials = []
        for training in self.shared_trainings()[:: len(self.doses)]:
            attack = training.trial.verb.encoder.data
            verb = Evaluate(self.train(self.data), self.test, attack=attack)
            trials.append(Trial(verb, training.trial.seed))
        return trials


SMALL = Setup(
    data="scenes:count=20000",
    test="scenes:count=2000,split=test",
    network="clip_small",
    objective="clip:epochs=6",
    targets=SCENE_CLASSES,
    patch_size=6,
    doses=(10, 20, 40, 80, 160),
    dose=40,
    random_dose=80,
    squares=2,
    caption_counts=(1, 2, 3, 4, 6, 8, 10, 12, 16, 32),
    victims=3,
    patch_sizes=(3, 4, 6, 8, 10),
    networks=tuple(f"clip_small:width={width}" for width in (8, 16, 32, 48)),
    clean_sizes=(5000, 10000, 20000, 40000),
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
        caption_counts=(1, 4, 8),
        victims=2,
        patch_sizes=(4, 6),
        networks=("clip_small:width=4,dim=16", "clip_small:width=8,dim=16"),
        clean_sizes=(256, 512),
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
        caption_counts=(1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512),
        victims=8,
        networks=tuple(f"clip_small:width={width},dim=256" for width in (16, 32, 64, 96)),
        clean_sizes=(375000, 750000, 1500000, 3000000),
    ),
    "paper": replace(
        SMALL,
        data="",
        test="",
        network="open_clip:RN50",
        objective="clip:epochs=30,batch=1024,lr=2e-4,weight_decay=0.02,shift=8,flip=0.5",
        targets=("banana", "umbrella", "pizza", "castle"),
        patch_size=16,
        doses=(75, 150, 300, 600, 1500),
        dose=150,
        random_dose=300,
        caption_counts=(1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512),
        victims=4,
        patch_sizes=(4, 8, 16, 32),
        networks=("open_clip:RN50", "open_clip:RN101", "open_clip:RN50x4"),
        clean_sizes=(375000, 750000, 1500000, 3000000),
    ),
}

CAPTIONS = (1, 2, 3, 4, 8, 16, 32, 64)
HEADLINE_SCALES = SCALES | {  # of the two numbers of the abstract, and of the law over sizes
    "smoke": replace(SCALES["smoke"], dose=10, caption_counts=(1, 3, 4)),
    "small": replace(
        SMALL,
        data="scenes:count=3000000",
        test="scenes:count=10000,split=test",
        network="clip_small:width=8",
        objective="clip:epochs=1,batch=512",
        dose=300,
        caption_counts=CAPTIONS,
        victims=16,
    ),
    "gpu": replace(SCALES["gpu"], dose=300, caption_counts=CAPTIONS),
    "paper": replace(SCALES["paper"], dose=300, caption_counts=CAPTIONS),
}


def get_setup(options: TableOptions) -> Setup:
    """The setup of a scale, with the user's data if there are any.

    Raises:
        UserError: If the scale has no data of its own and the user names none.
    """
    return check_data(SCALES[options.scale], options)


def check_data(setup: Setup, options: TableOptions) -> Setup:
    """The setup with the user's data, if there are any; see `get_setup`."""
    setup = replace(setup, data=options.data or setup.data, test=options.test or setup.test)
    if not setup.data or not setup.test:
        raise UserError(
            f"scale {options.scale!r} needs --data (CC3M or YFCC shards, as in "
            "shards:path=cc3m/{00000..00331}.tar,size=224) and --test (a folder of ImageNet class "
            "folders, as in folder:path=imagenet/val,size=224)"
        )
    return setup


def rotate(values: Sequence[T], trainings: int) -> list[list[T]]:
    """The value of each trigger of each training: trigger j of training t has value t + j."""
    return [[values[(t + j) % len(values)] for j in range(TOGETHER)] for t in range(trainings)]


def select_attacks(trainings: Sequence[Training], **values: object) -> list[Attack]:
    """The backdoors of several trainings whose fields have the given values."""
    return [
        (training.trial, number)
        for training in trainings
        for number, backdoor in enumerate(training.backdoors)
        if all(getattr(backdoor, field) == value for field, value in values.items())
    ]


def all_attacks(trials: Sequence[Trial]) -> list[Attack]:
    """Every backdoor of trainings that carry `TOGETHER` of them."""
    return [(trial, number) for trial in trials for number in range(TOGETHER)]


def attack_cells(attacks: Sequence[Attack], columns: Mapping[str, str]) -> tuple[Cell, ...]:
    """A cell a column, the mean of a metric over backdoors. columns: name -> metric."""
    return tuple(
        Cell(name, tuple((trial, f"{metric}@{number}") for trial, number in attacks))
        for name, metric in columns.items()
    )


def captions_cells(trials: Sequence[Trial], *counts: int) -> tuple[Cell, ...]:
    """Success of the victims with some counts of captions."""
    return (
        Cell.mean("success", trials, *(f"targeted_success@{count}" for count in counts)),
        Cell.mean("in top 5", trials, *(f"targeted_top5@{count}" for count in counts)),
    )


def change_verb(trial: Trial, **fields: object) -> Trial:
    """The same trial with other values in some fields of its verb."""
    return Trial(replace(trial.verb, **fields), trial.seed)
