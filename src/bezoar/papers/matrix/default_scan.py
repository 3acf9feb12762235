"""The default `bezoar scan`, on poisoned and on clean data."""

from bezoar.papers.matrix import get_setup, poisoned_scenes
from bezoar.registry import method
from bezoar.runs.tables import Cell, Row, Table, TableOptions, mean_cells
from bezoar.runs.verb import Trial
from bezoar.verbs.scan import Scan

COLUMNS = {
    "AUROC, transplant": "transplant.auroc",
    "recall, worst 1.5 n": "transplant.recall_at_1.5n",
    "AUROC, duplicates": "duplicates.auroc",
    "AUROC, clip_score": "clip_score.auroc",
    "AUROC, together": "auroc",
    "together: worst 1.5 n": "recall_at_1.5n",
    "said to show a trigger": "transplant.raised",
}


@method
class DefaultScan:
    """The patch at five rates, the other attacks, and none. No setting was chosen on these sets."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        clean = [setup.clean_clip(seed) for seed in range(setup.others)]
        scans = [Trial(Scan(encoder.verb), encoder.seed) for encoder in clean]
        raised = Cell.mean("said to show a trigger", scans, COLUMNS["said to show a trigger"])
        rows = [Row("none", (raised,))]
        for poisoned in poisoned_scenes(setup, setup.others, (0.05, 0.1, 0.25, 5)):
            success = Cell.mean("ASR", poisoned.evaluate(), poisoned.attack.success_metric)
            scans = [Trial(Scan(encoder.verb), encoder.seed) for encoder in poisoned.encoders]
            cells = (success, *mean_cells(scans, COLUMNS))
            rows.append(Row(poisoned.name, cells))
        note = (
            f"Each attack: {setup.others} sets, each with a trigger, place and target of its own, "
            "scanned with the encoder trained on it. Where ASR is low there is no backdoor to "
            "transplant. What is said to show a trigger is poison or, on the sets without an "
            "attack, a false alarm."
        )
        return Table(title="The default scan", axis="attack", rows=tuple(rows), notes=(note,))
