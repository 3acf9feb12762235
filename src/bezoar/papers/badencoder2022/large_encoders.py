"""Encoders of real size as victims: CLIP's and ImageNet's image towers (Jia, Liu, Gong 2022, tables of section V-B)."""

from bezoar.papers.badencoder2022 import (
    HEADS,
    RATES,
    attacked_large,
    cells,
    gap,
    large,
    setup,
    smaller,
)
from bezoar.registry import method
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import Cell, Claim, Row, Table, TableOptions
from bezoar.verbs.evaluate import Evaluate


@method
class LargeEncoders:
    """open_clip's RN50 of OpenAI and timm's ResNet-50 at scale paper; at others a CLIP that bezoar trained on scenes."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s, found = setup(given), []
        if given.scale == "paper":
            for family in ("CLIP", "ImageNet"):
                for task in large(given.root, family):
                    bad = attacked_large(given, family, task)
                    trial = Trial(
                        Evaluate(bad, task.test, s.heads, baseline=bad.encoder, train=task.train), 0
                    )
                    found += [
                        Row(f"{family}, {task.name}, {h}", cells([trial], h, task.printed))
                        for h in HEADS
                    ]
        else:
            bad, test = smaller(given, "striped star")
            labelled = "scenes:count=400" if given.scale == "smoke" else "scenes:count=5000,seed=2"
            trials = [
                Trial(Evaluate(bad, test, s.heads, baseline=bad.encoder, train=labelled), seed)
                for seed in range(s.seeds)
            ]
            for head in HEADS:
                columns = tuple(
                    Cell(n, tuple((t, m.format(head)) for t in trials)) for n, m in RATES.items()
                )
                found.append(Row(f"CLIP on scenes, {head}", columns))
        claims = []
        for row in found:
            claims.append(
                Claim(
                    f"The attack succeeds: {row.name}",
                    "printed",
                    "+",
                    gap(row.name, "ASR", "ASR-B"),
                )
            )
            claims.append(
                Claim(
                    f"Accuracy stays: {row.name}",
                    "printed",
                    "same",
                    gap(row.name, "BA", "CA"),
                    0.02,
                )
            )
        return Table(
            "BadEncoder: CLIP and ImageNet encoders",
            "ASR 98.9 to 100 % on three tasks each, accuracy as before (public logs, MLP head).",
            "",
            tuple(found),
            tuple(claims),
            notes=(
                "ImageNet: the paper's encoder is SimCLR's ResNet-50; timm's supervised one stands for it."
                if given.scale == "paper"
                else "A small CLIP trained on 20,000 scenes stands for OpenAI's.",
            ),
        )
