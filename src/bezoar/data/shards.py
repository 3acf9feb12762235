"""Writes shards: webdataset tars in img2dataset's layout.

A record is the consecutive members `KEY.jpg|jpeg|png|webp`, `KEY.txt` (the caption) and `KEY.json`
(further facts).
"""

import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bezoar.data.blocks import blocks
from bezoar.data.files.image_parts import open_picture
from bezoar.data.files.images import DECODING_ERRORS, FORMATS, decode_image
from bezoar.data.files.skipped import Unreadable
from bezoar.data.files.writing import whole_file
from bezoar.data.pairs import Batched, Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.data.strings import Strings
from bezoar.errors import UserError
from bezoar.progress import Progress

PACKED_RECORDS = 1000  # of a shard of images that keep their bytes
EXTENSIONS_BY_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class CleanCopy:
    """How many shards and records were written."""

    shards: int
    records: int


@contextmanager
def open_shard(path: Path, format: int = tarfile.USTAR_FORMAT) -> Iterator[tarfile.TarFile]:
    """Open a tar to be written; it appears under its name only when it is complete."""
    with whole_file(path, "wb") as file, tarfile.open(fileobj=file, mode="w", format=format) as tar:
        yield tar


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file without owner and time, so that the same records give the same bytes."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def write_shards(
    folder: Path,
    source: Batched | Iterable[Pairs],
    per_shard: int = 1000,
    format: str = "png",
) -> list[Path]:
    """Write records with captions as shards. The same records give the same bytes.

    Args:
        folder: the folder, which must hold no tars: mixed sets would be read as one.
        source: Pairs, any source, or batches.
        per_shard: records of a shard.
        format: `png` (exact), `jpeg` (quality 95) or `jpeg:QUALITY`.

    Returns:
        The shards. Their JSON holds each record's id, so that reading them gives the same ids.

    Raises:
        UserError: if the folder holds tars, the format is unknown, or records have no captions.
    """
    name, quality = _parse_format(format)
    if per_shard < 1:
        raise ValueError(f"per_shard must be at least 1; got {per_shard}")
    if sorted(folder.glob("*.tar")):
        raise UserError(f"{folder} holds .tar files already; choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    parts = source if isinstance(source, Iterable) else source.batches(min(per_shard, 1024))
    records = ((part, row) for part in parts for row in range(len(part)))
    paths: list[Path] = []
    while first := next(records, None):
        path = folder / f"{len(paths):05d}.tar"
        rest = itertools.islice(records, per_shard - 1)
        with open_shard(path) as tar:
            for number, (part, row) in enumerate(itertools.chain([first], rest)):
                key = f"{len(paths):05d}{number:04d}"
                members = _encode_record(part, row, key, name, quality)
                for extension, content in sorted(members.items()):
                    add_member(tar, f"{key}.{extension}", content)
        paths.append(path)
    return paths


def _encode_record(part: Pairs, row: int, key: str, name: str, quality: int) -> dict[str, bytes]:
    """Encode one record: extension -> content."""
    if not part.captions:
        raise UserError("records without captions cannot be written as shards")
    buffer = io.BytesIO()
    picture = Image.fromarray(part.images[row].permute(1, 2, 0).contiguous().cpu().numpy())
    picture.save(buffer, name, **({"quality": quality, "subsampling": 0} if name == "jpeg" else {}))
    caption = part.captions[row]
    metadata: dict[str, Any] = {
        "key": key,
        "record_id": part.ids[row],
        "status": "success",
        "caption": caption,
        "width": picture.width,
        "height": picture.height,
    }
    label = -1 if part.labels is None else int(part.labels[row])
    if label >= 0:
        metadata["label"] = label
        if part.classes:
            metadata["class"] = part.classes[label]
    return {
        "jpg" if name == "jpeg" else name: buffer.getvalue(),
        "txt": caption.encode(),
        "json": json.dumps(metadata).encode(),
    }


def _parse_format(text: str) -> tuple[str, int]:
    """Return Pillow's name of a format, and the quality."""
    name, colon, quality = text.partition(":")
    if name not in ("png", "jpeg") or (colon and (name == "png" or not quality.isdecimal())):
        raise UserError(f"format must be png, jpeg or jpeg:QUALITY; got {text!r}")
    number = int(quality or 95)
    if not 1 <= number <= 100:
        raise UserError(f"jpeg quality must lie in 1..100; got {number}")
    return name, number


def pack_records(
    folder: Path,
    records: StoredPairs,
    urls: Strings,
    kept_rows: np.ndarray,
    place_of: Callable[[int], str],
    progress: Progress,
) -> CleanCopy:
    """Write some stored records as shards; JPEG, PNG and WebP images keep their bytes.

    Args:
        folder: the folder of the shards.
        records: the records.
        urls: URLs of the records.
        kept_rows: rows of the records to write.
        place_of: the place of a record, for error messages.
        progress: called after each shard.

    Raises:
        UserError: if the records have no captions, or an image can no longer be read.
    """
    if not len(records.captions):
        raise UserError(
            "records without captions cannot be written as shards; keep.txt and keep.csv name what "
            "is kept"
        )
    parts = blocks(len(kept_rows), PACKED_RECORDS)
    for shard, part in enumerate(parts):
        progress.step(part.start, len(kept_rows), "writing shards")
        with open_shard(folder / f"{shard:05d}.tar") as tar:
            for number, row in enumerate(kept_rows[part].tolist()):
                try:
                    extension, image = _read_for_shard(records, row)
                except (Unreadable, *DECODING_ERRORS) as error:
                    raise UserError(f"{place_of(row)} can no longer be read: {error}") from error
                key = f"{shard:05d}{number:04d}"
                add_member(tar, f"{key}.{extension}", image)
                add_member(tar, f"{key}.json", _describe_record(records, urls, row, key))
                add_member(tar, f"{key}.txt", records.captions[row].encode())
    return CleanCopy(len(parts), len(kept_rows))


def _read_for_shard(records: StoredPairs, row: int) -> tuple[str, bytes]:
    """Return extension and content of a record's image; formats unusual in shards become PNG."""
    shard, offset, length, _ = records.places[row].tolist()
    content = records.reader.read(shard, offset, length)
    with open_picture(content, FORMATS) as picture:
        extension = EXTENSIONS_BY_FORMAT.get(picture.format or "")
    if extension:
        return extension, content
    buffer = io.BytesIO()
    Image.fromarray(decode_image(content, None).transpose(1, 2, 0)).save(buffer, "PNG")
    return "png", buffer.getvalue()


def _describe_record(records: StoredPairs, urls: Strings, row: int, key: str) -> bytes:
    """The JSON of a record."""
    metadata: dict[str, Any] = {
        "key": key,
        "record_id": records.ids[row],
        "caption": records.captions[row],
    }
    if urls[row]:
        metadata["url"] = urls[row]
    if records.labels is not None and (label := int(records.labels[row])) >= 0:
        metadata |= {"label": label, "class": records.classes[label]}
    return json.dumps(metadata).encode()
