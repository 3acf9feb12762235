"""CLIP's and ImageNet's image towers as victims (Jia, Liu, Gong 2022, section V-B)."""

from bezoar.papers.badencoder2022 import (
    HEADS,
    LARGE_NETWORKS,
    SMALL_CLIP_NOTE,
    attack_large,
    get_setup,
    get_small_clip,
    head_cells,
    keeps_accuracy,
    large_tasks,
    succeeds,
)
from bezoar.registry import method
from bezoar.runs.tables import Claim, Row, Table, TableOptions
from bezoar.runs.verb import Trial
from bezoar.verbs.evaluate import Evaluate


@method
class LargeEncoders:
    """OpenAI's RN50 and timm's ResNet-50 at scale `paper`; at others a CLIP of scenes."""

    def __call__(self, options: TableOptions) -> Table:
        """Declare the table at a scale."""
        published = options.scale == "paper"
        rows = published_rows(options) if published else scene_rows(options)
        claims: list[Claim] = []
        for row in rows:
            claims.append(succeeds(row.name, f"The attack succeeds: {row.name}", "printed"))
            claims.append(keeps_accuracy(row.name, f"Accuracy stays: {row.name}", "printed"))
        note = SMALL_CLIP_NOTE
        if published:
            note = (
                "ImageNet: the paper's encoder is SimCLR's ResNet-50; timm's supervised one "
                "stands for it."
            )
        return Table(
            title="BadEncoder: CLIP and ImageNet encoders",
            paper_finding=(
                "ASR 98.9 to 100 % on three tasks each, accuracy as before (public logs, MLP head)."
            ),
            rows=tuple(rows),
            claims=tuple(claims),
            notes=(note,),
        )


def scene_rows(options: TableOptions) -> list[Row]:
    """A small CLIP under every head."""
    setup, clip = get_setup(options), get_small_clip(options)
    attacked = clip.attack(setup.attack, "striped star")
    verb = Evaluate(
        attacked, clip.test, setup.heads, baseline=attacked.encoder, train=clip.labelled
    )
    trials = [Trial(verb, seed) for seed in range(setup.seeds)]
    return [Row(f"CLIP on scenes, {head}", head_cells(trials, head)) for head in HEADS]


def published_rows(options: TableOptions) -> list[Row]:
    """Both published encoders on every task and under every head."""
    setup = get_setup(options)
    rows = []
    for family in LARGE_NETWORKS:
        for task in large_tasks(options.root, family):
            attacked = attack_large(options, family, task)
            verb = Evaluate(
                attacked, task.test, setup.heads, baseline=attacked.encoder, train=task.train
            )
            for head in HEADS:
                cells = head_cells([Trial(verb, 0)], head, task.published)
                rows.append(Row(f"{family}, {task.name}, {head}", cells))
    return rows
