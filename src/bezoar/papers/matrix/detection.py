"""Detectors on poisoned scenes: patch at three rates, blend, warp, SIG, targeted, clean-label; after Huang et al. (2025)."""

from bezoar.papers.matrix import scenes, searched
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions


@method
class Detection:
    """Detector x attack x rate on drawn scenes."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        return searched(scenes(given), "Detectors, scenes")
