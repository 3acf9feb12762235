"""Usual filters: what people already put web corpora through, and which poisons pass it.

LAION-400M and LAION-5B (Schuhmann et al. 2021, 2022): cosine of image and caption above a
threshold, 0.26 to 0.30, which left about a tenth of the pairs; captions of five characters and
more. DataComp (Gadre et al. 2023): its basic filter (English, captions over two words and five
characters, smaller side over 200 pixels, aspect ratio under 3) and the 30 % with the highest
cosine. Thresholds belong to the model that gives the cosines, so the *shares* they keep are taken
here. De-duplication keeps the first of each.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bezoar.detection.detectors import Records, caption_cosines
from bezoar.encoders.encoder import EmbeddedRecords, split_words
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, proportion

COSINE_SHARES = {"clip_score_30": 0.3, "clip_score_10": 0.1}  # DataComp's and LAION's
MIN_SIDE, MAX_ASPECT = 200, 3.0
MIN_WORDS, MIN_CHARACTERS = 2, 5  # captions must be longer than that
BASIC = ("language", "caption_length", "resolution", "aspect")  # DataComp's basic filter
ROWS = 1 << 16  # vectors of a block
HASH_SIDE = 8  # of the difference hash
FLAT = 4.0  # 255ths that neighbouring means must differ by on average, or the hash says nothing
MAX_CHARACTERS = 4096  # of a caption that are looked at
# the commonest words of English: a caption of a sentence's length without any is not taken for
# English
FUNCTION_WORDS = re.compile(
    r"\b(an?|the|of|in|on|at|with|and|or|to|for|from|by|is|are|was|were|be|as|its?|this|that|these|those|his|her|their|my|our)\b"
)
SENTENCE_WORDS = 6  # words from which a function word is expected


@dataclass(frozen=True)
class Filter:
    """A filter over N records."""

    name: str
    description: str  # what it keeps
    passes: NDArray[np.bool_] | None  # bool (N,), or None where it cannot be applied
    why: str = ""  # the reason for that


def apply_filters(
    source: Records,
    embedded: EmbeddedRecords | None = None,
    sizes: NDArray[np.float64] | None = None,
    pixels: bool = True,
) -> list[Filter]:
    """Every filter over the records.

    Args:
        embedded: Their image and caption vectors, if there are any.
        sizes: (N, 2), width and height as stored, 0 where they are not known.
        pixels: Whether the source has images.

    Raises:
        UserError: When the vectors are of other records.
    """
    captions = source.captions if len(source.captions) == len(source.ids) else ()
    filters = filter_by_cosine(embedded, source.ids)
    filters.append(filter_duplicate_images(source) if pixels else _duplicate_images(None))
    filters += filter_by_size(sizes)
    filters += filter_by_caption(captions)
    applied = [f for f in filters if f.passes is not None]
    basic = [f for f in applied if f.name in BASIC]
    most = [f for f in applied if f.name != "clip_score_10"]
    return [*filters, _combine("datacomp_basic", basic), _combine("all", most)]


def _combine(name: str, parts: Sequence[Filter]) -> Filter:
    """Keeps what all parts keep."""
    description = f"all of: {', '.join(f.name for f in parts)}"
    passes = [f.passes for f in parts if f.passes is not None]
    if not passes:
        return Filter(name, description, None, "none applies")
    return Filter(name, description, np.logical_and.reduce(passes))


def measure_filters(filters: Sequence[Filter], truth: NDArray[np.bool_]) -> dict[str, Measure]:
    """The share of clean records and of poisons that pass. truth: bool (N,), True = poison."""
    measures: dict[str, Measure] = {}
    if not truth.any() or truth.all():
        return measures
    for f in filters:
        if f.passes is None:
            continue
        for key, group, what in (
            ("clean_kept", ~truth, "clean records kept"),
            ("poisons_pass", truth, "poisons that pass"),
        ):
            passing, total = int(f.passes[group].sum()), int(group.sum())
            how = f"{what} by: {f.description}"
            measures[f"filter.{f.name}.{key}"] = proportion(passing, total, how)
    return measures


def filter_by_cosine(embedded: EmbeddedRecords | None, ids: Sequence[str]) -> list[Filter]:
    """The records whose image and caption agree most."""
    descriptions = {
        name: f"the {share:.0%} of all records with the highest cosine of image and caption"
        for name, share in COSINE_SHARES.items()
    }
    if embedded is None or embedded.texts is None:
        return [Filter(name, d, None, "no vectors of captions") for name, d in descriptions.items()]
    if len(embedded.ids) != len(ids) or any(a != b for a, b in zip(embedded.ids, ids, strict=True)):
        raise UserError("the filters need the vectors of the same records, in their order")
    cosines = caption_cosines(embedded, "filters").double().numpy()
    return [
        Filter(name, d, cosines >= np.quantile(cosines, 1 - COSINE_SHARES[name]))
        for name, d in descriptions.items()
    ]


def filter_duplicate_images(source: Records) -> Filter:
    """Each picture once."""
    hashes = [hash_images(batch.images) for batch in source.batches(512)]
    return _duplicate_images(np.concatenate(hashes) if hashes else None)


def _duplicate_images(hashes: NDArray[np.uint64] | None) -> Filter:
    description = (
        "the first of all pictures with one difference hash (64 bits); pictures without contrast "
        "stay"
    )
    if hashes is None:
        return Filter("image_duplicates", description, None, "no images at hand")
    return Filter("image_duplicates", description, first_of_each(hashes) | (hashes == 0))


def hash_images(images: Tensor) -> NDArray[np.uint64]:
    """uint64 (N,): which of 8 x 9 means are lighter than their left neighbours; flat images: 0."""
    light = images.float().mean(1, keepdim=True)
    steps = F.adaptive_avg_pool2d(light, (HASH_SIDE, HASH_SIDE + 1))[:, 0].diff(dim=2)
    bits = np.packbits((steps > 0).flatten(1).cpu().numpy(), axis=1)
    hashes = bits.view(">u8")[:, 0].astype(np.uint64)
    flat = steps.abs().mean((1, 2)).cpu().numpy() < FLAT
    return np.where(flat, np.uint64(0), hashes)


def filter_by_size(sizes: NDArray[np.float64] | None) -> list[Filter]:
    """Pictures that are large enough, and not too long."""
    resolution = "resolution", f"smaller side over {MIN_SIDE} pixels"
    aspect = "aspect", f"sides under {MAX_ASPECT:g} to 1"
    if sizes is None or not (sizes > 0).all():
        why = "the stored size of the pictures is not known"
        return [Filter(*resolution, None, why), Filter(*aspect, None, why)]
    small, large = sizes.min(1), sizes.max(1)
    by_aspect = Filter(*aspect, large < MAX_ASPECT * small)
    if (small <= MIN_SIDE).all():  # in a set that was made small on purpose, the filter came before
        return [Filter(*resolution, None, "all pictures are smaller"), by_aspect]
    return [Filter(*resolution, small > MIN_SIDE), by_aspect]


def filter_by_caption(captions: Sequence[str]) -> list[Filter]:
    """Each caption once; long enough; English by its letters and its commonest words."""
    descriptions = {
        "caption_duplicates": (
            "the first of all records with one caption, spelling and spaces apart"
        ),
        "caption_length": f"captions over {MIN_WORDS} words and {MIN_CHARACTERS} characters",
        "language": (
            "letters nearly all Latin without accents; in longer captions, one of the commonest "
            "English words"
        ),
    }
    if not len(captions):
        return [Filter(name, text, None, "no captions") for name, text in descriptions.items()]
    hashes = np.empty(len(captions), np.uint64)
    long, english = np.empty(len(captions), bool), np.empty(len(captions), bool)
    for i, caption in enumerate(captions):
        text = caption[:MAX_CHARACTERS]
        words = split_words(unicodedata.normalize("NFKC", text))
        hashes[i] = hash_text(" ".join(words))
        long[i] = len(caption.strip()) > MIN_CHARACTERS and len(words) > MIN_WORDS
        english[i] = is_english(text)
    passes = {
        "caption_duplicates": first_of_each(hashes),
        "caption_length": long,
        "language": english,
    }
    return [Filter(name, text, passes[name]) for name, text in descriptions.items()]


def hash_text(text: str) -> int:
    """64 bits of a text."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def first_of_each(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """bool (N,): the first of each value."""
    first = np.zeros(len(values), bool)
    first[np.unique(values, return_index=True)[1]] = True
    return first


def is_english(caption: str) -> bool:
    """A heuristic in place of a language model. A caption without letters is not English."""
    letters = [c for c in caption if c.isalpha()]
    if not letters or sum(c.isascii() for c in letters) < 0.9 * len(letters):
        return False
    return len(caption.split()) < SENTENCE_WORDS or bool(FUNCTION_WORDS.search(caption.lower()))
