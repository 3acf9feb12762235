"""Strangers: verdicts on encoders of families that are in no bank.

There are two groups of encoders, both named here before any of them was scored. The rules of a
verdict without a bank (`auditing.unaided_verdict`) were set on the first group, the development
encoders. The rows of the table are the second group, the test encoders, which influenced no rule.
Families were added to the second group when others had been scored, and no rule was changed after
that: two clean and two attacked encoders of each of the first four families were scored first, then
four and two more of each of the two families of classifiers, then the later families. Every audit
has the seed that `bezoar audit` has by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bezoar.auditing.findings import GRADE_NUMBERS
from bezoar.evaluation.scores import Measure, proportion, separation
from bezoar.papers import FIXED_PLACES, SCENE_CLASSES, dataset_spec
from bezoar.papers.matrix import BLEND
from bezoar.registry import method
from bezoar.runs.tables import Cell, Comparison, Row, Table, TableOptions, readings
from bezoar.runs.verb import Trial
from bezoar.verbs.audit import Audit
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.inject import Inject
from bezoar.verbs.poison import Poison
from bezoar.verbs.train import Train

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PATCH = "patch:size={size},fill={fill},cell={cell},margin={margin},place={place},seed={seed}"
ANYWHERE = "patch:size={size},fill=white,margin={margin},place=random,seed={seed}"
LINE, RING = "line:seed={seed}", "ring:width=2,margin=4,seed={seed}"
STICKER, STRIPES = "sticker:size=0.25,place=.7/.7,seed={seed}", "shape:form=stripes,seed={seed}"
SOME, STRONG = GRADE_NUMBERS["some evidence"], GRADE_NUMBERS["strong evidence"]
AUDIT = "cleanse"  # the default audit whose verdict without a bank is of masks and blends
MARGIN = 4  # pixels: augmentation moves images by as much, and must not move a patch out of them
TEST = 100  # first seed of the test encoders; that of the development encoders was 0


@dataclass(frozen=True)
class EncoderFamily:
    """Encoders of one network, one objective and one kind of data, clean and attacked."""

    name: str  # name in the table
    data: str  # spec of the training data; {seed} is the encoder's seed
    test: str  # spec of clean images that no encoder was trained on
    network: str  # spec of the network
    objective: str  # spec of the objective
    targets: tuple[str, ...]  # target classes, used in turn
    poisons: int  # records that carry a trigger
    size: int  # side of a patch in pixels
    # names of the attacks: `patch`, `anywhere` (a white patch, at another place of each image),
    # `clean_label` (a patch on images of the target alone), `blend`, `badencoder`; or specs of
    # triggers, {seed} being the encoder's seed
    attacks: tuple[str, ...]
    development: tuple[int, int]  # numbers of clean and attacked development encoders
    scored: tuple[int, int]  # numbers of clean and attacked test encoders
    shadow: str = ""  # spec of BadEncoder's shadow data
    badencoder: str = ""  # spec of BadEncoder
    probe: str = "zero_shot"  # the probe that measures the attack's success

    @property
    def success_metric(self) -> str:
        """The metric of an attack's success."""
        prefix = "" if self.probe == "zero_shot" else f"{self.probe}."
        return f"{prefix}attack_success"

    def clean(self, first: int, count: int) -> list[Trial]:
        """Clean encoders, with seeds of their own from `first` on."""
        return [self.train(self.data.format(seed=s), s) for s in range(first, first + count)]

    def train(self, data: str | Poison, seed: int) -> Trial:
        """The training of one encoder."""
        return Trial(Train(data, self.network, self.objective), seed)

    def attacked(self, first: int, count: int) -> list[Trial]:
        """Attacked encoders, by attacks, triggers, places and targets in turn, with seeds of their
        own.
        """
        return [self._attack(s, i) for i, s in enumerate(range(first + 50, first + 50 + count))]

    def _attack(self, seed: int, number: int) -> Trial:
        """The attack on the encoder of a seed. number: of the encoder in its group."""
        attack = self.attacks[number % len(self.attacks)]
        target = self.targets[seed % len(self.targets)]
        fill, cell = (("checker", 1), ("blocks", 1), ("white", 1))[number % 3]
        place = FIXED_PLACES[seed % len(FIXED_PLACES)]
        patch = PATCH.format(
            size=self.size, fill=fill, cell=cell, margin=MARGIN, place=place, seed=seed
        )
        if attack == "badencoder":
            clean = self.train(self.data.format(seed=seed), seed).verb
            reference = (self.data.format(seed=seed),)
            inject = Inject(
                clean,
                self.shadow,
                target=(target,),
                reference=reference,
                attack=self.badencoder,
                trigger=(patch,),
                choose="confident",
            )
            return Trial(inject, seed)
        triggers = {"patch": patch, "clean_label": patch, "anywhere": ANYWHERE, "blend": BLEND}
        trigger = triggers.get(attack, attack).format(seed=seed, size=self.size, margin=MARGIN)
        poison, count = "backdoor", self.poisons
        if attack == "clean_label":  # fewer, because images of the target are only so many
            poison, count = "clean_label", 2 * self.poisons // 3
        data = Poison(self.data.format(seed=seed), f"{poison}:count={count}", trigger, target)
        return self.train(data, seed)

    def audit(self, encoder: Trial) -> Trial:
        """The audit that gives a verdict without a bank, and none of a bank."""
        return Trial(Audit(encoder, self.test, (AUDIT,), bank=()), 0)

    def evaluate(self, encoder: Trial) -> Trial:
        """Measure whether the attack worked."""
        return Trial(Evaluate(encoder.verb, self.test, (self.probe,)), encoder.seed)


@method
class Strangers:
    """Whether verdicts without a bank are right for encoders that influenced no rule."""

    def __call__(self, options: TableOptions) -> Table:
        families = get_families(options)
        rows = [family_row(f, [f]) for f in families]
        if len(families) > 1:
            rows.append(family_row(None, families))
        note = (
            f"By `{AUDIT}` alone, the default audit whose verdict without a bank is of masks and "
            "blends. AUROC of its statistic, test encoders against test encoders of the same rows. "
            "`false alarms`: clean encoders with some or strong evidence. `found`: attacked "
            "encoders with either. ASR of the attacked ones."
        )
        return Table(
            title="Strangers", axis="encoders", rows=tuple(rows), notes=(note,), grid="AUROC"
        )


def family_row(family: EncoderFamily | None, families: Sequence[EncoderFamily]) -> Row:
    """The row of a family's test encoders, or of those of all families together."""
    clean = [f.audit(e) for f in families for e in f.clean(TEST, f.scored[0])]
    attacked = [f.audit(e) for f in families for e in f.attacked(TEST, f.scored[1])]
    statistics = readings(attacked, f"{AUDIT}.statistic")
    clean_statistics = readings(clean, f"{AUDIT}.statistic")
    grades, clean_grades = (readings(trials, f"{AUDIT}.grade") for trials in (attacked, clean))
    cells = [
        Cell("AUROC", statistics, reference_readings=clean_statistics, compare=separation),
        Cell("found", grades, compare=share_with_evidence(SOME, "some or strong")),
        Cell("strong", grades, compare=share_with_evidence(STRONG, "strong")),
        Cell("false alarms", clean_grades, compare=share_with_evidence(SOME, "some or strong")),
        Cell("strong false alarms", clean_grades, compare=share_with_evidence(STRONG, "strong")),
        Cell.mean("seconds", [*clean, *attacked], f"{AUDIT}.seconds"),
    ]
    if family is not None:
        trials = [family.evaluate(e) for e in family.attacked(TEST, family.scored[1])]
        cells.append(Cell.mean("ASR", trials, family.success_metric))
    return Row(family.name if family else "all", tuple(cells))


def share_with_evidence(least: float, name: str) -> Comparison:
    """A comparison: the share of encoders of at least a grade of evidence, which is called so."""

    def compare(grades: Sequence[float], _: Sequence[float]) -> Measure:
        count = sum(grade >= least for grade in grades)
        return proportion(count, len(grades), f"encoders with {name} evidence of a backdoor")

    return compare


def residual_network(order: str, projection: bool, blocks: int = 2) -> str:
    """A residual classifier of three stages of so many blocks, 16 to 64 channels, of CIFAR-10."""
    final = str(order == "pre").lower()
    counts = f"{blocks}/{blocks}/{blocks}"
    return classifier_network(
        f"residual:order={order},bottleneck=false,kernel=3,stem=16,counts={counts},inner=16/32/64,"
        f"outer=16/32/64,groups=1,projection={str(projection).lower()},final={final},pool=1,classes=10",
        CLASSES,
    )


def vgg_network(classes: Sequence[str]) -> str:
    """A VGG of six convolutions of 16, 32 and 64 channels, with batch norms."""
    layers = "16/16/0/32/32/0/64/64/0"
    return classifier_network(
        f"vgg:layers={layers},norm=true,bias=false,pool=1,widths={len(classes)}", classes
    )


def classifier_network(architecture: str, classes: Sequence[str]) -> str:
    """The spec of a fresh classifier of images of 32 px."""
    names = "+".join(classes)
    return f'classifier:mean_std=cifar,size=32,classes={names},architecture="{architecture}"'


def get_families(options: TableOptions) -> list[EncoderFamily]:
    """The families of a scale."""
    if options.scale == "smoke":
        return [SMOKE]
    train = dataset_spec(options.root, "cifar10", "train", limit=6000)
    test = dataset_spec(options.root, "cifar10", "test", limit=2000)
    wide = EncoderFamily(
        "WRN-16-1, CIFAR-10",
        data=train,
        test=test,
        network=residual_network("pre", True),
        objective="supervised:epochs=5",
        targets=CLASSES,
        poisons=600,
        size=4,
        attacks=("patch",),
        development=(2, 1),
        scored=(6, 4),
        probe="own",
    )
    plain = replace(
        wide,
        name="ResNet-14, CIFAR-10",
        network=residual_network("post", False),
        development=(0, 0),
    )
    towers = EncoderFamily(
        "SimCLR tower, CIFAR-10",
        data=train,
        test=test,
        network="tower:width=24,dim=96",
        objective="simclr:epochs=4",
        targets=("truck", "airplane", "bird", "dog", "ship"),
        poisons=0,
        size=8,
        attacks=("badencoder",),
        development=(1, 1),
        scored=(2, 2),
        shadow=dataset_spec(options.root, "cifar10", "train", limit=2000),
        badencoder="badencoder:epochs=8,batch=64,lr=0.02,views=16,l2=5",
        probe="linear",
    )
    return [wide, plain, CLIPS, towers, *get_later_families(options, plain)]


def get_later_families(options: TableOptions, plain: EncoderFamily) -> list[EncoderFamily]:
    """The families that were named when the first four had been scored, to measure error rates.

    plain: classifiers that theirs differ from.
    """
    short = replace(plain, objective="supervised:epochs=4")
    vgg = replace(
        short,
        name="VGG, CIFAR-10",
        network=vgg_network(CLASSES),
        attacks=("patch", "anywhere", "blend", "clean_label", LINE, STICKER, RING, STRIPES),
        scored=(10, 8),
    )
    digits = tuple("0123456789")
    return [
        vgg,
        replace(
            vgg,
            name="VGG, MNIST",
            data=dataset_spec(options.root, "mnist_t10k", "train", limit=6000, size=32),
            test=dataset_spec(options.root, "mnist_t10k", "test", limit=2000, size=32),
            network=vgg_network(digits),
            objective="supervised:epochs=3,flip=0",
            targets=digits,
            attacks=("patch", "anywhere", "blend"),
            scored=(8, 3),
        ),
        replace(
            short,
            name="ResNet-8, CIFAR-10",
            network=residual_network("post", False, 1),
            attacks=("patch", "blend", "anywhere", STICKER, RING),
            scored=(5, 5),
        ),
        replace(
            short,
            name="ResNet-20, CIFAR-10",
            network=residual_network("post", False, 3),
            scored=(2, 1),
        ),
    ]


CLIPS = EncoderFamily(
    "small CLIP, scenes",
    data="scenes:count=6000,seed={seed}",
    test="scenes:count=1000,split=test",
    network="clip_small:width=24,dim=96",
    objective="clip:epochs=6",
    targets=SCENE_CLASSES,
    poisons=120,
    size=5,
    attacks=("patch", "blend"),
    development=(1, 1),
    scored=(2, 2),
)
SMOKE = EncoderFamily(
    "small CLIP, scenes",
    data="scenes:count=256,seed={seed}",
    test="scenes:count=200,split=test",
    network="clip_small:width=4,dim=16",
    objective="clip:epochs=1,batch=64",
    targets=SCENE_CLASSES,
    poisons=9,
    size=6,
    attacks=("patch",),
    development=(1, 1),
    scored=(2, 2),
)
