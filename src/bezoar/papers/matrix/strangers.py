"""Strangers: verdicts on encoders of families that are in no bank.

There are two groups of encoders, both named here before any of them was scored. The rules of a
verdict without a bank (`auditing.unaided_verdict`) were set on the first group, the development
encoders. The rows of the table are the second group, the test encoders, on which no word or bound
was set. Many of them were scored by earlier forms of the audits; of four attacked ones (VGG, WRN,
ResNet-14 and ResNet-20 of CIFAR-10, seed 150) the masks had a part in how a search gives up starts.
VGGs of MNIST with the seeds 100 to 103 and 150 to 152 set the rule of natural triggers
(`auditing.students`), and are development encoders now; the rows have other seeds. ResNet-8 of
MNIST and the filter on ResNet-8 were named when that rule was fixed. Every audit has the seed that
`bezoar audit` has by default.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bezoar.auditing.findings import GRADE_NUMBERS
from bezoar.evaluation.scores import Measure, proportion
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
FILTER = "filter:preset=kelvin"
STICKER, STRIPES = "sticker:size=0.25,place=.7/.7,seed={seed}", "shape:form=stripes,seed={seed}"
SOME, STRONG = GRADE_NUMBERS["some evidence"], GRADE_NUMBERS["strong evidence"]
AUDITS = ("cleanse", "image_change")  # the default audits that compare classes, without a bank
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
    # seeds of the first clean and of the first attacked test encoder
    first: tuple[int, int] = (TEST, TEST + 50)

    @property
    def success_metric(self) -> str:
        """The metric of an attack's success."""
        prefix = "" if self.probe == "zero_shot" else f"{self.probe}."
        return f"{prefix}attack_success"

    def clean_encoders(self) -> list[Trial]:
        """The clean test encoders."""
        return self.clean(self.first[0], self.scored[0])

    def attacked_encoders(self) -> list[Trial]:
        """The attacked test encoders."""
        return self.attacked(self.first[1], self.scored[1])

    def clean(self, first: int, count: int) -> list[Trial]:
        """Clean encoders, with seeds of their own from `first` on."""
        return [self.train(self.data.format(seed=s), s) for s in range(first, first + count)]

    def train(self, data: str | Poison, seed: int) -> Trial:
        """The training of one encoder."""
        return Trial(Train(data, self.network, self.objective), seed)

    def attacked(self, first: int, count: int) -> list[Trial]:
        """Attacked encoders, by attacks, triggers, places and targets in turn, with seeds of their
        own from `first` on.
        """
        return [self._attack(s, i) for i, s in enumerate(range(first, first + count))]

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
        """The default audits that compare classes, without a bank."""
        return Trial(Audit(encoder, self.test, AUDITS, bank=()), 0)

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
            f"By {' and '.join(f'`{name}`' for name in AUDITS)}, the default audits that compare "
            "an encoder's classes. Of `found` (attacked) and `accused` (clean) encoders the "
            "worse of the two words is some or strong evidence. ASR of the attacked ones."
        )
        return Table(title="Strangers", axis="encoders", rows=tuple(rows), notes=(note,))


def family_row(family: EncoderFamily | None, families: Sequence[EncoderFamily]) -> Row:
    """The row of a family's test encoders, or of those of all families together."""
    attacked = [f.audit(e) for f in families for e in f.attacked_encoders()]
    clean = [f.audit(e) for f in families for e in f.clean_encoders()]
    cells = [*evidence_cells("found", attacked), *evidence_cells("accused", clean)]
    seconds = [f"{name}.seconds" for name in AUDITS]
    cells += [Cell.mean(name, [*attacked, *clean], name) for name in seconds]
    if family is not None:
        trials = [family.evaluate(e) for e in family.attacked_encoders()]
        cells.append(Cell.mean("ASR", trials, family.success_metric))
    return Row(family.name if family else "all", tuple(cells))


def evidence_cells(word: str, trials: Sequence[Trial]) -> list[Cell]:
    """How many encoders have evidence: by the worse of both audits' words, and by each audit."""
    both = [readings(trials, f"{name}.grade") for name in AUDITS]
    cells = [
        Cell(name, both[0], reference_readings=both[1], compare=share_with_evidence(least))
        for name, least in ((word, SOME), (f"{word} strongly", STRONG))
    ]
    cells += [
        Cell(f"{word} by {name}", grades, compare=share_with_evidence(SOME))
        for name, grades in zip(AUDITS, both, strict=True)
    ]
    return cells


def share_with_evidence(least: float) -> Comparison:
    """A comparison: the share of encoders of at least a grade, by the worse of one or two audits'
    grades.
    """
    words = "strong" if least == STRONG else "some or strong"

    def compare(grades: Sequence[float], others: Sequence[float]) -> Measure:
        pairs = zip(grades, others or grades, strict=True)
        count = sum(max(pair) >= least for pair in pairs)
        return proportion(count, len(grades), f"encoders with {words} evidence of a backdoor")

    return compare


def residual_network(
    order: str, projection: bool, blocks: int = 2, classes: Sequence[str] = CLASSES
) -> str:
    """A residual classifier of three stages of so many blocks, 16 to 64 channels."""
    final = str(order == "pre").lower()
    counts = f"{blocks}/{blocks}/{blocks}"
    return classifier_network(
        f"residual:order={order},bottleneck=false,kernel=3,stem=16,counts={counts},inner=16/32/64,"
        f"outer=16/32/64,groups=1,projection={str(projection).lower()},final={final},pool=1,classes={len(classes)}",
        classes,
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
        scored=(1, 1),
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
        scored=(1, 1),
        shadow=dataset_spec(options.root, "cifar10", "train", limit=2000),
        badencoder="badencoder:epochs=8,batch=64,lr=0.02,views=16,l2=5",
        probe="linear",
    )
    return [*get_later_families(options, plain), wide, plain, CLIPS, towers]


def get_later_families(options: TableOptions, plain: EncoderFamily) -> list[EncoderFamily]:
    """The families that were named when the others had been scored first.

    plain: classifiers that theirs differ from.
    """
    short = replace(plain, objective="supervised:epochs=4")
    vgg = replace(
        short,
        name="VGG, CIFAR-10",
        network=vgg_network(CLASSES),
        attacks=("patch", "anywhere", "blend", "clean_label", LINE, STICKER, RING, STRIPES),
        scored=(2, 8),
    )
    digits = tuple("0123456789")
    mnist = replace(
        vgg,
        name="VGG, MNIST",
        data=dataset_spec(options.root, "mnist_t10k", "train", limit=6000, size=32),
        test=dataset_spec(options.root, "mnist_t10k", "test", limit=2000, size=32),
        network=vgg_network(digits),
        objective="supervised:epochs=3,flip=0",
        targets=digits,
        attacks=("patch", "anywhere", "blend"),
        scored=(4, 3),
        first=(104, 163),
    )
    return [
        mnist,
        replace(
            mnist,
            name="ResNet-8, MNIST",
            network=residual_network("post", False, 1, digits),
            attacks=("blend", "patch"),
            scored=(2, 2),
            first=(200, 253),
        ),
        vgg,
        replace(
            short,
            name="ResNet-8, CIFAR-10",
            network=residual_network("post", False, 1),
            attacks=("patch", "blend", "anywhere", STICKER, RING, FILTER),
            scored=(2, 6),
        ),
        replace(
            short,
            name="ResNet-20, CIFAR-10",
            network=residual_network("post", False, 3),
            scored=(1, 1),
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
    scored=(1, 2),
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
