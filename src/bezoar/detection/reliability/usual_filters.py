"""Cleaning: the filters that people already put web corpora through, and which poisons pass them.

LAION-400M and LAION-5B (Schuhmann et al. 2021, 2022): cosine of image and caption above a threshold, 0.26 to 0.30, which left
about a tenth of the pairs; captions of five characters and more. DataComp (Gadre et al. 2023): its basic filter (English,
captions over two words and five characters, smaller side over 200 pixels, aspect ratio under 3) and the 30 % with the highest
cosine. Thresholds belong to the model that gives the cosines, so the *shares* they keep are taken here. De-duplication
keeps the first of each.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.encoders.encoder import EmbeddedRecords, split_words
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, proportion

SHARES = {"clip_score_30": 0.3, "clip_score_10": 0.1}  # DataComp's and LAION's
SMALLER_SIDE, ASPECT = 200, 3.0
WORDS, CHARACTERS = 2, 5  # captions must be longer than that
ROWS = 1 << 16  # vectors of a block
HASH = (8, 8)  # of the difference hash
FLAT = 4.0  # 255ths that neighbouring means must differ by on average, or the hash says nothing
# the commonest words of English: a caption of a sentence's length without any is not taken for English
FUNCTION = re.compile(
    r"\b(an?|the|of|in|on|at|with|and|or|to|for|from|by|is|are|was|were|be|as|its?|this|that|these|those|his|her|their|my|our)\b"
)
SENTENCE = 6  # words from which a function word is expected


@dataclass(frozen=True)
class Filter:
    """name, what it does, and which records pass it: bool (N,), or None with the reason why it cannot be applied."""

    name: str
    told: str
    passes: np.ndarray | None
    why: str = ""


def filters(
    source: Any,
    embedded: EmbeddedRecords | None = None,
    sides: np.ndarray | None = None,
    pixels: bool = True,
) -> list[Filter]:
    """Every filter over a source's records.

    source: `batches`, as Pairs have. embedded: image and text vectors of the same records, or None. sides: (N, 2),
    width and height as stored, 0 where they are not known. pixels: whether the source has images.
    """
    ids, captions, hashes = gathered(source) if pixels else (source.ids, source.captions, None)
    out = [*by_score(embedded, ids), *of_images(hashes, sides), *of_captions(captions)]
    held = [f for f in out if f.passes is not None]
    basic = [f for f in held if f.name in ("language", "caption_length", "resolution", "aspect")]
    for name, parts in (
        ("datacomp_basic", basic),
        ("all", [f for f in held if f.name != "clip_score_10"]),
    ):
        told = f"all of: {', '.join(f.name for f in parts)}"
        passes = [f.passes for f in parts if f.passes is not None]
        out.append(
            Filter(
                name,
                told,
                np.logical_and.reduce(passes) if passes else None,
                "" if passes else "none applies",
            )
        )
    return out


def measured(found: Sequence[Filter], truth: np.ndarray) -> dict[str, Measure]:
    """Share of the clean records that each filter keeps, and of the poisons that pass it. truth: bool (N,), True = poison."""
    out: dict[str, Measure] = {}
    if not truth.any() or truth.all():
        return out
    for f in found:
        if f.passes is None:
            continue
        for key, group, what in (
            ("clean_kept", ~truth, "clean records kept"),
            ("poisons_pass", truth, "poisons that pass"),
        ):
            how = f"{what} by: {f.told}"
            out[f"filter.{f.name}.{key}"] = proportion(
                int(f.passes[group].sum()), int(group.sum()), how
            )
    return out


def notes(found: Sequence[Filter]) -> dict[str, str]:
    """Which filters could not be applied, and why."""
    return {f.name: f.why for f in found if f.passes is None}


def gathered(source: Any) -> tuple[list[str], list[str], np.ndarray | None]:
    """ids, captions (or none) and difference hashes, uint64 (N,), of all records; no hashes where there are no images."""
    ids: list[str] = []
    captions: list[str] = []
    hashes: list[np.ndarray] = []
    for part in source.batches(512):
        ids += part.ids
        captions += part.captions
        hashes.append(hashed(part.images))
    return (
        ids,
        captions if len(captions) == len(ids) else [],
        np.concatenate(hashes) if hashes else None,
    )


def hashed(images: Tensor) -> np.ndarray:
    """uint8 (N, 3, H, W) -> uint64 (N,): which of 8 x 9 means is lighter than its left neighbour; 0 where all are alike."""
    light = F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), (HASH[0], HASH[1] + 1))[
        :, 0
    ]
    step = light.diff(dim=2)
    bits = (
        np.packbits((step > 0).flatten(1).cpu().numpy(), axis=1).view(">u8")[:, 0].astype(np.uint64)
    )
    return np.where(step.abs().mean((1, 2)).cpu().numpy() < FLAT, np.uint64(0), bits)


def by_score(embedded: EmbeddedRecords | None, ids: Sequence[str]) -> list[Filter]:
    """The records whose image and caption agree most."""
    told = {
        name: f"the {share:.0%} of all records with the highest cosine of image and caption"
        for name, share in SHARES.items()
    }
    if embedded is None or embedded.texts is None:
        return [Filter(name, told[name], None, "no vectors of captions") for name in SHARES]
    if len(embedded.ids) != len(ids) or any(a != b for a, b in zip(embedded.ids, ids, strict=True)):
        raise UserError(
            "cleaning needs the vectors of the records that it is given, in their order"
        )
    cosine = torch.cat(
        [
            (z * t.to(z.device)).sum(1)
            for z, t in zip(embedded.images.split(ROWS), embedded.texts.split(ROWS), strict=True)
        ]
    )
    s = cosine.double().cpu().numpy()
    return [
        Filter(name, told[name], s >= np.quantile(s, 1 - share)) for name, share in SHARES.items()
    ]


def of_images(hashes: np.ndarray | None, sides: np.ndarray | None) -> list[Filter]:
    """Each picture once; large enough; not too long."""
    told = "the first of all pictures with one difference hash (64 bits); pictures without contrast stay"
    out = [
        Filter(
            "image_duplicates",
            told,
            None if hashes is None else first(hashes) | (hashes == 0),
            "no images at hand",
        )
    ]
    known = sides is not None and bool((sides > 0).all())
    small, large = (sides.min(1), sides.max(1)) if sides is not None else (np.zeros(0), np.zeros(0))
    why = "the stored size of the pictures is not known"
    tiny = known and bool(
        (small <= SMALLER_SIDE).all()
    )  # a set made small on purpose: the filter was before
    passes, none = (
        (None, "all pictures are smaller")
        if tiny
        else (small > SMALLER_SIDE if known else None, why)
    )
    out.append(Filter("resolution", f"smaller side over {SMALLER_SIDE} pixels", passes, none))
    out.append(
        Filter(
            "aspect", f"sides under {ASPECT:g} to 1", large < ASPECT * small if known else None, why
        )
    )
    return out


def of_captions(captions: Sequence[str]) -> list[Filter]:
    """Each text once; long enough; English by its letters and its commonest words."""
    told = {
        "caption_duplicates": "the first of all records with one caption, spelling and spaces apart",
        "caption_length": f"captions over {WORDS} words and {CHARACTERS} characters",
        "language": "letters nearly all Latin without accents; in longer captions, one of the commonest English words",
    }
    if not len(captions):
        return [Filter(name, text, None, "no captions") for name, text in told.items()]
    plain = [" ".join(split_words(unicodedata.normalize("NFKC", c[:4096]))) for c in captions]
    same = np.unique(np.array([hash_of(c) for c in plain], dtype=np.uint64), return_inverse=True)[1]
    passes = {
        "caption_duplicates": first(same),
        "caption_length": np.array(
            [
                len(c.strip()) > CHARACTERS and len(p.split()) > WORDS
                for c, p in zip(captions, plain, strict=True)
            ]
        ),
        "language": np.array([english(c[:4096]) for c in captions]),
    }
    return [Filter(name, told[name], passes[name]) for name in told]


def hash_of(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little"
    )


def first(values: np.ndarray) -> np.ndarray:
    """bool (N,): the first of each value."""
    out = np.zeros(len(values), bool)
    out[np.unique(values, return_index=True)[1]] = True
    return out


def english(caption: str) -> bool:
    """A heuristic in place of a language model: see `told`. A caption without letters is not English."""
    letters = [c for c in caption if c.isalpha()]
    if not letters or sum(c.isascii() for c in letters) < 0.9 * len(letters):
        return False
    return len(caption.split()) < SENTENCE or FUNCTION.search(caption.lower()) is not None
