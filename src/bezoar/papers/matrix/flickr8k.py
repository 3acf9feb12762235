"""Detectors on poisoned Flickr8k, photographs with five captions each (Hodosh et al. 2013)."""

from typing import ClassVar

from bezoar.papers.matrix import FLICKR8K, detection_table, poisoned_captions
from bezoar.registry import method
from bezoar.runs.tables import Table, TableOptions


@method
class Flickr8K:
    """Detector by attack on 30,000 pairs; success is measured by retrieval of the target's word."""

    takes: ClassVar[tuple[str, ...]] = ("detector",)

    def __call__(self, options: TableOptions) -> Table:
        return detection_table(
            poisoned_captions(options, FLICKR8K),
            "Detectors, Flickr8k",
            options.added_specs("detector"),
        )
