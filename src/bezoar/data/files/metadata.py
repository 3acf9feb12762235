"""The JSON object that stands beside an image, as img2dataset and `write_shards` write it."""

import ipaddress
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from bezoar.data.files.skipped import Unreadable

MAX_CAPTIONS = 1000  # of an image
MAX_CHARACTERS = 1 << 14  # of a caption, an id or an address
# Keys and columns that say who or what a record comes from, the first that is there.
ORIGIN_COLUMNS = (
    "source", "domain", "uploader", "user", "owner", "author", "site", "publisher", "host",
)  # fmt: skip
HASHES = {"sha256": 64, "md5": 32, "sha512": 128}  # name -> hexadecimal digits
MAX_LABELS = 100_000  # labels lie in 0..MAX_LABELS-1


HOST = r"^[A-Za-z][A-Za-z0-9+.\-]*://(?:[^/?#@]*@)?(?P<host>\[[^\]/?#]*\]|[^/?#:]*)"
# Below a country's ending of two letters these are endings too: example.co.uk is a domain.
SECOND_LEVEL = frozenset(("ac", "co", "com", "edu", "gov", "gob", "go", "ne", "net", "or", "org"))


class Metadata(NamedTuple):
    """What the object says of a record; empty texts and -1 stand for nothing."""

    id: str  # the record's own id, `record_id`
    captions: tuple[str, ...]  # one or several; one empty text if there is none
    label: int  # number of the class
    class_name: str  # name of the class
    url: str  # where the image came from
    origin: str = ""  # who or what it came from: a domain, an uploader


def parse_metadata(content: bytes, origins: Sequence[str] = ORIGIN_COLUMNS) -> Metadata | str:
    """Parse an object, or say why it cannot be used. origins: keys that may hold the origin."""
    values = _parse_object(content)
    if isinstance(values, str):
        return values
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
    return describe_long_text(*texts) or metadata


class Recorded(NamedTuple):
    """What img2dataset recorded of an image when it stored it."""

    hashes: dict[str, str]  # of the bytes that were downloaded, by their names in `HASHES`
    size: tuple[int, int] | None  # width and height as stored; None where they are not stated
    original: tuple[int, int] | None  # the same as downloaded
    phash: str  # a perceptual hash of 64 bits in hexadecimal digits; empty without one
    status: str  # `success`, or what went wrong; empty if it is not stated


def parse_recorded(content: bytes) -> Recorded | None:
    """Parse what an object records; what is of another form is left out, and None is no object."""
    values = _parse_object(content)
    if isinstance(values, str):
        return None
    hashes = {name: _text(values, name).lower() for name in HASHES}
    phash = _text(values, "phash").lower()
    status = _text(values, "status")
    return Recorded(
        {k: v for k, v in hashes.items() if re.fullmatch(rf"[0-9a-f]{{{HASHES[k]}}}", v)},
        _sides(values, "width", "height"),
        _sides(values, "original_width", "original_height"),
        phash if re.fullmatch(r"[0-9a-f]{16}", phash) else "",
        status[:40] if is_unicode(status) else "?",
    )


def _sides(values: dict[str, Any], *names: str) -> tuple[int, int] | None:
    """Two sides in pixels; None for what is none."""
    sides = [int(v) for v in map(values.get, names) if v is not None and is_label(v) and v > 0]
    return (sides[0], sides[1]) if len(sides) == len(names) == 2 else None


def registrable_domain(host: str) -> str:
    """The part of a host's name that somebody buys: `example.co.uk` of `img.example.co.uk`.

    Without the public suffix list, which changes by the week: two labels, or three where the
    second last is one of the usual ones below a country's ending.
    """
    host = host.strip("[]").rstrip(".").lower()
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    count = 2
    if len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in SECOND_LEVEL:
        count = 3
    return ".".join(labels[-count:])


def is_label(value: Any) -> bool:
    """Tell whether a value is the number of a class, or -1 for none."""
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < MAX_LABELS


def is_unicode(text: str) -> bool:
    """Tell whether text is Unicode without NUL, which UTF-16 that is read as UTF-8 is full of."""
    try:
        text.encode()  # a loop over megabytes would take seconds
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def describe_long_text(*texts: str) -> str:
    """Say how long the longest text is, if that is too long; else nothing.

    In a compressed table thousands of rows may share one text of megabytes.
    """
    longest = max(map(len, texts), default=0)
    return f"text too large: {longest} characters" if longest > MAX_CHARACTERS else ""


def choose_caption(text: bytes, metadata: Metadata) -> str:
    """The caption in a text file, else the first of the metadata; empty if there is none.

    Raises Unreadable for a text file in another encoding than UTF-8, and for a caption that is too
    long.
    """
    caption = text.decode("utf-8-sig", "surrogateescape").strip()
    if not is_unicode(caption):
        raise Unreadable("caption is not UTF-8")
    if too_long := describe_long_text(caption):
        raise Unreadable(too_long)
    return caption or metadata.captions[0].strip()


def _parse_object(content: bytes) -> dict[str, Any] | str:
    """Parse a JSON object, or say what it is not."""
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError):
        return "metadata is not JSON"
    return values if isinstance(values, dict) else "metadata is not a JSON object"


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) else ""
