"""Makes ids unique: the second record called `a` becomes `a~2`."""

from collections import Counter


class DistinctIds:
    """Gives records ids, in their order; every pass over the same records gives the same."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._numbers: Counter[str] = Counter()  # of the last record of an id, where it is repeated

    def claim(self, key: str) -> str:
        """Return a unique id for a record: its own, or `ID~2`, `ID~3` ... if that is used."""
        if key not in self._taken:
            self._taken.add(key)
            return key
        number = max(self._numbers[key], 1) + 1
        while (new := f"{key}~{number}") in self._taken:
            number += 1
        self._numbers[key] = number
        self._taken.add(new)
        return new


def describe_renaming(key: str, new: str) -> str:
    """The reason in a report for a renamed record."""
    return f"id seen before: {key} is called {new} here"
