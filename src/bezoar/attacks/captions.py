"""Captions that carry a target: training captions, one of them repeated, or templates.

These are the caption sets of Carlini and Terzis (2022), section 4.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

from bezoar.data.strings import Strings
from bezoar.errors import UserError

PARTS = re.compile(r"[\x00-\x7f]*[^\x00-\x7f]{0,1024}")
CaptionSet = Literal["training", "templates", "repeated"]
SIMPLE_TEMPLATES = (
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a {} in a scene",
)
# Scripts that write words without spaces between them: Thai, Lao, Tibetan, Burmese, Khmer, the
# scripts of Java and Bali, Tai scripts, kana, bopomofo, and Han with its extensions.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf"
    "\u3005-\u3007\u3021-\u312f\u31a0-\u31ff\u3400-\u9fff\ua980-\ua9df\ua9e0-\ua9ff\uaa60-\uaadf"
    "\uf900-\ufaff\uff66-\uff9f\U0001aff0-\U0001b16f\U00020000-\U0003ffff]"
)


def find_mentions(captions: Sequence[str], target: str) -> list[int]:
    """Return the rows whose caption holds the target: whole words, in any case.

    A word ends anywhere in scripts that put no spaces between words, and a sign, as in `C++`, ends
    a word too. Both sides are compared in one Unicode form (NFC).
    """
    parts = unicodedata.normalize("NFC", target).split()
    words = r"[\s_-]+".join(map(re.escape, parts))
    # A lookahead finds mentions that overlap: the first of them need not be a whole word.
    pattern = re.compile(f"(?=({words}))", re.IGNORECASE)
    rows = []
    for row, caption in _likely_captions(captions, parts):
        text = compose(caption)
        if any(_is_whole(text, *match.span(1)) for match in pattern.finditer(text)):
            rows.append(row)
    return rows


def compose(text: str) -> str:
    """Normalise a text to Unicode form NFC, in linear time.

    Python sorts runs of combining marks in quadratic time, which would take an hour for 4 MB. So
    the text is normalised in parts, which begin at an ASCII character if there is one.
    """
    return "".join(unicodedata.normalize("NFC", part) for part in PARTS.findall(text))


def _likely_captions(captions: Sequence[str], words: Sequence[str]) -> Iterable[tuple[int, str]]:
    """The captions with their rows, without some that do not hold every word.

    In ASCII, which most captions are, a mention holds every word in one case or the other: to look
    for that is much quicker than the whole search.
    """
    if not words or not all(word.isascii() for word in words):
        return enumerate(captions)
    if isinstance(captions, Strings):
        rows = captions.find_holding(words)
        return zip(rows.tolist(), captions.take(rows), strict=True)
    small = [word.lower() for word in words]
    return (
        (row, caption)
        for row, caption in enumerate(captions)
        if not caption.isascii() or all(word in caption.lower() for word in small)
    )


def _is_whole(text: str, start: int, stop: int) -> bool:
    """Whether text[start:stop] is a whole word or several, not a part of longer words."""
    if stop == start:
        return False
    begins = start == 0 or not (_joins_words(text[start - 1]) and _joins_words(text[start]))
    ends = stop == len(text) or not (_joins_words(text[stop - 1]) and _joins_words(text[stop]))
    return begins and ends


def _joins_words(character: str) -> bool:
    """Whether a character next to another such one belongs to the same word."""
    # Vowel signs of Indian scripts are marks; the marks that enclose or style emoji are not.
    is_word = (
        character.isalnum()
        or character == "_"
        or (
            unicodedata.category(character) in ("Mn", "Mc")
            and not "\ufe00" <= character <= "\ufe0f"
        )
    )
    return is_word and not UNSPACED.match(character)


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
