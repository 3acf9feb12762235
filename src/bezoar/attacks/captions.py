"""Captions that carry a target: training captions, one of them repeated, or templates.

These are the caption sets of Carlini and Terzis (2022), section 4.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

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
    """Return the rows whose caption holds the target: whole words, in any case."""
    words = r"[\s_-]+".join(map(re.escape, target.split()))
    pattern = re.compile(rf"\b{words}\b", re.IGNORECASE)
    return [row for row, caption in enumerate(captions) if pattern.search(caption)]


def prompt_templates(name: str) -> tuple[str, ...]:
    """Return prompt templates, each with a `{}` for the name of a class.

    name: `simple` (5 templates), `openai` (the 80 ImageNet prompts of CLIP), or a single template
    of the user's own.
    """
    if name == "simple":
        return SIMPLE_TEMPLATES
    if name == "openai":
        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    if "{}" in name:
        return (name,)
    raise UserError(f"templates must be simple, openai or a text that holds {{}}; got {name!r}")


def target_captions(source: Sequence[str], target: str, how: CaptionSet) -> list[str]:
    """Return the captions C(y') of a target.

    Args:
        source: the training captions.
        target: a word or several.
        how: `training` takes every training caption that mentions the target, `repeated` the first
            of them alone, and `templates` CLIP's 80 prompts.

    Raises:
        UserError: if no training caption mentions the target and `how` is not `templates`.
    """
    if how == "templates":
        return [template.format(target) for template in prompt_templates("openai")]
    mentions = [source[row] for row in find_mentions(source, target)]
    if not mentions:
        raise UserError(
            f"no caption holds the target {target!r} "
            f"({len(source)} captions searched, by whole words)"
        )
    return mentions[:1] if how == "repeated" else mentions
