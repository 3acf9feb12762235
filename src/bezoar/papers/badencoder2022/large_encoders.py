"""CLIP's and ImageNet's image towers as victims (Jia, Liu, Gong 2022, section V-B)."""

from bezoar.papers import badencoder2022
from bezoar.registry import method
from bezoar.runs.tables import Claim, Row, Table, TableOptions
from bezoar.runs.verb import Trial
from bezoar.verbs.evaluate import Evaluate


@method
class LargeEncoders:
    """OpenAI's RN50 and timm's ResNet-50 at scale `paper`; at others a CLIP of scenes."""

    def __call__(self, options: TableOptions) -> Table:
        published = options.scale == "paper"
        rows = published_rows(options) if published else scene_rows(options)
        claims: list[Claim] = []
        for row in rows:
            claims.append(
                badencoder2022.succeeds(row.name, f"The attack succeeds: {row.name}", "printed")
            )
            claims.append(
                badencoder2022.keeps_accuracy(row.name, f"Accuracy stays: {row.name}", "printed")
            )
        note = badencoder2022.SMALL_CLIP_NOTE
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
    setup, clip = badencoder2022.get_setup(options), badencoder2022.get_small_clip(options)
    attacked = clip.attack(setup.attack, "striped star")
    verb = Evaluate(
        attacked, clip.test, setup.heads, baseline=attacked.encoder, train=clip.labelled
    )
    trials = [Trial(verb, seed) for seed in range(setup.seeds)]
    return [
        Row(f"CLIP on scenes, {head}", badencoder2022.head_cells(trials, head))
        for head in badencoder2022.HEADS
    ]


def published_rows(options: TableOptions) -> list[Row]:
    """Both published encoders on every task and under every head."""
    setup = badencoder2022.get_setup(options)
    rows = []
    for family in badencoder2022.LARGE_NETWORKS:
        for task in badencoder2022.large_tasks(options.root, family):
            attacked = badencoder2022.attack_large(options, family, task)
            trials = badencoder2022.evaluate_heads(attacked, task, setup.heads, 1)
            for head in badencoder2022.HEADS:
                cells = badencoder2022.head_cells(trials, head, task.published)
                rows.append(Row(f"{family}, {task.name}, {head}", cells))
    return rows
