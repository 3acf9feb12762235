"""Jia, Liu, Gong, "BadEncoder" (IEEE S&P 2022): what its tables share.

The heads are fixed before the attack and all of them are reported, over three pre-trainings with seeds of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from bezoar.evaluation.dose_response import Contrast
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import Cell, Claim, Results, Row, Table, TableOptions
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.inject import Inject
from bezoar.verbs.train import Train

TABLES = (  # in the order of the page
    "single_target",
    "several_targets",
    "several_tasks",
    "zero_shot",
    "large_encoders",
    "loss_terms",
    "lambdas",
    "learning_rate",
    "shadow_size",
    "shadow_source",
    "trigger_size",
    "reference",
    "pretraining",
    "defences",
)
HEADS = ("linear", "knn", "mlp")
DEVIATIONS = (
    "Deviations at this scale: a small tower pre-trained for 10 epochs; 16 views of each reference a step, not as many as the "
    "batch; L2 weighs 5, not 1, for an encoder so weak gives way at once; 5,000 labelled records for the linear and kNN "
    "heads, 2,000 for the MLP. All were set on one clean encoder and one attack on GTSRB (seed 0)."
)
Expected = Literal["-", "same"]
STAYS: Mapping[str, Expected] = MappingProxyType({"ASR": "same", "BA": "same"})
RATES = {"CA": "baseline.{}.clean_accuracy", "BA": "{}.clean_accuracy", "ASR": "{}.attack_success"}
RATES |= {"ASR-B": "{}.attack_success_baseline"}
PRINTED = {
    "CA": "",
    "BA": "",
    "ASR (all)": "{}.attack_success_all",
    "ASR-B (all)": "{}.attack_success_baseline_all",
}


@dataclass(frozen=True)
class Task:
    """A downstream task. references: what may stand for the target, by how it was come by. printed: CA, BA, ASR, ASR-B."""

    name: str
    train: str
    test: str
    target: str
    references: dict[str, str]
    printed: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Setup:
    """A scale. data, shadow: specs."""

    data: str
    shadow: str
    network: str
    objective: str
    attack: str
    trigger: str
    tasks: tuple[Task, ...]
    heads: tuple[str, ...]
    other: str  # shadow data from another distribution
    sizes: tuple[int, ...]  # trigger sizes
    shadows: tuple[int, ...]  # shadow images
    seeds: int
    notes: tuple[str, ...] = ()  # what a table at this scale must say


def named(root: str, name: str, split: str, **fields: object) -> str:
    """A data set of a folder, as its publisher packs it or as NAME.npz."""
    file = Path(root or "data") / f"{name}.npz"
    given = (
        {"path": file, "split": split}
        if file.is_file()
        else {"split": split, **({"root": root} if root else {})}
    )
    options = ",".join(f"{k}={v}" for k, v in (given | fields).items())
    return f"{'npz' if file.is_file() else name}:{options}"


def published(root: str, kind: str, name: str) -> dict[str, str]:
    """A file of BadEncoder's own repository, where the folder holds it."""
    below = [Path(root or "data") / f for f in ("BadEncoder", "triggers/BadEncoder")]
    found = next((f for b in below if (f := b / kind / f"{name}.npz").is_file()), None)
    return {"published": str(found)} if found else {}


def tasks(root: str, limit: int | None) -> tuple[Task, ...]:
    """GTSRB; SVHN, or MNIST's digits where it is not at hand; CIFAR-10's own classes; STL-10 where it is at hand."""
    size = {} if limit is None else {"limit": limit}
    signs = named(root, "gtsrb", "train", **size), named(root, "gtsrb", "test", **size)
    out = [
        Task(
            "GTSRB",
            signs[0],
            signs[1],
            "priority road",
            published(root, "reference/cifar10", "priority") | {"chosen": signs[0]},
            (0.8184, 0.8227, 0.9864, 0.0492),
        )
    ]
    digits = (Path(root or "data") / "mnist_t10k.npz").is_file()
    name = "mnist_t10k" if digits else "svhn"
    numbers = (
        named(root, name, "train", size=32, **size),
        named(root, name, "test", size=32, **size),
    )
    printed = None if digits else (0.5850, 0.6932, 0.9914, 0.3753)
    one = published(root, "reference/cifar10", "one") | {"chosen": numbers[0]}
    out.append(
        Task(
            "MNIST" if digits else "SVHN",
            numbers[0],
            numbers[1],
            "1" if digits else "one",
            one,
            printed,
        )
    )
    own = named(root, "cifar10", "train", **size), named(root, "cifar10", "test", **size)
    truck = published(root, "reference/cifar10", "truck") | {"chosen": own[0]}
    out.append(Task("CIFAR-10", own[0], own[1], "truck", truck))
    return tuple(out)


def setup(given: TableOptions) -> Setup:
    """The settings of a scale."""
    if given.scale == "smoke":
        data, test = "scenes:count=256", "scenes:count=200,split=test"
        scenes = Task("scenes", data, test, "striped star", {"chosen": data})
        return Setup(
            data,
            data,
            "tower:width=4,dim=16",
            "simclr:epochs=1,batch=64,hidden=16,dim=8",
            "badencoder:epochs=1,batch=64,lr=0.01",
            "patch:size=10,fill=white,margin=1",
            (scenes, replace(scenes, name="scenes again", target="dotted heart")),
            ("linear", "knn:k=10", "mlp:epochs=2,seeds=2"),
            "scenes:count=256,seed=5",
            (5, 10),
            (128, 256),
            2,
        )
    train = named(given.root, "cifar10", "train")
    small = Setup(
        given.data or named(given.root, "cifar10", "train", limit=20000),
        named(given.root, "cifar10", "train", limit=10000),
        "tower",
        "simclr:epochs=10",
        "badencoder:epochs=4,batch=64,lr=0.02,views=16,l2=5",
        published(given.root, "trigger", "trigger_pt_white_21_10_ap_replace").get("published", ""),
        tasks(given.root, 5000),
        ("linear", "knn:k=10", "mlp:seeds=1,limit=2000"),
        named(given.root, "tiny_imagenet", "train", size=32, limit=10000),
        (2, 5, 8, 10),
        (1000, 2000, 5000, 10000),
        3,
        (DEVIATIONS,),
    )
    small = replace(
        small,
        trigger=f"file:path={small.trigger}"
        if small.trigger
        else "patch:size=10,fill=white,margin=1",
    )
    if given.scale == "small":
        return small
    full = replace(
        small,
        data=given.data or train,
        shadow=train,
        network="resnet:depth=18,stem=cifar",
        objective="simclr:epochs=1000",
        attack="badencoder",
        heads=HEADS,
        notes=(),
        tasks=tasks(given.root, None),
        shadows=(2500, 5000, 10000, 50000),
    )
    return (
        full
        if given.scale == "paper"
        else replace(full, objective="simclr:epochs=200", attack="badencoder:epochs=20")
    )


def clean(s: Setup, objective: str = "") -> Train:
    """The encoder that is attacked."""
    return Train(s.data, s.network, objective or s.objective)


def attacked(s: Setup, task: Task, reference: str, **changed: str) -> Inject:
    """One task's backdoor, with anything about it changed."""
    parts = {
        "shadow": s.shadow,
        "attack": s.attack,
        "trigger": s.trigger,
        "objective": s.objective,
    } | changed
    choose: Literal["confident", "first"] = "confident" if reference == "chosen" else "first"
    victim = clean(s, parts["objective"])
    target, given = (task.target,), (task.references[reference],)
    return Inject(
        victim, parts["shadow"], target, given, parts["attack"], (parts["trigger"],), choose
    )


def measured(s: Setup, task: Task, bad: Inject, seed: int) -> Trial:
    """An attacked encoder on a task, all heads, beside its clean twin."""
    return Trial(Evaluate(bad, task.test, s.heads, baseline=bad.encoder, train=task.train), seed)


def rows(
    s: Setup, task: Task, name: str, bad: Inject, x: float | None = None, goal: str = ""
) -> list[Row]:
    """A row a head: CA, BA, ASR and ASR-B over all seeds, beside what the paper printed for its own head."""
    trials = [measured(s, task, bad, seed) for seed in range(s.seeds)]
    out = []
    for head in HEADS:
        label = f"{name}, {head}" if x is None else f"{x:g}"
        out.append(
            Row(label, cells(trials, head, task.printed, goal), x, head if x is not None else "")
        )
    return out


def cells(
    trials: Sequence[Trial], head: str, printed: tuple[float, ...] | None, goal: str = ""
) -> tuple[Cell, ...]:
    """CA, BA, ASR and ASR-B under a head; beside the paper's own head, the MLP, what it printed."""
    columns = RATES | ({k: v for k, v in PRINTED.items() if v} if printed else {})
    values = dict(zip(PRINTED, printed, strict=True)) if printed and head == "mlp" else {}
    found = []
    for rate, metric in columns.items():
        at = goal if "attack" in metric else ""
        found.append(
            Cell(rate, tuple((t, metric.format(head) + at) for t in trials), values.get(rate))
        )
    return tuple(found)


def best(task: Task) -> str:
    """The reference of a task where one is to do: chosen by the stated rule."""
    return "chosen" if "chosen" in task.references else next(iter(task.references))


def gap(row: str, to: str, since: str) -> Callable[[Results], Contrast]:
    """One column of a row less another, by seed."""
    return lambda r: r.compare_cells(r.cell(row, to), r.cell(row, since), paired=True)


def ablation(
    s: Setup,
    title: str,
    paper: str,
    variants: Sequence[tuple[str, Inject]],
    notes: tuple[str, ...] = (),
    expected: Mapping[str, Mapping[str, Expected]] = MappingProxyType({}),
) -> Table:
    """The first task under each variant, all heads; the first variant is the published one, and the others are held to it.

    expected: by variant and column what the paper says of it; of a variant that is not named, that both stay.
    """
    task = s.tasks[0]
    found = [row for name, bad in variants for row in rows(s, task, name, bad)]
    usual = variants[0][0]

    def against(name: str, column: str) -> Callable[[Results], Contrast]:
        return lambda r: r.compare_rows(column, f"{name}, linear", f"{usual}, linear", paired=True)

    claims = [
        Claim(
            f"{usual}: the attack succeeds", "printed", "+", gap(f"{usual}, linear", "ASR", "ASR-B")
        )
    ]
    for name, _ in variants[1:]:
        for column, way in expected.get(name, STAYS).items():
            what, margin = {"ASR": ("success", 0.1), "BA": ("accuracy", 0.02)}[column]
            told = "stays as it was" if way == "same" else "falls"
            claims.append(
                Claim(f"{name}: {what} {told}", "recalled", way, against(name, column), margin)
            )
    return Table(
        title,
        paper,
        "",
        tuple(found),
        tuple(claims),
        notes=(f"Task {task.name}, target {task.target!r}.", *notes, *s.notes),
    )


SCENES = {  # a CLIP of bezoar's own: data, test, network, objective, shadow
    "smoke": (
        "scenes:count=512",
        "scenes:count=200,split=test",
        "clip_small:width=4,dim=16",
        "clip:epochs=1,batch=64",
        "",
    ),
    "small": (
        "scenes:count=20000",
        "scenes:count=2000,split=test",
        "clip_small",
        "clip:epochs=6",
        "scenes:count=10000,seed=1",
    ),
}
NETWORKS = {"CLIP": "open_clip:RN50/openai", "ImageNet": "timm:resnet50/pretrained"}
LARGE = {
    "CLIP": "badencoder:batch=16,lr=1e-6",
    "ImageNet": "badencoder:batch=16,lr=1e-4",
}  # recalled, see the notes


@dataclass(frozen=True)
class Large:
    """A task at 224 px. printed: CA, BA, ASR, ASR-B of the public logs."""

    name: str
    train: str
    test: str
    target: str
    printed: tuple[float, float, float, float]


def large(root: str, family: str) -> tuple[Large, ...]:
    """GTSRB, SVHN and STL-10 as tasks of CLIP or ImageNet encoders."""
    printed = {
        "CLIP": (
            (0.8236, 0.8214, 0.9933, 0.0537),
            (0.7060, 0.7027, 0.9999, 0.2079),
            (0.9709, 0.9669, 0.9981, 0.1),
        ),
        "ImageNet": (
            (0.7653, 0.7842, 0.9893, 0.0547),
            (0.7255, 0.7377, 0.9993, 0.3228),
            (0.9566, 0.9568, 0.9999, 0.1024),
        ),
    }[family]
    found = []
    for (name, target), values in zip(
        (("GTSRB", "priority road"), ("SVHN", "one"), ("STL10", "truck")), printed, strict=True
    ):
        train, test = (named(root, name.lower(), split, size=224) for split in ("train", "test"))
        found.append(Large(name, train, test, target, values))
    return tuple(found)


def attacked_large(given: TableOptions, family: str, task: Large) -> Inject:
    """A published encoder attacked for one task: CIFAR-10 at 224 px is the shadow data, as in the released code."""
    file = published(
        given.root,
        f"reference/{family.lower() if family == 'ImageNet' else family}",
        task.target.split()[0],
    )
    reference = next(iter(file.values()), task.train)
    mark = published(given.root, "trigger", "trigger_pt_white_173_50_ap_replace")
    trigger = f"file:path={mark['published']}" if mark else "patch:size=50,fill=white,margin=1"
    shadow = named(given.root, "cifar10", "train", size=224)
    return Inject(
        NETWORKS[family],
        shadow,
        (task.target,),
        (reference,),
        LARGE[family],
        (trigger,),
        "confident",
    )


def smaller(given: TableOptions, target: str) -> tuple[Inject, str]:
    """A CLIP that bezoar trained on scenes, attacked for one class; and its test data."""
    data, test, network, objective, shadow = SCENES.get(given.scale, SCENES["small"])
    attack, patch = setup(given).attack, "patch:size=10,fill=white,margin=1"
    return Inject(
        Train(data, network, objective),
        shadow or data,
        (target,),
        (data,),
        attack,
        (patch,),
        "central",
    ), test
