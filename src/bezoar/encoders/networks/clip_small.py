"""A small CLIP for CPUs: four convolutions and a bag of words (after Radford et al. 2021)."""

from collections import Counter
from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor, nn

from bezoar.encoders import small_towers
from bezoar.encoders.encoder import Encoder, Preprocess, WordTokenizer, split_words
from bezoar.encoders.networks import Network
from bezoar.encoders.small_towers import ConvTower
from bezoar.registry import method, spec


class BagOfWords(nn.Module):
    """Tokens (B, L), 0 = padding -> (B, dim): mean of word vectors, then a two-layer perceptron."""

    def __init__(self, vocabulary: int, width: int, dim: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(vocabulary + 1, width, mode="mean", padding_idx=0)
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, dim)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed captions; one without a known word counts as the zero vector."""
        z: Tensor = self.head(self.words(tokens))
        return z


@method
class ClipSmall(Network):
    """The best small CLIP we measured per second of CPU time: 17 MFLOP an image at 32 px."""

    width: Annotated[int, "channels of the first convolution; doubled three times"] = 32
    dim: Annotated[int, "size of the joint embedding"] = 128
    words: Annotated[int, "largest vocabulary, the most frequent words first"] = 8192

    def __post_init__(self) -> None:
        if min(self.width, self.dim, self.words) < 1:
            raise ValueError("width, dim and words must be at least 1")
        small_towers.check_widths(self.width, self.dim)

    def vocabulary(self, captions: Iterable[str]) -> tuple[str, ...]:
        """The `words` most frequent words of the captions; ties in alphabetical order."""
        counts = Counter(word for caption in captions for word in split_words(caption))
        return tuple(sorted(counts, key=lambda word: (-counts[word], word))[: self.words])

    def __call__(self, size: int = 0, vocabulary: tuple[str, ...] = ()) -> Encoder:
        """A fresh encoder for images of `size` pixels, 32..96."""
        if not 32 <= size <= 96:
            raise ValueError(f"images of {size} px: clip_small takes 32 to 96")
        image = ConvTower(self.width, self.dim).to(memory_format=torch.channels_last)
        text = BagOfWords(len(vocabulary), self.dim, self.dim)
        about = {"network": spec(self), "vocabulary": list(vocabulary)}
        return Encoder(image, Preprocess(size), text, WordTokenizer(vocabulary), about)
