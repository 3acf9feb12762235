"""Pseudo-classes: labels for records that have none, made of their captions' words or of their images' vectors.

Detectors of the supervised setting look within a class. What a class is here, nobody says; see `labels`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.data.randomness import sample_rows
from bezoar.encoders.encoder import split_words
from bezoar.errors import UserError
from bezoar.evaluation.kmeans import cluster_centres

How = Literal["auto", "words", "clusters"]
PROMPT = "a photo of a {}"
SAMPLE = (
    1 << 15
)  # records that the classes are found on; a fixed sample, so that order and number do not matter
BLOCK = 1 << 16  # records at a time
MATRICES = 1 << 26  # elements of the covariances that are summed in one pass
# words that stand in captions of anything: articles, prepositions, pronouns, auxiliaries, and what says that it is a picture
COMMON = """a about above after again all along also an and another any are around as at back be been before behind being below
beside between both but by can close could did do does down during each few for from front get gets getting had has
have having he her here his how i image in inside into is it its just large like little looking made many may more most
much near new next no not of off old on one only onto or other our out outside over own photo picture scene several she
side sits sitting small so some stands standing such than that the their them then there these they this those three
through to together too top two under until up upon very view was we were what when where which while who will with
within without would you your"""
STOP = frozenset(COMMON.split())


def labels(encoder: Any, source: Any, e: Any, how: How, count: int, seed: int) -> Tensor:
    """Pseudo-class of each record of a source, embedded as `e`: int64 (N,) on the CPU, below `count`.

    words: zero-shot, the nearest by cosine of prompts with the `count` words that most captions hold. clusters: the
    nearest of `count` centres of k-means on the image vectors. auto: words where there are captions and an encoder that
    reads them, clusters otherwise. No label is read. Raises UserError when words are asked for and there are none.
    """
    said = e.texts is not None and getattr(encoder, "text", None) is not None
    rows = sample_rows(e.ids, SAMPLE, seed)
    if how == "clusters" or (how == "auto" and not said):
        sample = e.images[torch.as_tensor(rows, device=e.images.device)].to(encoder.device).float()
        centres = cluster_centres(sample, count, seed)
    else:
        if not said:
            raise UserError(
                "pseudo-classes of words need captions and an encoder that reads them; classes=clusters do not"
            )
        found = frequent(captions(source, rows), count)
        if not found:
            raise UserError(
                "pseudo-classes of words need captions that hold some; none of these holds any but stop words"
            )
        with torch.inference_mode():
            centres = encoder.encode_texts([PROMPT.format(w) for w in found])
    half = centres.square().sum(1) / 2
    return torch.cat(
        [(z @ centres.T - half).argmax(1).cpu() for z in vectors(e.images, encoder.device)]
    )


def captions(source: Any, rows: np.ndarray) -> Iterator[str]:
    """The captions of the given records, in that order where they are at hand."""
    if hasattr(source, "captions"):
        return (source.captions[int(i)] for i in rows)
    wanted, start, found = set(rows.tolist()), 0, []
    for part in source.batches(1024):
        found += [c for i, c in enumerate(part.captions, start) if i in wanted]
        start += len(part)
    return iter(found)


def frequent(texts: Iterator[str] | Sequence[str], count: int) -> list[str]:
    """The words that most texts hold, the most frequent first, ties by letter; no stop words, numbers, words of two letters."""
    held = Counter(
        w
        for text in texts
        for w in set(split_words(text))
        if len(w) > 2 and not w.isdigit() and w not in STOP
    )
    return [w for w, _ in sorted(held.items(), key=lambda item: (-item[1], item[0]))[:count]]


def vectors(images: Tensor, device: torch.device | str) -> Iterator[Tensor]:
    """Rows of (N, D) in order, float32 on the device, a bounded number at a time."""
    return (images[rows].to(device).float() for rows in blocks(len(images), BLOCK))


def axes(
    images: Tensor, classes: Tensor, dims: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Mean (C, D) and the `dims` principal axes (C, D, dims) of each class, the largest variance first; float64.

    images: (N, D). classes: int64 (N,). Covariances are summed over blocks in float64, as many classes a pass as fit.
    """
    d, c = images.shape[1], int(classes.max()) + 1
    size = torch.bincount(classes, minlength=c).clamp(min=1).to(device)[:, None]
    means, found = torch.zeros(c, d, dtype=torch.float64, device=device), []
    for some in blocks(c, max(1, MATRICES // d**2)):
        square = torch.zeros(some.stop - some.start, d, d, dtype=torch.float64, device=device)
        for z, part in zip(vectors(images, device), classes.split(BLOCK), strict=True):
            of = part.to(device)
            for i in range(some.start, some.stop):
                own = z[of == i].double()
                means[i] += own.sum(0)
                square[i - some.start] += own.T @ own
        means[some] /= size[some]
        covariance = square / size[some, :, None] - means[some, :, None] * means[some, None]
        found.append(torch.linalg.eigh(covariance).eigenvectors[:, :, -dims:].flip(-1))
    return means, torch.cat(found)


def projections(images: Tensor, classes: Tensor, mean: Tensor, axis: Tensor) -> Tensor:
    """Each record less its class's mean on its class's axes: float32 (N, dims) on the CPU. See `axes`."""
    out = torch.empty(len(images), axis.shape[2])
    for rows, z in zip(blocks(len(images), BLOCK), vectors(images, axis.device), strict=True):
        of = classes[rows].to(axis.device)
        for i in of.unique().tolist():
            own = (of == i).nonzero()[:, 0]
            out[rows.start + own.cpu()] = ((z[own].double() - mean[i]) @ axis[i]).float().cpu()
    return out
