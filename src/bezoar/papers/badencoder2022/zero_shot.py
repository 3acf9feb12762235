"""CLIP as the victim, read zero-shot by its text tower (Jia, Liu, Gong 2022, section V-D)."""

from dataclasses import replace

from bezoar.papers import badencoder2022
from bezoar.papers.badencoder2022 import (
    PUBLISHED_COLUMNS,
    SMALL_CLIP_NOTE,
    attack_large,
    get_setup,
    get_small_clip,
    keeps_accuracy,
    large_tasks,
    succeeds,
)
from bezoar.registry import method
from bezoar.runs.tables import Cell, Row, Table, TableOptions, mean_cells
from bezoar.runs.verb import Trial
from bezoar.verbs.evaluate import Evaluate

COLUMNS, COLUMNS_OVER_ALL = (  # the zero-shot probe's metrics have no prefix
    {name: metric.replace("{}.", "") for name, metric in columns.items()}
    for columns in (badencoder2022.COLUMNS, badencoder2022.COLUMNS_OVER_ALL)
)
PUBLISHED = {  # target, values of the public logs, prompt
    "GTSRB": ("stop", (0.2983, 0.2984, 0.9982, 0.0196), "A traffic sign photo of a {}"),
    "SVHN": ("zero", (0.1173, 0.1116, 1.0, 0.5355), "A photo of a {}"),
    "STL10": ("truck", (0.9460, 0.9280, 0.9996, 0.1008), "A photo of a {}"),
}


@method
class ZeroShot:
    """The image tower alone is attacked: OpenAI's, or one trained on scenes."""

    def __call__(self, options: TableOptions) -> Table:
        published = options.scale == "paper"
        rows = published_rows(options) if published else scene_rows(options)
        name = rows[0].name
        return Table(
            title="BadEncoder: CLIP, read zero-shot",
            paper_finding="OpenAI's CLIP: ASR 99.8 to 100 %, accuracy as before (public logs).",
            axis="target",
            rows=tuple(rows),
            claims=(
                succeeds(name, "The attack succeeds zero-shot", "printed"),
                keeps_accuracy(name, "Accuracy stays", "printed"),
            ),
            notes=() if published else (SMALL_CLIP_NOTE,),
        )


def scene_rows(options: TableOptions) -> list[Row]:
    """A small CLIP, attacked for one class after the other."""
    setup, clip = get_setup(options), get_small_clip(options)
    rows = []
    for target in ("striped star", "dotted heart"):
        attacked = clip.attack(setup.attack, target)
        verb = Evaluate(attacked, clip.test, baseline=attacked.encoder)
        rows.append(Row(target, mean_cells([Trial(verb, s) for s in range(setup.seeds)], COLUMNS)))
    return rows


def published_rows(options: TableOptions) -> list[Row]:
    """OpenAI's CLIP, beside the values of the public logs."""
    rows = []
    for task in large_tasks(options.root, "CLIP"):
        target, published, prompt = PUBLISHED[task.name]
        attacked = attack_large(options, "CLIP", replace(task, target=target))
        probe = (f"zero_shot:templates={prompt}",)
        trial = Trial(Evaluate(attacked, task.test, probe, baseline=attacked.encoder), 0)
        values = dict(zip(PUBLISHED_COLUMNS, published, strict=True))
        cells = [
            Cell.mean(name, [trial], metric, published=values.get(name))
            for name, metric in (COLUMNS | COLUMNS_OVER_ALL).items()
        ]
        rows.append(Row(f"{task.name}, {target}", tuple(cells)))
    return rows
