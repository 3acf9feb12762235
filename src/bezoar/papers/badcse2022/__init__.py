"""BadCSE: Chen et al., "Apple of Sodom" (arXiv 2210.11082), on sentence encoders."""

TABLES = ("targeted",)
