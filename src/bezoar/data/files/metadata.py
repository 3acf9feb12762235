"""The JSON object that stands beside an image, as img2dataset and `write_shards` write it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

MAX_CAPTIONS = 1000  # of an image
# Keys and columns that say who or what a record comes from, the first that is there.
ORIGIN_COLUMNS = (
    "source", "domain", "uploader", "user", "owner", "author", "site", "publisher", "host",
)  # fmt: skip
MAX_LABELS = 100_000  # labels lie in 0..MAX_LABELS-1


class Metadata(NamedTuple):
    """What the object says of a record; empty texts and -1 stand for nothing.

    Attributes:
        id: the record's own id, `record_id`.
        captions: one or several; one empty text if there is none.
        label: number of the class.
        class_name: name of the class.
        url: where the image came from.
        origin: who or what it came from: a domain, an uploader.
    """

    id: str
    captions: tuple[str, ...]
    label: int
    class_name: str
    url: str
    origin: str = ""


def parse_metadata(content: bytes, origins: Sequence[str] = ORIGIN_COLUMNS) -> Metadata | str:
    """Parse an object, or say why it cannot be used. origins: keys that may hold the origin."""
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError):
        return "metadata is not JSON"
    if not isinstance(values, dict):
        return "metadata is not a JSON object"
    label = values.get("label")
    if label is not None and not is_label(label):
        return f"label is not a number from 0 to {MAX_LABELS - 1}"
    several = values.get("captions")
    captions = [c for c in several if isinstance(c, str)] if isinstance(several, list) else []
    if len(captions) > MAX_CAPTIONS:
        return f"more than {MAX_CAPTIONS} captions: {len(captions)}"
    captions = captions or [_text(values, "caption")]
    metadata = Metadata(
        id=_text(values, "record_id"),
        captions=tuple(captions),
        label=-1 if label is None else label,
        class_name=_text(values, "class"),
        url=_text(values, "url"),
        origin=next(filter(None, (_text(values, key) for key in origins)), ""),
    )
    texts = (metadata.class_name, metadata.id, metadata.url, metadata.origin, *captions)
    if not all(map(is_unicode, texts)):
        return "metadata is not Unicode"  # JSON can spell half a character
    return metadata


def is_label(value: Any) -> bool:
    """Tell whether a value is the number of a class, or -1 for none."""
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < MAX_LABELS


def is_unicode(text: str) -> bool:
    """Tell whether text is Unicode: it holds no lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) else ""
