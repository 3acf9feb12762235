"""The matrix of every attack against every detector, audit and repair: shared parts of its tables.

Victims are small CLIPs trained on poisoned scenes, and SimCLR towers attacked by BadEncoder. Clean
encoders have the same architecture and training length, but different data and seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bezoar.papers import FIXED_PLACES, SCENE_CLASSES, dataset_spec
from bezoar.runs.tables import Cell, Row, Table, TableOptions, mean_cells
from bezoar.runs.verb import Trial
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.inject import Inject
from bezoar.verbs.poison import Poison
from bezoar.verbs.scan import Scan
from bezoar.verbs.train import Train

TABLES = (  # in the order of the page
    "detection", "default_scan", "unseen", "flickr8k", "aerial", "retraining", "audits",
    "strangers", "repairs", "today",
)  # fmt: skip
BADENCODER = "BadEncoder"
SEEDS_OF_AN_ATTACK = 3  # every attack but the first has this many seeds
DETECTORS = (
    "transplant", "duplicates", "k_distance", "lid", "slof", "dao", "isolation_forest",
    "clip_score", "loss_trace", "safeclip", "spectral", "activation_clustering",
)  # fmt: skip
DETECTION_COLUMNS = {
    "AUROC": "auroc",
    "AP": "average_precision",
    "recall, worst 0.1 %": "recall_at_0.001",
    "worst 1 %": "recall_at_0.01",
    "worst 10 %": "recall_at_0.1",
    "worst 1.5 n": "recall_at_1.5n",
    "precision at n": "precision_at_n",
}
REMOVED = 0.08  # share of the records that a keep-list leaves out, whatever the attack


@dataclass(frozen=True)
class Attack:
    """One way to poison image-text data."""

    name: str  # the attack's name in the tables
    poison: str  # spec of the poison without its counts
    count: int  # poisoned records; of a targeted attack, captions of one victim
    trigger: str = ""  # its spec; {place} and {seed} are those of an encoder; "" if targeted
    victims: int = 0  # victims of a targeted attack

    @property
    def poisons(self) -> int:
        """Poisoned records."""
        return self.count * (self.victims or 1)

    @property
    def success_metric(self) -> str:
        """The metric of the attack's success: of the trigger, or of the victims."""
        return f"targeted_success@{self.count}" if self.victims else "attack_success"

    def poison_data(
        self, clean: str, test: str, seed: int, targets: Sequence[str] = SCENE_CLASSES
    ) -> Poison:
        """The poisoned data of one encoder; a targeted attack draws its victims from the test."""
        target = targets[seed % len(targets)]
        if self.victims:
            spec = f"{self.poison}:captions={self.count},victims={self.victims}"
            any_class = targets is SCENE_CLASSES  # every victim of scenes is given a class in turn
            return Poison(clean, spec, target="" if any_class else target, victims=test)
        place = FIXED_PLACES[seed % len(FIXED_PLACES)]
        trigger = self.trigger.format(place=place, seed=seed)
        return Poison(clean, f"{self.poison}:count={self.count}", trigger, target)


PATCH = "patch:size=6,fill=blocks,cell=2,place={place},seed={seed}"
BLEND = "blend:alpha=0.3,pattern=noise,seed={seed}"
ATTACKS = (
    Attack("patch", "backdoor", 200, PATCH),
    Attack("blend", "backdoor", 300, BLEND),
    Attack("warp", "backdoor", 300, "warp:k=32,strength=2.0,seed={seed}"),
    Attack("SIG", "backdoor", 200, "sinusoid:delta=20,frequency=6"),
    Attack("targeted", "targeted", 16, victims=8),
    Attack("clean-label", "clean_label", 250, PATCH),
)


@dataclass(frozen=True)
class Setup:
    """The specs and numbers of a scale."""

    records: int  # records of a CLIP's training data
    test: str  # spec of the CLIPs' test data
    network: str  # spec of the CLIPs' network
    objective: str  # spec of the CLIPs' objective
    attacks: tuple[Attack, ...]  # attacks on image-text data
    images: str  # spec of the SimCLR towers' training data
    shadow: str  # spec of BadEncoder's shadow data
    labelled: str  # spec of the labelled images that heads of towers are fitted on
    held_out: str  # spec of the towers' test data
    tower: str  # spec of the towers' network
    simclr: str  # spec of the towers' objective
    badencoder: str  # spec of the attack on towers
    triggers: tuple[str, ...]  # BadEncoder's triggers, in turn
    targets: tuple[str, ...]  # BadEncoder's target classes, in turn
    audits: tuple[str, ...]  # audits of CLIPs
    image_audits: tuple[str, ...]  # audits of towers
    repairs: tuple[str, ...]  # repairs of CLIPs
    image_repairs: tuple[str, ...]  # repairs of towers
    fresh: str  # spec of the clean records that a repair of a CLIP is given
    fresh_images: str  # the same for a tower
    clean: int  # clean encoders of each kind; they set the audits' thresholds
    patched: int  # encoders of the first attack, and of BadEncoder, that are audited
    others: int  # encoders of every other attack that are audited, at most SEEDS_OF_AN_ATTACK
    each: int  # encoders of every attack that are scanned or repaired, at most SEEDS_OF_AN_ATTACK

    def clean_data(self, seed: int) -> str:
        """Spec of a CLIP's clean training data."""
        return f"scenes:count={self.records},seed={seed}"

    def clean_clip(self, seed: int) -> Trial:
        """A CLIP trained on clean data."""
        return Trial(Train(self.clean_data(seed), self.network, self.objective), seed)

    def poisoned_clip(self, attack: Attack, seed: int) -> Trial:
        """A CLIP trained on poisoned data."""
        data = attack.poison_data(self.clean_data(seed), self.test, seed)
        return Trial(Train(data, self.network, self.objective), seed)

    def clean_tower(self, seed: int) -> Trial:
        """A SimCLR tower trained on clean images."""
        return Trial(Train(self.images, self.tower, self.simclr), seed)

    def attacked_tower(self, seed: int) -> Trial:
        """A SimCLR tower with BadEncoder's backdoor, its reference chosen by margin."""
        verb = Inject(
            self.clean_tower(seed).verb,
            self.shadow,
            target=(self.targets[seed % len(self.targets)],),
            reference=(self.labelled,),
            attack=self.badencoder,
            trigger=(self.triggers[seed % len(self.triggers)],),
            choose="confident",
        )
        return Trial(verb, seed)

    def towers(self, least: int = 0) -> tuple[list[Trial], list[Trial]]:
        """Clean SimCLR towers and attacked ones. least: how many of each at least.

        The clean towers that were attacked are the first of the clean ones.
        """
        seeds = self.seeds(BADENCODER)
        attacked = range(seeds[0], seeds[0] + max(len(seeds), least))
        clean = list(dict.fromkeys([*attacked, *range(self.clean)]))[: max(self.clean, least)]
        return [self.clean_tower(s) for s in clean], [self.attacked_tower(s) for s in attacked]

    def seeds(self, attack: str) -> Sequence[int]:
        """The seeds of an attack's encoders, shared with no other attack or clean encoder."""
        names = [a.name for a in self.attacks]
        first = 2 * self.clean
        if attack in (BADENCODER, names[0]):
            return range(first, first + self.patched)
        start = first + self.patched + (names.index(attack) - 1) * SEEDS_OF_AN_ATTACK
        return range(start, start + self.others)


SMALL = Setup(
    records=20000,
    test="scenes:count=2000,split=test",
    network="clip_small",
    objective="clip:epochs=6",
    attacks=ATTACKS,
    images="",
    shadow="",
    labelled="",
    held_out="",
    tower="tower",
    simclr="simclr:epochs=5",
    badencoder="badencoder:epochs=8,batch=64,lr=0.02,views=16,l2=5",
    triggers=(
        "patch:size=10,fill=white,margin=1",
        "patch:size=8,fill=blocks,cell=2,margin=1,seed=1",
    ),
    targets=("truck", "airplane", "bird", "dog", "ship"),  # classes of CIFAR-10
    audits=("decree", "cleanse", "ssl_cleanse", "whitening", "whole_image"),
    image_audits=("decree", "cleanse", "ssl_cleanse", "whitening", "whole_image"),
    repairs=(
        "finetune",
        "finetune:objective=(par:epochs=8)",
        "finetune:objective=(clip:epochs=8)",
        "prune",
        "distill",
        "unlearn",
    ),
    image_repairs=("finetune:objective=(simclr:epochs=8)", "prune", "distill", "unlearn"),
    fresh="scenes:count=4000,seed=9000",
    fresh_images="",
    clean=20,
    patched=10,
    others=3,
    each=1,
)
SMOKE_DATA, SMOKE_TEST = "scenes:count=256", "scenes:count=200,split=test"
SMOKE = replace(
    SMALL,
    records=256,
    test=SMOKE_TEST,
    network="clip_small:width=4,dim=16",
    objective="clip:epochs=1,batch=64",
    attacks=(Attack("patch", "backdoor", 9, PATCH), Attack("targeted", "targeted", 4, victims=2)),
    images=SMOKE_DATA,
    shadow=SMOKE_DATA,
    labelled=SMOKE_DATA,
    held_out=SMOKE_TEST,
    tower="tower:width=4,dim=16",
    simclr="simclr:epochs=1,batch=64,hidden=16,dim=8",
    badencoder="badencoder:epochs=1,batch=64,lr=0.01",
    targets=SCENE_CLASSES,
    audits=("decree:steps=3", "cleanse:steps=3"),
    image_audits=("decree:steps=3",),
    repairs=("finetune:objective=(cleanclip:epochs=1,batch=64),lrs=(1e-3)", "prune"),
    image_repairs=("distill:epochs=1",),
    fresh="scenes:count=300,seed=9000",
    fresh_images=SMOKE_DATA,
    clean=2,
    patched=2,
    others=2,
    each=2,
)
LARGE = replace(
    SMALL,
    records=1_000_000,
    network="clip_small:width=64,dim=256",
    objective="clip:epochs=8,batch=1024",
    tower="resnet:depth=18,stem=cifar",
    simclr="simclr:epochs=100",
    badencoder="badencoder:epochs=20",
    clean=40,
    patched=20,
    each=3,
)


def get_setup(options: TableOptions) -> Setup:
    """The setup of a scale. The user's own triggers are added, with as many poisons as a patch."""
    setup = scale_setup(options)
    patch = setup.attacks[0]
    added = [
        replace(
            patch,
            name=Path(spec.partition(":")[0]).stem,
            trigger=spec.replace("{", "{{").replace("}", "}}"),  # it is formatted, see `Attack`
        )
        for spec in options.added_specs("trigger")
    ]
    return replace(setup, attacks=(*setup.attacks, *added))


def scale_setup(options: TableOptions) -> Setup:
    """The setup of a scale; beyond `smoke` with CIFAR-10 from the user's folder."""
    if options.scale == "smoke":
        return SMOKE

    def train_images(limit: int) -> str:
        return dataset_spec(options.root, "cifar10", "train", limit=limit)

    small = options.scale == "small"
    return replace(
        SMALL if small else LARGE,
        images=train_images(20000) if small else dataset_spec(options.root, "cifar10", "train"),
        shadow=train_images(5000 if small else 10000),
        fresh_images=train_images(4000),
        labelled=train_images(5000),
        held_out=dataset_spec(options.root, "cifar10", "test", limit=2000),
    )


@dataclass(frozen=True)
class PoisonedSet:
    """Poisoned data at one rate, and the encoders that were trained on them."""

    name: str  # the attack and its rate
    attack: Attack  # the attack on the data
    encoders: tuple[Trial, ...]  # trainings, each on different poisoned data
    test: str  # spec of the test data
    probe: tuple[str, ...] = ("zero_shot", "z_score")  # measure accuracy and success

    def scans(self, *detectors: str) -> list[Trial]:
        """The training data of every encoder, scanned with it, by default by every detector."""
        return [
            Trial(Scan(encoder.verb, detector=detectors or DETECTORS, remove=REMOVED), encoder.seed)
            for encoder in self.encoders
        ]

    def evaluate(self) -> list[Trial]:
        """Evaluations of the encoders."""
        return [
            Trial(Evaluate(encoder.verb, self.test, self.probe), encoder.seed)
            for encoder in self.encoders
        ]

    def evaluate_retrained(self) -> list[Trial]:
        """Evaluations of encoders that were trained again on the records that the scans keep."""
        trials = []
        for encoder, scan in zip(self.encoders, self.scans(), strict=True):
            retrained = replace(encoder.verb, keep=scan.verb)
            trials.append(Trial(Evaluate(retrained, self.test, self.probe), encoder.seed))
        return trials


def poisoned_scenes(
    setup: Setup, sets: int, patch_multiples: Sequence[float] = (0.1, 5)
) -> list[PoisonedSet]:
    """Scenes poisoned by every attack of a setup.

    Args:
        setup: The setup.
        sets: Sets of each attack and rate.
        patch_multiples: Multiples of the first attack's number of poisons, at which it is carried
            out too.
    """
    patch, *others = setup.attacks
    counts = {max(1, round(patch.count * multiple)) for multiple in (1, *patch_multiples)}
    patches = [replace(patch, count=count) for count in sorted(counts)]
    poisoned = []
    for attack in (*patches, *others):
        seeds = setup.seeds(attack.name)[:sets]
        encoders = tuple(setup.poisoned_clip(attack, seed) for seed in seeds)
        name = f"{attack.name}, {100 * attack.poisons / setup.records:.3g} %"
        poisoned.append(PoisonedSet(name, attack, encoders, setup.test))
    return poisoned


@dataclass(frozen=True)
class CaptionedCorpus:
    """A published set of captioned images, as tars in a folder below the user's root."""

    folder: str  # name of the folder, which holds `train-*.tar` and `val-*.tar`
    targets: tuple[str, ...]  # words that poisoned images are to be read as, in turn
    objective: str  # spec of the objective
    poisons: int  # records that carry a patch; a blend takes twice as many


FLICKR8K = CaptionedCorpus("flickr8k", ("snow", "beach", "bicycle"), "clip:epochs=5", 300)
AERIAL = CaptionedCorpus(
    "ucm_captions", ("tennis court", "airplane", "river"), "clip:epochs=12", 84
)


def corpus_specs(options: TableOptions, corpus: CaptionedCorpus) -> tuple[str, str]:
    """Specs of the training and the test data of a corpus, a record for each caption."""
    folder = f"{options.root or 'data'}/{corpus.folder}"
    train, test = (
        f"shards:path={folder}/{split}-*.tar,size=32,captions=all" for split in ("train", "val")
    )
    return train, test


def poisoned_captions(options: TableOptions, corpus: CaptionedCorpus) -> list[PoisonedSet]:
    """A corpus poisoned by patch, blend and targeted; at scale `smoke`, scenes instead."""
    setup = get_setup(options)
    train, test = corpus_specs(options, corpus)
    objective, count, targets = corpus.objective, corpus.poisons, corpus.targets
    if options.scale == "smoke":
        train, test = setup.clean_data(0), setup.test
        objective, count, targets = setup.objective, 8, SCENE_CLASSES
    attacks = (
        Attack("patch", "backdoor", count, PATCH),
        Attack("blend", "backdoor", 2 * count, BLEND),
        Attack("targeted", "targeted", max(1, count // 8), victims=4),
    )
    poisoned = []
    for attack in attacks:
        encoders = []
        for seed in range(setup.each):
            data = attack.poison_data(train, test, seed, targets)
            encoders.append(Trial(Train(data, setup.network, objective), seed))
        probe = ("retrieval", "z_score")
        poisoned.append(PoisonedSet(attack.name, attack, tuple(encoders), test, probe))
    return poisoned


def detection_table(sets: Sequence[PoisonedSet], title: str, added: Sequence[str] = ()) -> Table:
    """Detector by attack: each alone, and all but the added ones together."""
    rows = []
    for poisoned in sets:
        scans = poisoned.scans()
        success = Cell.mean("ASR", poisoned.evaluate(), poisoned.attack.success_metric)
        together = (*mean_cells(scans, DETECTION_COLUMNS), success)
        rows.append(Row("all together", together, curve=poisoned.name))
        for detector in DETECTORS:
            columns = {name: f"{detector}.{key}" for name, key in DETECTION_COLUMNS.items()}
            rows.append(Row(detector, mean_cells(scans, columns), curve=poisoned.name))
        for detector in added:
            cells = mean_cells(poisoned.scans(detector), DETECTION_COLUMNS)
            rows.append(Row(detector, cells, curve=poisoned.name))
    note = (
        f"Poisoned sets of every attack: {len(sets[0].encoders)}, each scanned with the encoder "
        "trained on it. No detector knows the rate, the trigger or a label. AUROC 50 % is a "
        "coin's; below it a score points the other way. ASR says whether the attack took "
        "(targeted: on its victims); where it did not, there is no backdoor to transplant."
    )
    return Table(title=title, axis="detector", rows=tuple(rows), notes=(note,), grid="AUROC")
