"""CLIP as the victim, read zero-shot by its own text tower (Jia, Liu, Gong 2022, section V-D)."""

from bezoar.papers.badencoder2022 import Large, attacked_large, gap, large, setup, smaller
from bezoar.registry import method
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import Cell, Claim, Row, Table, TableOptions
from bezoar.verbs.evaluate import Evaluate

CELLS = {
    "CA": "baseline.clean_accuracy",
    "BA": "clean_accuracy",
    "ASR": "attack_success",
    "ASR-B": "attack_success_baseline",
}
ALL = {"ASR (all)": "attack_success_all", "ASR-B (all)": "attack_success_baseline_all"}
PRINTED = {  # CA, BA, ASR, ASR-B of the public logs; success over all test images, the target's own included
    "GTSRB": ("stop", (0.2983, 0.2984, 0.9982, 0.0196), "A traffic sign photo of a {}"),
    "SVHN": ("zero", (0.1173, 0.1116, 1.0, 0.5355), "A photo of a {}"),
    "STL10": ("truck", (0.9460, 0.9280, 0.9996, 0.1008), "A photo of a {}"),
}


@method
class ZeroShot:
    """The image tower is attacked, the text tower is not touched: OpenAI's CLIP, or one that bezoar trained on scenes."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        found = self._published(given) if given.scale == "paper" else self._scenes(given, s.seeds)
        name = found[0].name
        return Table(
            "BadEncoder: CLIP, read zero-shot",
            "OpenAI's CLIP: ASR 99.8 to 100 %, accuracy as before (public logs).",
            "target",
            tuple(found),
            (
                Claim("The attack succeeds zero-shot", "printed", "+", gap(name, "ASR", "ASR-B")),
                Claim("Accuracy stays", "printed", "same", gap(name, "BA", "CA"), 0.02),
            ),
            notes=()
            if given.scale == "paper"
            else ("A small CLIP trained on 20,000 scenes stands for OpenAI's.",),
        )

    @staticmethod
    def _scenes(given: TableOptions, seeds: int) -> list[Row]:
        found = []
        for target in ("striped star", "dotted heart"):
            bad, test = smaller(given, target)
            trials = [
                Trial(Evaluate(bad, test, baseline=bad.encoder), seed) for seed in range(seeds)
            ]
            found.append(
                Row(target, tuple(Cell(n, tuple((t, m) for t in trials)) for n, m in CELLS.items()))
            )
        return found

    @staticmethod
    def _published(given: TableOptions) -> list[Row]:
        found = []
        for task in large(given.root, "CLIP"):
            target, printed, prompt = PRINTED[task.name]
            task = Large(task.name, task.train, task.test, target, task.printed)
            bad = attacked_large(given, "CLIP", task)
            trial = Trial(
                Evaluate(bad, task.test, (f"zero_shot:templates={prompt}",), baseline=bad.encoder),
                0,
            )
            columns = CELLS | ALL
            values = dict(zip(("CA", "BA", *ALL), printed, strict=True))
            cells = tuple(Cell(n, ((trial, m),), values.get(n)) for n, m in columns.items())
            found.append(Row(f"{task.name}, {target}", cells))
        return found
