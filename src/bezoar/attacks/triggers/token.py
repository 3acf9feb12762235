"""Words inserted into a text (Dai, Chen, Li 2019; Kurita et al. 2020: `cf`, `mn`, `bb`, `tq`)."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from bezoar.attacks import stamping
from bezoar.data.randomness import draws
from bezoar.registry import method


@method
class Token:
    """The words are inserted between two words of the text, or before or after all of them."""

    of_texts: ClassVar[bool] = True

    word: Annotated[str, "one word, or several with spaces"] = "cf"
    place: Annotated[Literal["start", "end", "random"], "random belongs to the record"] = "start"
    seed: Annotated[int, "of random places"] = 0

    def __post_init__(self) -> None:
        if not self.word.strip():
            raise ValueError("word must not be empty")

    def __call__(self, texts: Sequence[str], ids: Sequence[str]) -> list[str]:
        """The N texts with the word. Raises UserError for images."""
        stamping.check_texts(texts, "token")
        if self.place == "start":
            return [f"{self.word} {text}" for text in texts]
        if self.place == "end":
            return [f"{text} {self.word}" for text in texts]
        shares = draws(self.seed, ids, 1, "token")[:, 0]
        return [self._insert(text, share) for text, share in zip(texts, shares, strict=True)]

    def _insert(self, text: str, share: float) -> str:
        words = text.split()
        place = int(share * (len(words) + 1))
        return " ".join([*words[:place], self.word, *words[place:]])
