"""Training again without the records that a scan ranks highest (Huang et al. 2025, section 5)."""

from bezoar.papers.matrix import (
    AERIAL,
    FLICKR8K,
    REMOVED,
    PoisonedSet,
    get_setup,
    poisoned_captions,
    poisoned_scenes,
)
from bezoar.registry import method
from bezoar.runs.tables import Cell, Row, Table, TableOptions


@method
class Retraining:
    """Every attack of the detection tables, after a scan by all detectors together."""

    def __call__(self, options: TableOptions) -> Table:
        """Declare the table at a scale."""
        setup = get_setup(options)
        corpora = {
            "scenes": poisoned_scenes(setup, setup.each),
            "Flickr8k": poisoned_captions(options, FLICKR8K),
            "aerial": poisoned_captions(options, AERIAL),
        }
        rows = [
            Row(f"{corpus}: {poisoned.name}", cells(poisoned))
            for corpus, sets in corpora.items()
            for poisoned in sets
        ]
        note = (
            f"The worst {REMOVED:.0%} of the records by all detectors together are left out, "
            "whatever the attack. Accuracy: zero-shot on scenes, elsewhere the own caption among "
            "the ten nearest. Success: of the trigger, or of the victims."
        )
        return Table(
            title="Training again on the keep-list", axis="attack", rows=tuple(rows), notes=(note,)
        )


def cells(poisoned: PoisonedSet) -> tuple[Cell, ...]:
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
