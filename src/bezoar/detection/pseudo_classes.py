"""Pseudo-classes: labels for records that have none, made of the words of their captions or of the
vectors of their images.

Detectors of the supervised setting look within a class; `assign_classes` says what stands for one
here.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from bezoar.data.blocks import blocks
from bezoar.data.randomness import sample_rows
from bezoar.detection.detectors import RecordEncoder, Records, read_captions
from bezoar.encoders.encoder import EmbeddedRecords, split_words
from bezoar.errors import UserError
from bezoar.evaluation.kmeans import cluster_centres, nearest_centres

ClassKind = Literal["auto", "words", "clusters"]
PROMPT = "a photo of a {}"
SAMPLE = 1 << 15  # records that the classes are found on; the order of all does not matter then
BLOCK = 1 << 16  # records at a time
MATRIX_VALUES = 1 << 26  # elements of the covariances that are summed in one pass
# words that captions of anything hold: articles, prepositions, pronouns, auxiliaries, and those
# that say it is a picture
COMMON = """
a about above after again all along also an and another any are around as at back be been before
behind being below beside between both but by can close could did do does down during each few for
from front get gets getting had has have having he her here his how i image in inside into is it
its just large like little looking made many may more most much near new next no not of off old on
one only onto or other our out outside over own photo picture scene several she side sits sitting
small so some stands standing such than that the their them then there these they this those three
through to together too top two under until up upon very view was we were what when where which
while who will with within without would you your
"""
STOP_WORDS = frozenset(COMMON.split())


def assign_classes(
    encoder: RecordEncoder,
    source: Records,
    embedded: EmbeddedRecords,
    kind: ClassKind,
    count: int,
    seed: int,
) -> Tensor:
    """The pseudo-class of each record. No label is read.

    Args:
        encoder: Embedded the records.
        embedded: Their vectors.
        kind: words: the nearest, by cosine, of prompts with the `count` words that most captions
            hold. clusters: the nearest of `count` centres of k-means on the image vectors. auto:
            words where there are captions and an encoder that reads them, clusters otherwise.
        count: Classes at most.

    Returns:
        int64 (N,) on the CPU, below `count`.

    Raises:
        UserError: When words are asked for and there are none.
    """
    readable = embedded.texts is not None and getattr(encoder, "text", None) is not None
    rows = sample_rows(embedded.ids, SAMPLE, seed)
    if kind == "clusters" or (kind == "auto" and not readable):
        sample = embedded.images[torch.as_tensor(rows, device=embedded.images.device)]
        centres = cluster_centres(sample.to(encoder.device).float(), count, seed)
    elif not readable:
        raise UserError(
            "pseudo-classes of words need captions and an encoder that reads them; "
            "classes=clusters do not"
        )
    else:
        captions = read_captions(source)
        words = frequent_words((captions[i] for i in rows.tolist()), count)
        if not words:
            raise UserError(
                "pseudo-classes of words need captions that hold some; none of these holds any but "
                "stop words"
            )
        with torch.inference_mode():
            centres = encoder.encode_texts([PROMPT.format(word) for word in words])
    return assign_centres(embedded.images, centres)


def assign_centres(vectors: Tensor, centres: Tensor) -> Tensor:
    """The nearest of (K, D) centres to vectors (N, D), even of a file: int64 (N,) on the CPU."""
    blocks_of_rows = vector_blocks(vectors, centres.device)
    return torch.cat([nearest_centres(z, centres).cpu() for z in blocks_of_rows])


def frequent_words(texts: Iterable[str], count: int) -> list[str]:
    """The words that most texts hold, the most frequent first, ties in alphabetical order.

    Stop words, numbers and words of fewer than three letters do not count.
    """
    holders = Counter(
        word
        for text in texts
        for word in set(split_words(text))
        if len(word) > 2 and not word.isdigit() and word not in STOP_WORDS
    )
    return sorted(holders, key=lambda word: (-holders[word], word))[:count]


def vector_blocks(vectors: Tensor, device: torch.device | str) -> Iterator[Tensor]:
    """Rows of (N, D) in order, float32 on the device, a bounded number at a time."""
    return (vectors[rows].to(device).float() for rows in blocks(len(vectors), BLOCK))


def principal_axes(
    images: Tensor, classes: Tensor, dims: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """The mean and the principal axes of each class.

    Covariances are summed over blocks in float64, for as many classes a pass as fit in memory.

    Args:
        images: (N, D).
        classes: int64 (N,), below C.
        dims: Axes of each class.
        device: Where to compute.

    Returns:
        Means (C, D) and axes (C, D, dims), the axis of the largest variance first; float64.
    """
    d, count = images.shape[1], int(classes.max()) + 1
    sizes = torch.bincount(classes, minlength=count).clamp(min=1).to(device)[:, None]
    means = torch.zeros(count, d, dtype=torch.float64, device=device)
    axes = []
    for part in blocks(count, max(1, MATRIX_VALUES // d**2)):
        products = torch.zeros(part.stop - part.start, d, d, dtype=torch.float64, device=device)
        for z, labels in zip(vector_blocks(images, device), classes.split(BLOCK), strict=True):
            class_of = labels.to(device)
            for i in range(part.start, part.stop):
                members = z[class_of == i].double()
                means[i] += members.sum(0)
                products[i - part.start] += members.T @ members
        means[part] /= sizes[part]
        outer = means[part, :, None] * means[part, None]
        covariance = products / sizes[part, :, None] - outer
        axes.append(torch.linalg.eigh(covariance).eigenvectors[:, :, -dims:].flip(-1))
    return means, torch.cat(axes)


def project_records(images: Tensor, classes: Tensor, means: Tensor, axes: Tensor) -> Tensor:
    """Each record less the mean of its class, on the axes of its class: float32 (N, dims) on the
    CPU.

    The other arguments and `means`, `axes` are those of `principal_axes`.
    """
    projections = torch.empty(len(images), axes.shape[2])
    row_blocks = blocks(len(images), BLOCK)
    for rows, z in zip(row_blocks, vector_blocks(images, axes.device), strict=True):
        class_of = classes[rows].to(axes.device)
        for i in class_of.unique().tolist():
            members = (class_of == i).nonzero()[:, 0]
            y = (z[members].double() - means[i]) @ axes[i]
            projections[rows.start + members.cpu()] = y.float().cpu()
    return projections
