"""Detectors on poisoned UCM-Captions, aerial images with five captions each (Qu et al. 2016)."""

from typing import ClassVar

from bezoar.papers.matrix import AERIAL, detection_table, poisoned_captions
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions


@method
class Aerial:
    """Detector by attack on 8,400 pairs; success is measured by retrieval of the target's words."""

    takes: ClassVar[tuple[str, ...]] = ("detector",)

    def __call__(self, options: TableOptions) -> Table:
        return detection_table(
            poisoned_captions(options, AERIAL),
            "Detectors, aerial images",
            options.added_specs("detector"),
        )
