"""Views of captions, as token rows: EDA without a thesaurus (Wei & Zou 2019), batched. CleanCLIP's and its kin's text views."""

from __future__ import annotations

import torch
from torch import Tensor

from bezoar.encoders.encoder import Encoder, WordTokenizer
from bezoar.training.augmentation import Chance

SWAP, INSERT, DELETE = range(3)


def marked(encoder: Encoder) -> bool:
    """Whether the rows of an encoder's tokenizer begin and end with a mark, which is no word. Whole words have none."""
    return not isinstance(encoder.tokenizer, WordTokenizer)


def eda(tokens: Tensor, chance: Chance, share: float = 0.1, marks: bool = False) -> Tensor:
    """int64 (B, L), 0 = padding at the end -> the same shape; each caption with one of three changes, drawn for it.

    Of a caption of n words (the marks at both ends, where there are any, stay), with m = max(1, floor(share n)):
    swap: m times two words change places. insert: m of its words come in again, anywhere; a row without room for them is
    swapped. delete: every word goes with probability `share`, but not the last one left. EDA's fourth change, synonyms
    for words, and its insertions, which are synonyms too, would need a thesaurus.
    """
    b, width = tokens.shape
    most = max(1, int(share * width))
    change, places = chance.integers(3, b), chance.uniform(b, 2, most)
    gone = chance.uniform(b, width)
    first = int(marks)
    length = (tokens != 0).sum(1).cpu()
    n = (length - 2 * first).clamp(min=0)
    count = (share * n).floor().long().clamp(min=1) * (n > 0)
    change = torch.where((change == INSERT) & (length + count > width), SWAP, change)
    each = torch.arange(most)
    active = each < count[:, None]
    out = tokens.cpu()
    for k in range(most):
        i = (places[:, 0, k] * n).long()
        j = (i + 1 + (places[:, 1, k] * (n - 1).clamp(min=0)).long()) % n.clamp(min=1)
        out = swapped(out, first + i, first + j, (change == SWAP) & active[:, k] & (n > 1))
    # what is left is one sort: a word that goes gets a key behind all others, one that comes a key between two
    place = torch.arange(width)
    body = (place >= first) & (place < first + n[:, None])
    gone = torch.where(body, gone, 1.0)
    lost = body & (gone < share) & (gone < torch.where(body, gone, -1.0).amax(1, keepdim=True))
    lost &= (change == DELETE)[:, None]
    comes = active & (change == INSERT)[:, None]
    added = out.gather(1, (first + (places[:, 0] * n[:, None]).long()).clamp(max=width - 1))
    before = first + (places[:, 1] * (n[:, None] + 1)).long() - 0.5
    keys = torch.cat(
        [torch.where(lost, torch.inf, place.float()), torch.where(comes, before, torch.inf)], 1
    )
    every = torch.cat([out.masked_fill(lost, 0), added * comes], 1)
    return every.gather(1, keys.argsort(dim=1, stable=True)[:, :width]).to(tokens.device)


def swapped(tokens: Tensor, i: Tensor, j: Tensor, where: Tensor) -> Tensor:
    """int64 (B, L) with the words at i and j (B,) in each other's place, in the rows `where` bool (B,)."""
    i, j = (torch.where(where, p, 0)[:, None] for p in (i, j))
    return tokens.scatter(
        1, torch.cat([i, j], 1), torch.cat([tokens.gather(1, j), tokens.gather(1, i)], 1)
    )
