"""The matrix: every attack against every detector, audit and repair, cell by cell. What its tables share.

Victims are small CLIPs trained on poisoned scenes, and SimCLR towers that BadEncoder was put into. Clean encoders have the
same architecture and training length as the attacked ones, and data and seeds of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bezoar.papers.badencoder2022 import named
from bezoar.papers.carlini2022 import CLASSES, FIXED
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import Cell, Row, Table, TableOptions, readings
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.inject import Inject
from bezoar.verbs.poison import Poison
from bezoar.verbs.scan import Scan
from bezoar.verbs.train import Train

TABLES = (
    "detection",
    "default_scan",
    "flickr8k",
    "aerial",
    "retraining",
    "audits",
    "repairs",
)  # in the order of the page
ENCODER = "BadEncoder"
SPACE = 3  # seeds that every attack but the first has for itself
TARGETS = ("truck", "airplane", "bird", "dog", "ship")  # BadEncoder's, in turn; classes of CIFAR-10


@dataclass(frozen=True)
class Attack:
    """One way to poison image-text data. trigger: with {place} and {seed} where an encoder has its own."""

    name: str
    poison: str
    trigger: str = ""

    def data(self, clean: str, test: str, seed: int, targets: Sequence[str] = CLASSES) -> Poison:
        """The poisoned data of one encoder. Targeted poisons draw their victims from the test set."""
        target = targets[seed % len(targets)]
        if not self.trigger:
            return Poison(
                clean, self.poison, target="" if targets is CLASSES else target, victims=test
            )
        trigger = self.trigger.format(place=FIXED[seed % len(FIXED)], seed=seed)
        return Poison(clean, self.poison, trigger, target)


PATCH = "patch:size=6,fill=blocks,cell=2,place={place},seed={seed}"
ATTACKS = (
    Attack("patch", "backdoor:count=200", PATCH),
    Attack("blend", "backdoor:count=300", "blend:alpha=0.3,pattern=noise,seed={seed}"),
    Attack("warp", "backdoor:count=300", "warp:k=32,strength=2.0,seed={seed}"),
    Attack("SIG", "backdoor:count=200", "sinusoid:delta=20,frequency=6"),
    Attack("targeted", "targeted:captions=16,victims=8"),
    Attack("clean-label", "clean_label:count=250", PATCH),
)


@dataclass(frozen=True)
class Setup:
    """A scale. records: of a CLIP's training set. clean: encoders without an attack; they set the thresholds.

    patched: attacked encoders of the first attack and of BadEncoder, that are audited; others: of every other attack. each:
    of every attack, that are scanned or repaired. others and each: SPACE at most.
    """

    records: int
    test: str
    network: str
    objective: str
    attacks: tuple[Attack, ...]
    images: str  # what SimCLR is trained on
    shadow: str
    labelled: str
    held_out: str
    tower: str
    simclr: str
    badencoder: str
    triggers: tuple[str, ...]  # BadEncoder's, in turn
    targets: tuple[str, ...]
    audits: tuple[str, ...]
    image_audits: tuple[str, ...]  # of encoders without a text tower
    repairs: tuple[str, ...]
    image_repairs: tuple[str, ...]
    fresh: str  # clean records that a repair is given
    fresh_images: str
    clean: int
    patched: int
    others: int
    each: int

    def data(self, seed: int) -> str:
        """A CLIP's clean training set."""
        return f"scenes:count={self.records},seed={seed}"

    def clip(self, seed: int) -> Trial:
        """A clean CLIP."""
        return Trial(Train(self.data(seed), self.network, self.objective), seed)

    def poisoned(self, attack: Attack, seed: int) -> Trial:
        """A CLIP trained on poisoned data."""
        return Trial(
            Train(attack.data(self.data(seed), self.test, seed), self.network, self.objective), seed
        )

    def simple(self, seed: int) -> Trial:
        """A clean SimCLR tower."""
        return Trial(Train(self.images, self.tower, self.simclr), seed)

    def injected(self, seed: int) -> Trial:
        """A SimCLR tower with BadEncoder's backdoor, its reference chosen by margin."""
        clean, target = self.simple(seed).verb, self.targets[seed % len(self.targets)]
        trigger = self.triggers[seed % len(self.triggers)]
        attack = self.badencoder
        return Trial(
            Inject(
                clean, self.shadow, (target,), (self.labelled,), attack, (trigger,), "confident"
            ),
            seed,
        )

    def towers(self, least: int = 0) -> tuple[list[Trial], list[Trial]]:
        """Clean SimCLR towers, and those with BadEncoder's backdoor, whose parents are among the clean ones first."""
        seeds = self.seeds(ENCODER)
        bad = range(seeds[0], seeds[0] + max(len(seeds), least))
        clean = list(dict.fromkeys([*bad, *range(self.clean)]))[: max(self.clean, least)]
        return [self.simple(k) for k in clean], [self.injected(k) for k in bad]

    def measured(self, encoder: Trial) -> Trial:
        """CA and ASR of an attacked encoder: zero-shot, or by a linear head."""
        if isinstance(encoder.verb, Inject):
            head = Evaluate(encoder.verb, self.held_out, ("linear",), train=self.labelled)
            return Trial(head, encoder.seed)
        return Trial(Evaluate(encoder.verb, self.test), encoder.seed)

    def seeds(self, attack: str) -> Sequence[int]:
        """The seeds of an attack's encoders; no two attacks share one, and none is a clean encoder's."""
        names = [a.name for a in self.attacks]
        first = 2 * self.clean
        if attack in (ENCODER, names[0]):
            return range(first, first + self.patched)
        start = first + self.patched + (names.index(attack) - 1) * SPACE
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
    targets=TARGETS,
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


def setup(given: TableOptions) -> Setup:
    """The settings of a scale."""
    if given.scale == "smoke":
        data, test = "scenes:count=256", "scenes:count=200,split=test"
        return replace(
            SMALL,
            records=256,
            test=test,
            network="clip_small:width=4,dim=16",
            objective="clip:epochs=1,batch=64",
            attacks=(
                Attack("patch", "backdoor:count=9", PATCH),
                Attack("targeted", "targeted:captions=4,victims=2"),
            ),
            images=data,
            shadow=data,
            labelled=data,
            held_out=test,
            tower="tower:width=4,dim=16",
            simclr="simclr:epochs=1,batch=64,hidden=16,dim=8",
            badencoder="badencoder:epochs=1,batch=64,lr=0.01",
            targets=CLASSES,
            audits=("decree:steps=3", "cleanse:steps=3"),
            image_audits=("decree:steps=3",),
            repairs=("finetune:objective=(cleanclip:epochs=1,batch=64),lrs=(1e-3)", "prune"),
            image_repairs=("distill:epochs=1",),
            fresh="scenes:count=300,seed=9000",
            fresh_images=data,
            clean=2,
            patched=2,
            others=2,
            each=2,
        )
    train = named(given.root, "cifar10", "train")
    small = replace(
        SMALL,
        images=named(given.root, "cifar10", "train", limit=20000),
        shadow=named(given.root, "cifar10", "train", limit=5000),
        fresh_images=named(given.root, "cifar10", "train", limit=4000),
        labelled=named(given.root, "cifar10", "train", limit=5000),
        held_out=named(given.root, "cifar10", "test", limit=2000),
    )
    if given.scale == "small":
        return small
    return replace(
        small,
        records=1_000_000,
        network="clip_small:width=64,dim=256",
        objective="clip:epochs=8,batch=1024",
        images=train,
        shadow=named(given.root, "cifar10", "train", limit=10000),
        tower="resnet:depth=18,stem=cifar",
        simclr="simclr:epochs=100",
        badencoder="badencoder:epochs=20",
        clean=40,
        patched=20,
        others=3,
        each=3,
    )


DETECTORS = (
    "transplant",
    "duplicates",
    "k_distance",
    "lid",
    "slof",
    "dao",
    "isolation_forest",
    "clip_score",
    "loss_trace",
    "safeclip",
    "spectral",
    "activation_clustering",
)
FOUND = {
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
class Point:
    """A poisoned set at a rate, trained on several times. probe: what measures success on its test data."""

    name: str
    encoders: tuple[Trial, ...]
    test: str
    probe: tuple[str, ...] = ("zero_shot", "z_score")

    @property
    def success(self) -> str:
        """The metric that says whether the attack took: of the trigger, or of the victims by their number of captions."""
        if not self.name.startswith("targeted"):
            return "attack_success"
        return (
            "targeted_success@"
            + self.encoders[0].verb.data.poison.partition("captions=")[2].partition(",")[0]
        )

    def scans(self) -> list[Trial]:
        """Every encoder's training data, scanned with it by every detector."""
        return [
            Trial(Scan(t.verb, detector=DETECTORS, remove=REMOVED), t.seed) for t in self.encoders
        ]

    def before(self) -> list[Trial]:
        """The encoders measured."""
        return [Trial(Evaluate(t.verb, self.test, self.probe), t.seed) for t in self.encoders]

    def after(self) -> list[Trial]:
        """The same trained again on what the scan keeps, and measured."""
        again = [
            replace(t.verb, keep=scan.verb)
            for t, scan in zip(self.encoders, self.scans(), strict=True)
        ]
        return [
            Trial(Evaluate(v, self.test, self.probe), t.seed)
            for v, t in zip(again, self.encoders, strict=True)
        ]


def scenes(given: TableOptions) -> list[Point]:
    """Poisoned scenes, a set an attack as often as the scale says."""
    s = setup(given)
    return rated(s, s.each)


def rated(s: Setup, each: int, times: Sequence[float] = (0.1, 5)) -> list[Point]:
    """Poisoned scenes: every attack, and the patch with so many times its poisons. each: sets of each."""
    patch, count = s.attacks[0], int(s.attacks[0].poison.partition("=")[2])
    found = []
    for n in dict.fromkeys(max(1, round(count * t)) for t in times):
        trials = tuple(
            s.poisoned(replace(patch, poison=f"backdoor:count={n}"), k)
            for k in s.seeds(patch.name)[:each]
        )
        found.append(Point(f"patch, {100 * n / s.records:.3g} %", trials, s.test))
    for a in s.attacks:
        plan = [s.poisoned(a, k) for k in s.seeds(a.name)[:each]]
        pairs = a.poison.partition("=")[2].partition(",")[0]
        n = int(pairs) * (1 if a.trigger else int(a.poison.rpartition("=")[2]))
        place = len(found) - 1 if a is patch else len(found)
        found.insert(place, Point(f"{a.name}, {100 * n / s.records:.3g} %", tuple(plan), s.test))
    return found


def captioned(
    given: TableOptions,
    name: str,
    targets: Sequence[str],
    train: str,
    test: str,
    recipe: str,
    n: int,
) -> list[Point]:
    """A captioned set in a folder, poisoned by patch, blend and targeted; scenes in its place at scale smoke. n: poisons."""
    s = setup(given)
    if given.scale == "smoke":
        train, test, recipe, n, targets = s.data(0), s.test, s.objective, 8, CLASSES
    else:
        train, test = (
            f"shards:path={given.root or 'data'}/{name}/{files},size=32,captions=all"
            for files in (train, test)
        )
    ways = (
        Attack("patch", f"backdoor:count={n}", PATCH),
        Attack("blend", f"backdoor:count={2 * n}", ATTACKS[1].trigger),
        Attack("targeted", f"targeted:captions={max(1, n // 8)},victims=4"),
    )
    found = []
    for a in ways:
        data = [(k, a.data(train, test, k, targets)) for k in range(s.each)]
        encoders = tuple(Trial(Train(d, s.network, recipe), k) for k, d in data)
        found.append(Point(a.name, encoders, test, ("retrieval", "z_score")))
    return found


def searched(points: Sequence[Point], title: str) -> Table:
    """Detector x attack: what each finds alone, and what they find together."""
    rows = []
    for point in points:
        scans, took = point.scans(), Cell("ASR", readings(point.before(), point.success))
        for name in ("all together", *DETECTORS):
            mark = "" if name == "all together" else f"{name}."
            cells = tuple(
                Cell(label, readings(scans, mark + metric)) for label, metric in FOUND.items()
            )
            rows.append(Row(name, cells if mark else (*cells, took), curve=point.name))
    note = (
        f"Poisoned sets of every attack: {len(points[0].encoders)}, each scanned with the encoder trained on it; no "
        "detector was told the rate, the trigger or a label. AUROC 50 % is a coin's, below it a score points the other way. "
        "ASR says whether the attack took (targeted: on its victims); where it did not, there is no backdoor to transplant."
    )
    return Table(title, "", "detector", tuple(rows), notes=(note,), grid="AUROC")
