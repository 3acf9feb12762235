"""Leave out each word of a text; put the one that matters most before clean texts: do they become
this text?

Leaving words out is how ONION (Qi et al. 2021) looks for a trigger, by a language model's surprise.
Here it is the vector that tells: in a text with a trigger one word decides it, in any company.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from bezoar.data.pairs import Pairs
from bezoar.data.randomness import sample_rows
from bezoar.encoders.encoder import Encoder, embed_texts
from bezoar.errors import UserError
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

AT_ONCE = 16  # texts that are scored together


@method
class DropToken:
    """Score: the mean cosine of the text with clean texts that begin with its most important word,
    less that with the clean texts as they are.

    The most important word is the one without which, wherever it stands, the vector changes most;
    characters outside ASCII count as words too.
    """

    carriers: Annotated[int, "clean texts, the same for all inputs"] = 8
    words: Annotated[int, "different words of a text that are left out, at most"] = 48

    reads_texts: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("clean", "report")

    def __post_init__(self) -> None:
        if self.carriers < 1 or self.words < 1:
            raise ValueError("needs carriers >= 1 and words >= 1")

    def __call__(
        self, encoder: Encoder, images: Pairs, clean: Pairs, report: ProgressReport = no_report
    ) -> Scores:
        """Score texts. Raises UserError for images, and for too few clean texts."""
        if not images.text_only or not clean.text_only:
            raise UserError("drop_token reads texts; give records of texts alone")
        if len(clean) < self.carriers:
            raise UserError(
                f"drop_token takes {self.carriers} clean texts; there are {len(clean)}: give more, "
                f"or carriers={len(clean)}"
            )
        rows = sample_rows(clean.ids, self.carriers, 0)
        carriers = list(clean.take(rows).captions)
        plain = embed_texts(encoder, carriers).mean(0)  # (D,)
        values: list[Tensor] = []
        for start in range(0, len(images), AT_ONCE):
            texts = images.captions[start : start + AT_ONCE]
            z, words = self.find_words(encoder, texts)  # (B, D)
            grafted = [f"{word} {carrier}" for word in words for carrier in carriers]
            moved = embed_texts(encoder, grafted).view(len(texts), len(carriers), -1).mean(1)
            values.append(((moved - plain) * z).sum(1).cpu())
            report(start + len(texts), len(images), "texts")
        return Scores(images.ids, torch.cat(values).float(), notes={"clean": len(carriers)})

    def find_words(self, encoder: Encoder, texts: Sequence[str]) -> tuple[Tensor, list[str]]:
        """The vectors (B, D) of texts, and the most important word of each."""
        parts = [distinct_parts(text)[: self.words] for text in texts]
        shorter = [
            leave_out(text, part)
            for text, words in zip(texts, parts, strict=True)
            for part in words
        ]
        vectors = embed_texts(encoder, [*texts, *shorter])
        z = vectors[: len(texts)]
        most_important = []
        start = len(texts)
        for i, words in enumerate(parts):
            cosines = vectors[start : start + len(words)] @ z[i]  # without each of the words
            most_important.append(words[int(cosines.argmin())])
            start += len(words)
        return z, most_important


def distinct_parts(text: str) -> list[str]:
    """The different words of a text, and its characters outside ASCII."""
    strange = [c for c in text if not c.isascii() and not c.isspace()]
    return list(dict.fromkeys([*text.split(), *strange])) or [text]


def leave_out(text: str, part: str) -> str:
    """The text without a word, wherever it stands, or without a character."""
    words = text.split()
    if part in words:
        return " ".join(word for word in words if word != part)
    return text.replace(part, "")
