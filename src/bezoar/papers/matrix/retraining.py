"""Training again without what a scan found: accuracy and success before and after (Huang et al. 2025, section 5)."""

from bezoar.papers.matrix import REMOVED, scenes
from bezoar.papers.matrix.aerial import Aerial
from bezoar.papers.matrix.flickr8k import Flickr8K
from bezoar.registry import method
from bezoar.runs.tables import Cell, Row, Table, TableOptions, readings


@method
class Retraining:
    """Every attack of the detection tables, after a scan by all detectors together."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        points = [("scenes", p) for p in scenes(given)]
        points += [("Flickr8k", p) for p in Flickr8K().points(given)]
        points += [("aerial", p) for p in Aerial().points(given)]
        rows = []
        for corpus, p in points:
            accuracy = "clean_accuracy" if p.probe[0] == "zero_shot" else "image_to_text_recall@10"
            before, after, scans = p.before(), p.after(), p.scans()
            cells = (
                Cell("accuracy before", readings(before, accuracy)),
                Cell("success before", readings(before, p.success)),
                Cell("poisons removed", readings(scans, "poisons_removed")),
                Cell("accuracy after", readings(after, accuracy)),
                Cell("success after", readings(after, p.success)),
            )
            rows.append(Row(f"{corpus}: {p.name}", cells))
        note = (
            f"The worst {REMOVED:.0%} of the records by all detectors together are left out, whatever the attack. Accuracy: "
            "zero-shot on scenes, elsewhere the own caption among the ten nearest. Success: of the trigger, or of the victims."
        )
        return Table("Training again on the keep-list", "", "attack", tuple(rows), notes=(note,))
