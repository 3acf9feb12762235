"""BERT's tokenizer, WordPiece (Wu et al. 2016): splits words into the longest known pieces.

It gives the same tokens as the library tokenizers, which is not needed. A `tokenizer.json` with
other settings is refused, and no regular expression of a file is run.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

PADDING, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
SPECIAL = (PADDING, UNKNOWN, START, END, "[MASK]")  # not split where a text contains them
CONTINUATION = "##"  # the beginning of a piece that does not begin a word
MAX_WORD = 100  # characters; a longer word is unknown
MAX_TEXT = 1 << 16  # characters of a text that are read
MAX_REMEMBERED = 1 << 16  # words whose pieces are cached
DROPPED = ("Cc", "Cf", "Co", "Cs")  # categories of characters that are removed
# First and last characters of the blocks of Chinese characters; each of these is a word.
IDEOGRAPHS = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


@dataclass
class WordPieces:
    """Maps texts to numbers of pieces: [CLS], the text's pieces, [SEP], then [PAD]."""

    # the pieces in the order of their numbers, including the special ones
    vocabulary: tuple[str, ...]
    length: int  # most pieces of a text, including [CLS] and [SEP]
    lower: bool = True  # whether letters become lower case
    strip_accents: bool | None = None  # whether accents are removed; None means the same as `lower`
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
        """Remove control characters, put spaces around Chinese characters, and lower the case."""
        text = "".join(map(_clean_character, text))
        if self.lower if self.strip_accents is None else self.strip_accents:
            text = unicodedata.normalize("NFD", text)
            text = "".join(c for c in text if unicodedata.category(c) != "Mn")
        # Letter by letter, because str.lower treats a final sigma differently.
        return "".join(map(str.lower, text)) if self.lower else text

    def cut_word(self, word: str) -> list[int]:
        """The numbers of a word's pieces; [UNK] if the vocabulary cannot spell it."""
        pieces = self.pieces_of_word.get(word)
        if pieces is None:
            pieces = self._spell(word) if len(word) <= MAX_WORD else []
            pieces = pieces or [self.numbers[UNKNOWN]]
            if len(self.pieces_of_word) < MAX_REMEMBERED:
                self.pieces_of_word[word] = pieces
        return pieces

    def _spell(self, word: str) -> list[int]:
        """The longest pieces from left to right; empty if some part is not in the vocabulary."""
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
    """Split a text at spaces; every punctuation mark is a word of its own."""
    return "".join(map(_set_apart, text)).split()


@functools.cache
def _clean_character(c: str) -> str:
    """The replacement of a character: itself, a space, itself with spaces around it, or ""."""
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
    """Put spaces around a punctuation mark; return any other character unchanged."""
    ascii_mark = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
    return f" {c} " if ascii_mark or unicodedata.category(c)[0] == "P" else c
