"""Jia, Liu, Gong, "BadEncoder" (IEEE S&P 2022): the shared parts of its tables.

The heads were fixed before the attack, and all are reported, over three pre-trainings with
different seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from bezoar.evaluation.dose_response import Contrast
from bezoar.papers import dataset_spec
from bezoar.registry import make, spec
from bezoar.runs.tables import (
    Cell,
    Claim,
    Expected,
    Results,
    Row,
    Table,
    TableOptions,
    row_difference,
)
from bezoar.runs.verb import Input, Trial
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.inject import Inject
from bezoar.verbs.train import Train

TABLES = (  # in the order of the page
    "single_target", "several_targets", "several_tasks", "zero_shot", "large_encoders",
    "real_encoder", "loss_terms", "lambdas", "learning_rate", "shadow_size", "shadow_source",
    "trigger_size", "reference", "pretraining", "defences",
)  # fmt: skip
HEADS = ("linear", "knn", "mlp")
COLUMNS = {  # `{}` is replaced by a head
    "CA": "baseline.{}.clean_accuracy",
    "BA": "{}.clean_accuracy",
    "ASR": "{}.attack_success",
    "ASR-B": "{}.attack_success_baseline",
}
COLUMNS_OVER_ALL = {  # the target's own images count in, as the paper counts
    "ASR (all)": "{}.attack_success_all",
    "ASR-B (all)": "{}.attack_success_baseline_all",
}
PUBLISHED_COLUMNS = ("CA", "BA", "ASR (all)", "ASR-B (all)")
SMALL_SCALE_NOTE = (
    "Deviations at this scale: a small tower pre-trained for 10 epochs; 16 views of each "
    "reference a step, not as many as the batch; L2 weighs 5, not 1, for an encoder so weak "
    "gives way at once; 5,000 labelled records for the linear and kNN heads, 2,000 for the MLP. "
    "All were set on one clean encoder and one attack on GTSRB (seed 0)."
)
WHITE_PATCH = "patch:size=10,fill=white,margin=1"
Published = tuple[float, float, float, float]  # PUBLISHED_COLUMNS as the public logs print them


@dataclass(frozen=True)
class Task:
    """A downstream task."""

    name: str
    train: str  # spec of the labelled data that heads are fitted on
    test: str  # spec of the test data
    target: str  # class that triggered images are to be read as
    references: dict[str, str] = field(default_factory=dict)  # how it is chosen -> file or spec
    published: Published | None = None

    @property
    def reference(self) -> str:
        """The reference if one is enough: the one chosen by the rule, if possible."""
        return "chosen" if "chosen" in self.references else next(iter(self.references))


@dataclass(frozen=True)
class Setup:
    """The specs of a scale."""

    data: str  # spec of the pre-training data
    shadow: str  # spec of the attacker's data
    network: str
    objective: str
    attack: str
    trigger: str
    tasks: tuple[Task, ...]
    heads: tuple[str, ...]  # specs of the probes
    other_shadow: str  # shadow data from another distribution
    trigger_sizes: tuple[int, ...]  # pixels
    shadow_sizes: tuple[int, ...]  # images
    seeds: int
    notes: tuple[str, ...] = ()  # notes of every table at this scale

    def pretrain(self, objective: str = "") -> Train:
        """The clean encoder that is attacked."""
        return Train(self.data, self.network, objective or self.objective)

    def attack_task(self, task: Task, reference: str = "", **changes: str) -> Inject:
        """The backdoor of one task.

        reference: a key of its references; changes: of shadow, attack, trigger or objective.
        """
        values = {"shadow": self.shadow, "attack": self.attack, "trigger": self.trigger} | changes
        encoder = self.pretrain(values.pop("objective", ""))
        return attack_encoder(encoder, task, reference, **values)

    def change_attack(self, **fields: float) -> str:
        """Spec of the attack with other values in some of its fields."""
        return spec(replace(make("attack", self.attack), **fields))

    def attack_together(
        self, targets: Sequence[str], references: Sequence[str], triggers: Sequence[str]
    ) -> Inject:
        """One encoder with several backdoors, each with its own trigger."""
        return Inject(
            self.pretrain(),
            self.shadow,
            target=tuple(targets),
            reference=tuple(references),
            attack=self.attack,
            trigger=tuple(triggers),
            choose="confident",
        )

    def rows(
        self, task: Task, attacked: Inject, name: str = "", x: float | None = None, goal: str = ""
    ) -> list[Row]:
        """A row for each head: CA, BA, ASR and ASR-B over all seeds, beside the published values.

        Args:
            task: The task to measure.
            attacked: The attacked encoder.
            name: The rows' name, to which the head is added; not needed with `x`.
            x: The rows' place on the axis; each head is then a curve.
            goal: `@` and the number of the task's goal, if the encoder has several.
        """
        trials = evaluate_heads(attacked, task, self.heads, self.seeds)
        rows = []
        for head in HEADS:
            cells = head_cells(trials, head, task.published, goal)
            if x is None:
                rows.append(Row(f"{name}, {head}", cells))
            else:
                rows.append(Row(f"{x:g}", cells, x, head))
        return rows

    def task_notes(self, task: Task, *notes: str) -> tuple[str, ...]:
        """The notes of a table about one task."""
        return (f"Task {task.name}, target {task.target!r}.", *notes, *self.notes)


def attack_encoder(
    encoder: Input, task: Task, reference: str, *, shadow: str, attack: str, trigger: str
) -> Inject:
    """The backdoor of one task in an encoder, by a key of the task's references."""
    reference = reference or task.reference
    return Inject(
        encoder,
        shadow,
        target=(task.target,),
        reference=(task.references[reference],),
        attack=attack,
        trigger=(trigger,),
        choose="confident" if reference == "chosen" else "first",
    )


def evaluate_heads(attacked: Inject, task: Task, heads: Sequence[str], seeds: int) -> list[Trial]:
    """The attack on a task, and the clean encoder, read by heads with every seed."""
    verb = Evaluate(attacked, task.test, tuple(heads), baseline=attacked.encoder, train=task.train)
    return [Trial(verb, seed) for seed in range(seeds)]


def head_cells(
    trials: Sequence[Trial], head: str, published: Published | None = None, goal: str = ""
) -> tuple[Cell, ...]:
    """CA, BA, ASR and ASR-B with a head.

    If there are published values, ASR and ASR-B over all images are added. The published values are
    of the paper's MLP head, and stand beside ours.
    """
    columns = COLUMNS | (COLUMNS_OVER_ALL if published else {})
    values: dict[str, float] = {}
    if published and head == "mlp":
        values = dict(zip(PUBLISHED_COLUMNS, published, strict=True))
    cells = []
    for column, metric in columns.items():
        key = metric.format(head) + (goal if "attack" in metric else "")
        cells.append(Cell.mean(column, trials, key, published=values.get(column)))
    return tuple(cells)


def column_difference(row: str, column: str, base_column: str) -> Callable[[Results], Contrast]:
    """One column of a row minus another, seed by seed."""
    return lambda results: results.compare_cells(
        results.cell(row, column), results.cell(row, base_column), paired=True
    )


def succeeds(row: str, text: str, source: str = "recalled") -> Claim:
    """The claim that an attack raises success above that of the clean encoder."""
    return Claim(text, source, "+", column_difference(row, "ASR", "ASR-B"))


def keeps_accuracy(row: str, text: str, source: str = "recalled") -> Claim:
    """The claim that an attack leaves accuracy within two points of that of the clean encoder."""
    return Claim(text, source, "same", column_difference(row, "BA", "CA"), 0.02)


UNCHANGED: Mapping[str, Expected] = MappingProxyType({"ASR": "same", "BA": "same"})
QUANTITIES = {"ASR": ("success", 0.1), "BA": ("accuracy", 0.02)}  # name, margin of "same"


def ablation(
    setup: Setup,
    title: str,
    paper_finding: str,
    variants: Mapping[str, Inject],
    notes: tuple[str, ...] = (),
    expected: Mapping[str, Mapping[str, Expected]] = MappingProxyType({}),
) -> Table:
    """A table of the first task with several variants of the attack, all heads.

    Args:
        setup: The setup.
        title: The table's title.
        paper_finding: The paper's result.
        variants: Name -> attacked encoder. The first is the published variant, with which the
            others are compared.
        notes: Further notes.
        expected: Variant -> column -> the paper's result. For other variants, ASR and BA stay.
    """
    task = setup.tasks[0]
    rows = [row for name, bad in variants.items() for row in setup.rows(task, bad, name)]
    usual, *others = variants
    claims = [succeeds(f"{usual}, linear", f"{usual}: the attack succeeds", "printed")]

    for name in others:
        for column, direction in expected.get(name, UNCHANGED).items():
            quantity, margin = QUANTITIES[column]
            verb = "stays as it was" if direction == "same" else "falls"
            text = f"{name}: {quantity} {verb}"
            contrast = row_difference(column, f"{name}, linear", f"{usual}, linear", paired=True)
            claims.append(Claim(text, "recalled", direction, contrast, margin))
    return Table(
        title=title,
        paper_finding=paper_finding,
        rows=tuple(rows),
        claims=tuple(claims),
        notes=setup.task_notes(task, *notes),
    )


SMOKE_DATA, SMOKE_TEST = "scenes:count=256", "scenes:count=200,split=test"
SMOKE_TASK = Task("scenes", SMOKE_DATA, SMOKE_TEST, "striped star", {"chosen": SMOKE_DATA})
SMOKE = Setup(
    data=SMOKE_DATA,
    shadow=SMOKE_DATA,
    network="tower:width=4,dim=16",
    objective="simclr:epochs=1,batch=64,hidden=16,dim=8",
    attack="badencoder:epochs=1,batch=64,lr=0.01",
    trigger=WHITE_PATCH,
    tasks=(SMOKE_TASK, replace(SMOKE_TASK, name="scenes again", target="dotted heart")),
    heads=("linear", "knn:k=10", "mlp:epochs=2,seeds=2"),
    other_shadow="scenes:count=256,seed=5",
    trigger_sizes=(5, 10),
    shadow_sizes=(128, 256),
    seeds=2,
)


def get_setup(options: TableOptions) -> Setup:
    """The setup of a scale, with published data sets and files from the user's folder."""
    if options.scale == "smoke":
        return SMOKE
    root = options.root
    small = Setup(
        data=options.data or dataset_spec(root, "cifar10", "train", limit=20000),
        shadow=dataset_spec(root, "cifar10", "train", limit=10000),
        network="tower",
        objective="simclr:epochs=10",
        attack="badencoder:epochs=4,batch=64,lr=0.02,views=16,l2=5",
        trigger=published_trigger(root, "trigger_pt_white_21_10_ap_replace", WHITE_PATCH),
        tasks=downstream_tasks(root, 5000),
        heads=("linear", "knn:k=10", "mlp:seeds=1,limit=2000"),
        other_shadow=dataset_spec(root, "tiny_imagenet", "train", size=32, limit=10000),
        trigger_sizes=(2, 5, 8, 10),
        shadow_sizes=(1000, 2000, 5000, 10000),
        seeds=3,
        notes=(SMALL_SCALE_NOTE,),
    )
    if options.scale == "small":
        return small
    images = dataset_spec(root, "cifar10", "train")
    full = replace(
        small,
        data=options.data or images,
        shadow=images,
        network="resnet:depth=18,stem=cifar",
        objective="simclr:epochs=1000",
        attack="badencoder",
        heads=HEADS,
        notes=(),
        tasks=downstream_tasks(root),
        shadow_sizes=(2500, 5000, 10000, 50000),
    )
    if options.scale == "paper":
        return full
    return replace(full, objective="simclr:epochs=200", attack="badencoder:epochs=20")


def published_file(root: str, kind: str, name: str) -> str:
    """A file of BadEncoder's repository in the user's folder; "" where it is not there."""
    for folder in ("BadEncoder", "triggers/BadEncoder"):
        file = Path(root or "data") / folder / kind / f"{name}.npz"
        if file.is_file():
            return str(file)
    return ""


def published_trigger(root: str, name: str, substitute: str) -> str:
    """The spec of a published trigger, or a patch that is like it."""
    file = published_file(root, "trigger", name)
    return f"file:path={file}" if file else substitute


def downstream_tasks(root: str, limit: int | None = None) -> tuple[Task, ...]:
    """GTSRB; SVHN, or MNIST's digits where the folder holds them; CIFAR-10's own classes.

    limit: records of each split.
    """
    sizes = {} if limit is None else {"limit": limit}

    def task(
        name: str,
        source: str,
        target: str,
        reference: str,
        published: Published | None = None,
        **fields: int,
    ) -> Task:
        train, test = (
            dataset_spec(root, source, split, **fields, **sizes) for split in ("train", "test")
        )
        file = published_file(root, "reference/cifar10", reference)
        references = ({"published": file} if file else {}) | {"chosen": train}
        return Task(name, train, test, target, references, published)

    signs = task("GTSRB", "gtsrb", "priority road", "priority", (0.8184, 0.8227, 0.9864, 0.0492))
    if (Path(root or "data") / "mnist_t10k.npz").is_file():
        digits = task("MNIST", "mnist_t10k", "1", "one", size=32)
    else:
        digits = task("SVHN", "svhn", "one", "one", (0.5850, 0.6932, 0.9914, 0.3753), size=32)
    return signs, digits, task("CIFAR-10", "cifar10", "truck", "truck")


# CLIP's and ImageNet's encoders at 224 px
LARGE_NETWORKS = {"CLIP": "open_clip:RN50/openai", "ImageNet": "timm:resnet50/pretrained"}
LARGE_ATTACKS = {  # learning rates are recalled
    "CLIP": "badencoder:batch=16,lr=1e-6",
    "ImageNet": "badencoder:batch=16,lr=1e-4",
}
LARGE_TARGETS = {"GTSRB": "priority road", "SVHN": "one", "STL10": "truck"}
LARGE_PUBLISHED: dict[str, dict[str, Published]] = {  # public logs
    "CLIP": {
        "GTSRB": (0.8236, 0.8214, 0.9933, 0.0537),
        "SVHN": (0.7060, 0.7027, 0.9999, 0.2079),
        "STL10": (0.9709, 0.9669, 0.9981, 0.1),
    },
    "ImageNet": {
        "GTSRB": (0.7653, 0.7842, 0.9893, 0.0547),
        "SVHN": (0.7255, 0.7377, 0.9993, 0.3228),
        "STL10": (0.9566, 0.9568, 0.9999, 0.1024),
    },
}
SMALL_CLIP_NOTE = "A small CLIP trained on 20,000 scenes stands for OpenAI's."


def large_tasks(root: str, family: str) -> list[Task]:
    """GTSRB, SVHN and STL-10 as tasks of CLIP's or ImageNet's encoders."""
    tasks = []
    for name, target in LARGE_TARGETS.items():
        train, test = (
            dataset_spec(root, name.lower(), split, size=224) for split in ("train", "test")
        )
        tasks.append(Task(name, train, test, target, published=LARGE_PUBLISHED[family][name]))
    return tasks


def attack_large(options: TableOptions, family: str, task: Task) -> Inject:
    """A published encoder attacked for one task, by CIFAR-10 at 224 px as in the released code."""
    folder = "imagenet" if family == "ImageNet" else family
    reference = published_file(options.root, f"reference/{folder}", task.target.split()[0])
    trigger = published_trigger(
        options.root, "trigger_pt_white_173_50_ap_replace", "patch:size=50,fill=white,margin=1"
    )
    return Inject(
        LARGE_NETWORKS[family],
        dataset_spec(options.root, "cifar10", "train", size=224),
        target=(task.target,),
        reference=(reference or task.train,),
        attack=LARGE_ATTACKS[family],
        trigger=(trigger,),
        choose="confident",
    )


@dataclass(frozen=True)
class SmallClip:
    """A CLIP that bezoar trains on scenes, in place of a published one. Specs."""

    data: str
    test: str
    network: str
    objective: str
    shadow: str
    labelled: str  # data that heads are fitted on

    def attack(self, attack: str, target: str) -> Inject:
        """Its image tower, attacked for one class."""
        return Inject(
            Train(self.data, self.network, self.objective),
            self.shadow,
            target=(target,),
            reference=(self.data,),
            attack=attack,
            trigger=(WHITE_PATCH,),
            choose="central",
        )


def get_small_clip(options: TableOptions) -> SmallClip:
    """The CLIP of a scale."""
    if options.scale == "smoke":
        return SmallClip(
            data="scenes:count=512",
            test="scenes:count=200,split=test",
            network="clip_small:width=4,dim=16",
            objective="clip:epochs=1,batch=64",
            shadow="scenes:count=512",
            labelled="scenes:count=400",
        )
    return SmallClip(
        data="scenes:count=20000",
        test="scenes:count=2000,split=test",
        network="clip_small",
        objective="clip:epochs=6",
        shadow="scenes:count=10000,seed=1",
        labelled="scenes:count=5000,seed=2",
    )
