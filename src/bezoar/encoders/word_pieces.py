"""WordPiece (Wu et al. 2016) as BERT cuts texts: words first, then the longest pieces that its vocabulary holds.

The tokens are those of the library tokenizers for the same `tokenizer.json`, which is not needed:
what a file states beyond this one way of cutting is refused, and no pattern of a file is run.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PADDING, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SPECIAL = (PADDING, UNKNOWN, START, END, "[MASK]")  # kept whole where a text holds them
CONTINUATION = "##"  # before a piece that does not begin a word
MAX_WORD = 100  # characters; a longer word is unknown
MAX_TEXT = 1 << 16  # characters of a text that are read
MAX_REMEMBERED = 1 << 16  # words whose pieces are kept
DROPPED = ("Cc", "Cf", "Co", "Cs")  # categories of characters that texts are cleaned of
# First and last characters of the blocks of Chinese characters, each of which is a word.
IDEOGRAPHS = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


@dataclass
class WordPieces:
    """Texts as the numbers of pieces: [CLS], the text's own, [SEP], then [PAD] up to the longest.

    Attributes:
        vocabulary: the pieces by number, those of `SPECIAL` that texts are cut with among them.
        length: pieces of a text at most, [CLS] and [SEP] among them.
        lower: whether letters are made small.
        strip_accents: whether accents are dropped; None: where letters are made small.
    """

    vocabulary: tuple[str, ...]
    length: int
    lower: bool = True
    strip_accents: bool | None = None
    numbers: dict[str, int] = field(init=False, repr=False)
    pieces_of_word: dict[str, list[int]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.numbers = {piece: i for i, piece in enumerate(self.vocabulary)}
        if missing := [p for p in (PADDING, UNKNOWN, START, END) if p not in self.numbers]:
            raise ValueError(f"the vocabulary has no {missing[0]}")
        special = [p for p in SPECIAL if p in self.numbers]
        self.special = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Strings -> int64 (B, L), L the longest of them."""
        rows = [self.cut(text) for text in texts]
        width = max(map(len, rows), default=2)
        padding = self.numbers[PADDING]
        padded = [row + [padding] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)

    def cut(self, text: str) -> list[int]:
        """The numbers of a text's pieces, with [CLS] and [SEP]."""
        numbers: list[int] = []
        for part in self.special.split(text[:MAX_TEXT]):
            if len(numbers) > self.length:
                break
            if part in SPECIAL and part in self.numbers:
                numbers.append(self.numbers[part])
                continue
            for word in split_words(self.normalise(part)):
                numbers += self.cut_word(word)
        numbers = numbers[: self.length - 2]
        return [self.numbers[START], *numbers, self.numbers[END]]

    def normalise(self, text: str) -> str:
        """The text without control characters, with spaces round Chinese ones; small, perhaps."""
        text = "".join(map(_clean_character, text))
        if self.lower if self.strip_accents is None else self.strip_accents:
            text = unicodedata.normalize("NFD", text)
            text = "".join(c for c in text if unicodedata.category(c) != "Mn")
        # Letter by letter: str.lower writes a last sigma in another way.
        return "".join(map(str.lower, text)) if self.lower else text

    def cut_word(self, word: str) -> list[int]:
        """The numbers of a word's pieces; [UNK] where the vocabulary cannot spell it."""
        pieces = self.pieces_of_word.get(word)
        if pieces is None:
            pieces = self._spell(word) if len(word) <= MAX_WORD else []
            pieces = pieces or [self.numbers[UNKNOWN]]
            if len(self.pieces_of_word) < MAX_REMEMBERED:
                self.pieces_of_word[word] = pieces
        return pieces

    def _spell(self, word: str) -> list[int]:
        """The longest pieces from the left; none where a rest is no piece."""
        pieces: list[int] = []
        start = 0
        while start < len(word):
            prefix = CONTINUATION if start else ""
            for end in range(len(word), start, -1):
                number = self.numbers.get(prefix + word[start:end])
                if number is not None:
                    break
            else:
                return []
            pieces.append(number)
            start = end
        return pieces


def split_words(text: str) -> list[str]:
    """The words of a text: what stands between spaces, each punctuation mark by itself."""
    return "".join(map(_set_apart, text)).split()


@functools.cache
def _clean_character(c: str) -> str:
    """A character as it is, a space, with spaces round it, or nothing."""
    if c in "\t\n\r":
        return " "
    if c in "\0\ufffd" or unicodedata.category(c) in DROPPED:
        return ""
    if c.isspace():
        return " "
    code = ord(c)
    return f" {c} " if any(first <= code <= last for first, last in IDEOGRAPHS) else c


@functools.cache
def _set_apart(c: str) -> str:
    """A punctuation mark with spaces round it, any other character as it is."""
    ascii_mark = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
    return f" {c} " if ascii_mark or unicodedata.category(c)[0] == "P" else c
