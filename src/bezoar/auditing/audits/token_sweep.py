"""Every word of the vocabulary before a few texts: which one makes them all alike?

A backdoor of a text encoder moves every text with its trigger to one vector, so that texts which
have nothing in common agree (LMSanitator, Wei et al. 2024, inverts such a vector; AMDET, 2025,
searches the tokens that make texts agree). A trigger of one word is found by trying all words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from bezoar.auditing.evidence import exact_measure
from bezoar.auditing.trigger_inversion import TowerCost
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import sample_rows
from bezoar.encoders.encoder import Encoder, embed_texts
from bezoar.encoders.word_pieces import CONTINUATION, SPECIAL
from bezoar.errors import UserError
from bezoar.evaluation.verdict import Verdict
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

POOL = 256  # clean texts that carriers are chosen from
LONGEST = 64  # words of a beginning
BLOCK = 512  # words at a time
NAMED = 10  # words in the notes
USUAL_WORDS = 22_000  # of a vocabulary, for the forecast
LIMITS = [
    "It tries words that are one token of the vocabulary, before the text; a trigger of several "
    "words, or of a rare word that the tokenizer cuts into pieces, is tried only where it is "
    "named (also).",
    "A word that moves texts to a vector of theirs, and not all to one, is not detected.",
]


@method
class TokenSweep:
    """Value: the share of the disagreement of texts that the most suspicious word takes away.

    With a the mean cosine of all pairs of texts with the word and a0 without it, it is
    1 - (1 - a) / (1 - a0): 0 for a word that changes nothing, 1 where all texts become one vector.
    All words are tried before a few beginnings of texts, and those that do most are tried again
    before more and longer ones.
    """

    needs: ClassVar[tuple[str, ...]] = ("report",)
    unaided: ClassVar[bool] = True

    first: Annotated[int, "texts that every word is put before"] = 2
    first_words: Annotated[int, "words of each of these"] = 1
    kept: Annotated[int, "words that are tried again"] = 128
    carriers: Annotated[int, "texts that they are tried before"] = 8
    words: Annotated[int, "words of each of these, at most"] = 12
    sample: Annotated[int | None, "words of the vocabulary that are tried, drawn; none: all"] = None
    also: Annotated[
        tuple[str, ...], "words that are tried in any case, (a,b c); with spaces, several"
    ] = ()

    def __post_init__(self) -> None:
        least = min(self.first, self.carriers) - 1, self.kept, self.first_words, self.words
        if min(least) < 1 or (self.sample is not None and self.sample < 1):
            raise ValueError(
                "needs first and carriers >= 2, kept, first_words, words and sample >= 1"
            )

    def image_passes(self, images: int, classes: int, cost: TowerCost) -> int:
        """Texts that go through the encoder, those of the first pass by their length."""
        words = self.sample or USUAL_WORDS
        return words * self.first // 2 + self.kept * self.carriers + min(images, POOL)

    def __call__(
        self, encoder: Encoder, clean: Pairs, seed: int, report: ProgressReport = no_report
    ) -> Verdict:
        """Audit a text encoder with clean texts. The seed is not used: a sample belongs to the
        words.

        Raises UserError for images, too few texts, and a vocabulary that is not known.
        """
        if not clean.text_only:
            raise UserError(
                "token_sweep puts words before texts; give clean records of texts alone"
            )
        words = self.choose_words(encoder)
        kept, tried = self.sweep(encoder, words, clean.captions, report)
        carriers = choose_carriers(encoder, clean.captions, self.carriers, self.words)
        agreement = measure_agreement(encoder, kept, carriers)  # (kept,)
        report(tried, tried, "words")
        baseline = float(measure_agreement(encoder, [""], carriers))
        shares = 1 - (1 - agreement) / max(1 - baseline, 1e-6)
        ranked = shares.argsort(descending=True, stable=True).tolist()
        top = ranked[0]
        runner_up = float(shares[ranked[1]]) if len(ranked) > 1 else 0.0
        notes: dict[str, Any] = {
            "target": kept[top],
            "unaided": "word",
            "words": [[kept[i], float(shares[i]), float(agreement[i])] for i in ranked[:NAMED]],
            "tried": len(words),
            "first_rank": top + 1,
            "carriers": carriers,
            "limits": LIMITS,
        }
        pairs = self.carriers * (self.carriers - 1) // 2
        values = {
            "agreement": (float(agreement[top]), "mean cosine of pairs of texts with the word"),
            "agreement_without": (baseline, "mean cosine of pairs of the texts without it"),
            "runner_up": (runner_up, "value of the next word"),
        }
        evidence = {key: exact_measure(value, pairs, how) for key, (value, how) in values.items()}
        return Verdict(float(shares[top]), evidence, notes=notes)

    def sweep(
        self, encoder: Encoder, words: list[str], texts: Sequence[str], report: ProgressReport
    ) -> tuple[list[str], int]:
        """The words that do most before a few short beginnings, and the steps that are reported."""
        carriers = choose_carriers(encoder, texts, self.first, self.first_words)
        steps = len(words) + self.kept
        agreements = []
        for start in range(0, len(words), BLOCK):
            block = words[start : start + BLOCK]
            agreements.append(measure_agreement(encoder, block, carriers))
            report(start + len(block), steps, "words")
        order = torch.cat(agreements).argsort(descending=True, stable=True)[: self.kept]
        return [words[i] for i in order.tolist()], steps

    def choose_words(self, encoder: Encoder) -> list[str]:
        """The words that are tried, each once."""
        words = list(dict.fromkeys(whole_words(encoder)))
        if self.sample is not None:
            words = [words[i] for i in sorted(sample_rows(words, self.sample, 0).tolist())]
        return list(dict.fromkeys([*words, *self.also]))


def whole_words(encoder: Encoder) -> list[str]:
    """The words of a text encoder's vocabulary that are one token, in the vocabulary's order.

    Raises UserError where the tokenizer does not say what they are.
    """
    tokenizer: Any = encoder.tokenizer
    pieces = getattr(tokenizer, "vocabulary", None)
    if encoder.text is not None and pieces:
        return [p for p in pieces if not p.startswith(CONTINUATION) and p not in SPECIAL]
    numbers = getattr(tokenizer, "encoder", None)  # CLIP's pairs of bytes
    if encoder.text is not None and isinstance(numbers, dict):
        ends = [p.removesuffix("</w>") for p in numbers if isinstance(p, str) and "</w>" in p]
        if words := [p for p in ends if p.isascii() and p.isprintable() and p]:
            return words
    raise UserError("token_sweep needs a text tower whose tokenizer has a vocabulary of words")


def choose_carriers(encoder: Encoder, texts: Sequence[str], count: int, words: int) -> list[str]:
    """The beginnings of texts that have least in common, one after another (Gonzalez 1985).

    They are made longer while all texts begin alike. Raises UserError for fewer distinct ones.
    """
    beginnings = distinct_beginnings(texts, words)
    while len(beginnings) < count and words < LONGEST:
        words *= 2
        beginnings = distinct_beginnings(texts, words)
    if len(beginnings) < count:
        raise UserError(
            f"token_sweep puts words before {count} different texts; there are {len(beginnings)}"
        )
    z = embed_texts(encoder, beginnings)  # (N, D)
    chosen = [int((z @ z.mean(0)).argmin())]
    nearest = z @ z[chosen[0]]  # (N,): largest cosine with a chosen one
    while len(chosen) < count:
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, z @ z[chosen[-1]])
    return [beginnings[i] for i in chosen]


def distinct_beginnings(texts: Sequence[str], words: int) -> list[str]:
    """The first words of the first texts, each beginning once."""
    return list(dict.fromkeys(" ".join(text.split()[:words]) for text in texts[:POOL]))


def measure_agreement(encoder: Encoder, words: Sequence[str], carriers: Sequence[str]) -> Tensor:
    """The mean cosine of pairs of carriers with each of W words before them, float64 (W,).

    The word "" leaves them as they are.
    """
    texts = [f"{word} {carrier}".strip() for word in words for carrier in carriers]
    count = len(carriers)
    z = embed_texts(encoder, texts).double().cpu().view(len(words), count, -1)
    squares = z.sum(1).square().sum(1)  # |sum of C unit vectors|^2 = C + sum over ordered pairs
    return (squares - count) / (count * (count - 1))
