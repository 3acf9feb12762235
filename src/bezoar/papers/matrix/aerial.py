"""Detectors on poisoned UCM-Captions, aerial images with five captions each (Qu et al. 2016)."""

from bezoar.papers.matrix import Point, captioned, searched
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions


@method
class Aerial:
    """Detector x attack on 8,400 pairs; success is by retrieval of the target's words."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        return searched(self.points(given), "Detectors, aerial images")

    def points(self, given: TableOptions) -> list[Point]:
        """84 poisons of a patch, 168 of a blend, four victims at ten captions."""
        targets = ("tennis court", "airplane", "river")
        return captioned(
            given, "ucm_captions", targets, "train-*.tar", "val-*.tar", "clip:epochs=12", 84
        )
