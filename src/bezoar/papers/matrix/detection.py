"""Detectors on poisoned scenes, one set or more for each attack (after Huang et al. 2025)."""

from typing import ClassVar

from bezoar.papers.matrix import detection_table, get_setup, poisoned_scenes
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions


@method
class Detection:
    """Detector by attack and rate on drawn scenes."""

    takes: ClassVar[tuple[str, ...]] = ("detector", "trigger")

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        return detection_table(
            poisoned_scenes(setup, setup.each), "Detectors, scenes", options.added_specs("detector")
        )
