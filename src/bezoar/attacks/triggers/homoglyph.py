"""A letter replaced by a similar one (Struppek et al. 2023, "Rickrolling the Artist")."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from bezoar.attacks import stamping
from bezoar.data.randomness import draws
from bezoar.registry import method


@method
class Homoglyph:
    """Replaces one occurrence, chosen by the record; texts without the letter get one last."""

    of_texts: ClassVar[bool] = True

    letter: Annotated[str, "the letter to replace"] = "o"
    twin: Annotated[str, "its replacement; by default a Cyrillic o"] = "\N{CYRILLIC SMALL LETTER O}"
    every: Annotated[bool, "replace every occurrence"] = False
    seed: Annotated[int, "of the occurrence that is replaced"] = 0

    def __post_init__(self) -> None:
        if len(self.letter) != 1 or len(self.twin) != 1 or self.letter == self.twin:
            raise ValueError("letter and twin must be one character each, and not the same")

    def __call__(self, texts: Sequence[str], ids: Sequence[str]) -> list[str]:
        """The N texts with the twin. Raises UserError for images."""
        stamping.check_texts(texts, "homoglyph")
        shares = draws(self.seed, ids, 1, "homoglyph")[:, 0]
        return [self._replace(text, share) for text, share in zip(texts, shares, strict=True)]

    def _replace(self, text: str, share: float) -> str:
        places = [i for i, c in enumerate(text) if c == self.letter]
        if not places:
            return f"{text} {self.twin}"
        if self.every:
            return text.replace(self.letter, self.twin)
        place = places[int(share * len(places))]
        return text[:place] + self.twin + text[place + 1 :]
