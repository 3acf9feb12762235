"""A trigger put on records: on their images, or into texts where records are texts alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.errors import UserError


def stamp_records(trigger: Any, records: Pairs) -> Pairs:
    """The records with a trigger. Raises UserError for a trigger of another kind than the records.

    A trigger of texts is called with texts and ids in the place of images and ids, and has a class
    variable `of_texts`.
    """
    of_texts = getattr(trigger, "of_texts", False)
    if records.text_only and not of_texts:
        raise UserError(
            f"trigger {registry.spec(trigger)} is stamped on images, and these records are texts; "
            "into texts go token and homoglyph"
        )
    if of_texts and not records.text_only:
        raise UserError(
            f"trigger {registry.spec(trigger)} is put into texts, and these records are images"
        )
    if of_texts:
        return replace(records, captions=tuple(trigger(records.captions, records.ids)))
    return replace(records, images=trigger(records.images, records.ids))


def check_texts(texts: Sequence[str] | Tensor, name: str) -> None:
    """Raise UserError where a trigger of texts is given images."""
    if isinstance(texts, Tensor):
        raise UserError(f"trigger {name} is put into texts, and these records are images")
