"""What `bezoar scan` finds unasked: three trainings an attack, and as many on clean data."""

from bezoar.papers.matrix import rated, setup
from bezoar.registry import method
from bezoar.runs.sweep import Trial
from bezoar.runs.tables import Cell, Row, Table, TableOptions, readings
from bezoar.verbs.scan import Scan


@method
class DefaultScan:
    """Triggers that nobody chose for it: the patch at five rates, blend, warp, SIG; targeted and clean-label; no attack."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        clean = [Trial(Scan(t.verb), t.seed) for t in map(s.clip, range(s.others))]
        rows = [
            Row("none", (Cell("said to show a trigger", readings(clean, "transplant.raised")),))
        ]
        for point in rated(s, s.others, (0.05, 0.1, 0.25, 5)):
            scans = [Trial(Scan(t.verb), t.seed) for t in point.encoders]
            cells = (
                Cell("ASR", readings(point.before(), point.success)),
                Cell("AUROC, transplant", readings(scans, "transplant.auroc")),
                Cell("recall, worst 1.5 n", readings(scans, "transplant.recall_at_1.5n")),
                Cell("AUROC, duplicates", readings(scans, "duplicates.auroc")),
                Cell("AUROC, clip_score", readings(scans, "clip_score.auroc")),
                Cell("AUROC, together", readings(scans, "auroc")),
                Cell("together: worst 1.5 n", readings(scans, "recall_at_1.5n")),
                Cell("said to show a trigger", readings(scans, "transplant.raised")),
            )
            rows.append(Row(point.name, cells))
        note = (
            f"Each attack: {s.others} sets, each with a trigger, place and target of its own, scanned with the encoder trained "
            "on it. Where ASR is low there is no backdoor to transplant. What is said to show a trigger is poison or, on the "
            "sets without an attack, a false alarm."
        )
        return Table("The default scan", "", "attack", tuple(rows), notes=(note,))
