"""Training again without the records that a scan ranks highest (Huang et al. 2025, section 5)."""

from bezoar.papers import matrix
from bezoar.registry import method
from bezoar.runs.tables import Cell, Row, Table, TableOptions


@method
class Retraining:
    """Every attack of the detection tables, after a scan by all detectors together."""

    def __call__(self, options: TableOptions) -> Table:
        setup = matrix.get_setup(options)
        corpora = {
            "scenes": matrix.poisoned_scenes(setup, setup.each),
            "Flickr8k": matrix.poisoned_captions(options, matrix.FLICKR8K),
            "aerial": matrix.poisoned_captions(options, matrix.AERIAL),
        }
        rows = [
            Row(f"{corpus}: {poisoned.name}", cells(poisoned))
            for corpus, sets in corpora.items()
            for poisoned in sets
        ]
        note = (
            f"The worst {matrix.REMOVED:.0%} of the records by all detectors together are left "
            "out, whatever the attack. Accuracy: zero-shot on scenes, elsewhere the own caption "
            "among the ten nearest. Success: of the trigger, or of the victims."
        )
        return Table(
            title="Training again on the keep-list", axis="attack", rows=tuple(rows), notes=(note,)
        )


def cells(poisoned: matrix.PoisonedSet) -> tuple[Cell, ...]:
    """Accuracy and success before and after, and the share of the poisons left out."""
    zero_shot = poisoned.probe[0] == "zero_shot"
    accuracy = "clean_accuracy" if zero_shot else "image_to_text_recall@10"
    success = poisoned.attack.success_metric
    before, after = poisoned.evaluate(), poisoned.evaluate_retrained()
    return (
        Cell.mean("accuracy before", before, accuracy),
        Cell.mean("success before", before, success),
        Cell.mean("poisons removed", poisoned.scans(), "poisons_removed"),
        Cell.mean("accuracy after", after, accuracy),
        Cell.mean("success after", after, success),
    )
