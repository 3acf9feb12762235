"""Views of captions, as token rows: EDA without a thesaurus (Wei & Zou 2019), batched."""

import torch
from torch import Tensor

from bezoar.encoders.encoder import Encoder, WordTokenizer
from bezoar.training.augmentation import Chance

SWAP, INSERT, DELETE = range(3)


def has_marks(encoder: Encoder) -> bool:
    """Whether an encoder's tokenizer puts special tokens at the beginning and the end of rows."""
    return not isinstance(encoder.tokenizer, WordTokenizer)


def eda(tokens: Tensor, chance: Chance, share: float = 0.1, marks: bool = False) -> Tensor:
    """Change each caption in one of three ways, drawn for it.

    Of a caption of n words, with m = max(1, floor(share n)):

    - swap: m times two words change places;
    - insert: m of its words are inserted again, anywhere; a row without room for them is swapped
      instead;
    - delete: every word is deleted with probability `share`, but not all of them.

    EDA's fourth change, synonyms for words, and its insertions, which are synonyms too, would need
    a thesaurus.

    Args:
        tokens: int64 (B, L), 0 = padding at the end.
        share: of the words that change.
        marks: whether rows begin and end with a token that is no word; these stay.

    Returns:
        int64 (B, L) on the device of `tokens`.
    """
    b, width = tokens.shape
    most = max(1, int(share * width))
    change = chance.integers(3, b)
    places = chance.uniform(b, 2, most)  # where words are taken from, and where they go
    draws = chance.uniform(b, width)  # which words are deleted
    first = int(marks)
    length = (tokens != 0).sum(1).cpu()
    n = (length - 2 * first).clamp(min=0)  # (B,), words
    count = (share * n).floor().long().clamp(min=1) * (n > 0)  # (B,), m
    change = torch.where((change == INSERT) & (length + count > width), SWAP, change)
    active = torch.arange(most) < count[:, None]  # (B, most)
    out = tokens.cpu()
    for k in range(most):
        i = (places[:, 0, k] * n).long()
        j = (i + 1 + (places[:, 1, k] * (n - 1).clamp(min=0)).long()) % n.clamp(min=1)
        swaps = (change == SWAP) & active[:, k] & (n > 1)
        out = _swap_words(out, first + i, first + j, swaps)
    # The rest is one sort: a deleted word gets a key behind all others, an inserted one a key
    # between two.
    position = torch.arange(width)
    is_word = (position >= first) & (position < first + n[:, None])  # (B, L)
    largest = torch.where(is_word, draws, -1.0).amax(1, keepdim=True)
    deleted = is_word & (draws < share) & (draws < largest) & (change == DELETE)[:, None]
    inserted = active & (change == INSERT)[:, None]  # (B, most)
    sources = (first + (places[:, 0] * n[:, None]).long()).clamp(max=width - 1)
    targets = first + (places[:, 1] * (n[:, None] + 1)).long() - 0.5
    words = torch.cat([out.masked_fill(deleted, 0), out.gather(1, sources) * inserted], 1)
    keys = torch.cat(
        [
            torch.where(deleted, torch.inf, position.float()),
            torch.where(inserted, targets, torch.inf),
        ],
        1,
    )
    order = keys.argsort(dim=1, stable=True)[:, :width]
    return words.gather(1, order).to(tokens.device)


def _swap_words(tokens: Tensor, i: Tensor, j: Tensor, mask: Tensor) -> Tensor:
    """int64 (B, L) with the words at i and j (B,) swapped, in the rows of mask, bool (B,)."""
    i, j = (torch.where(mask, place, 0)[:, None] for place in (i, j))
    swapped = torch.cat([tokens.gather(1, j), tokens.gather(1, i)], 1)
    return tokens.scatter(1, torch.cat([i, j], 1), swapped)
