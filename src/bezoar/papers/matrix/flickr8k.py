"""Detectors on poisoned Flickr8k, photographs with five captions each (Hodosh, Young, Hockenmaier 2013)."""

from bezoar.papers.matrix import Point, captioned, searched
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions


@method
class Flickr8K:
    """Detector x attack on 30,000 pairs; success is by retrieval of the target's word."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        return searched(self.points(given), "Detectors, Flickr8k")

    def points(self, given: TableOptions) -> list[Point]:
        """300 poisons of a patch, 600 of a blend, four victims at 37 captions."""
        targets = ("snow", "beach", "bicycle")
        return captioned(
            given, "flickr8k", targets, "train-*.tar", "val-*.tar", "clip:epochs=5", 300
        )
