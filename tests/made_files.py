"""Encoded pictures and tars, as the tests of several wings write them."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encode(picture: Image.Image, name: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture in a format of Pillow's."""
    out = io.BytesIO()
    picture.save(out, name, **options)
    return out.getvalue()


def random_picture(
    seed: int = 0, side: int = 16, name: str = "PNG", height: int | None = None
) -> bytes:
    """An encoded picture of random pixels; square without a height."""
    shape = (height or side, side, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return encode(Image.fromarray(pixels), name)


def add_members(
    tar: tarfile.TarFile, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]
) -> None:
    """Add regular members to a tar."""
    for name, content in members.items() if isinstance(members, Mapping) else members:
        header = tarfile.TarInfo(name)
        header.size = len(content)
        tar.addfile(header, io.BytesIO(content))


def tar_of(
    path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], **options: Any
) -> Path:
    """Write a tar of regular members."""
    with tarfile.open(path, "w", **options) as tar:
        add_members(tar, members)
    return path
