"""A corpus of any size as detectors see it: cut into units, embedded, put together, and written again without its worst."""
