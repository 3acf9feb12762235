"""A corpus of any size: cut into units, embedded, put together, and written without its worst."""
