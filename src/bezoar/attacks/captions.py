"""Captions that carry a target: found among the training captions, made from templates, or one repeated.

Carlini & Terzis (2022), section 4: caption sets of a target label.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from bezoar.errors import UserError

CaptionSet = Literal["training", "templates", "repeated"]
SIMPLE_TEMPLATES = (
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a {} in a scene",
)


def find_mentions(captions: Sequence[str], target: str) -> list[int]:
    """Rows whose caption holds the target's words, at word boundaries and in any case ('cat' is not in 'cattle')."""
    pattern = re.compile(
        r"\b" + r"[\s_-]+".join(map(re.escape, target.split())) + r"\b", re.IGNORECASE
    )
    return [i for i, c in enumerate(captions) if pattern.search(c)]


def prompt_templates(name: str) -> tuple[str, ...]:
    """A template set by name: `simple` (5), `openai` (the 80 ImageNet prompts of CLIP), or one text that holds {}."""
    if name == "simple":
        return SIMPLE_TEMPLATES
    if name == "openai":
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        return tuple(f("{}") for f in OPENAI_IMAGENET_TEMPLATES)
    if "{}" in name:
        return (name,)
    raise UserError(f"templates must be simple, openai or a text that holds {{}}; got {name!r}")


def target_captions(source: Sequence[str], target: str, how: CaptionSet) -> list[str]:
    """The captions C(y') of a target. Raises UserError when the training captions do not hold it."""
    if how == "templates":
        return [t.format(target) for t in prompt_templates("openai")]
    found = [source[i] for i in find_mentions(source, target)]
    if not found:
        raise UserError(
            f"no caption holds the target {target!r} ({len(source)} captions searched, by whole words)"
        )
    return found[:1] if how == "repeated" else found
