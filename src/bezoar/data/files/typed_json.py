"""JSON that others wrote, as values of the types it is to have."""

import dataclasses
import typing
from typing import Any, TypeVar

MAX_TEXT = 4096  # characters
MAX_ENTRIES = 100_000
MAX_NUMBER = 1e300
T = TypeVar("T")


def dataclass_from_json(cls: type[T], raw: object, where: str, longest: int = MAX_TEXT) -> T:
    """Make a dataclass from a JSON object that has no other keys than its fields.

    Args:
        cls: its fields are dataclasses, tuples of one type, texts, numbers and truth values, or one
            of these or None.
        raw: as `json.loads` gives it, whoever wrote the text.
        where: what the object is called in messages.
        longest: characters of a text.

    Raises:
        ValueError: for JSON of another form; it says where.
    """
    hints = typing.get_type_hints(cls)
    if not isinstance(raw, dict) or raw.keys() - hints.keys():
        raise ValueError(f"{where} must be an object of {', '.join(hints)}")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # a dataclass
        if field.default is dataclasses.MISSING and field.name not in raw:
            raise ValueError(f"{where} has no {field.name}")
    values = {k: _value_from_json(hints[k], v, f"{where}.{k}", longest) for k, v in raw.items()}
    return cls(**values)


def _value_from_json(hint: Any, raw: Any, where: str, longest: int) -> Any:
    """Make a value of a type: a dataclass, a tuple of one type, a text, a number or a truth value,
    or of one of two types.
    """
    if type(None) in (options := typing.get_args(hint)):
        if raw is None:
            return None
        hint = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return dataclass_from_json(hint, raw, where, longest)
    if typing.get_origin(hint) is tuple:
        if not isinstance(raw, list) or len(raw) > MAX_ENTRIES:
            raise ValueError(f"{where} must be a list of at most {MAX_ENTRIES}")
        item = typing.get_args(hint)[0]
        values = enumerate(raw)
        return tuple(_value_from_json(item, v, f"{where}[{i}]", longest) for i, v in values)
    if hint is str:
        if not isinstance(raw, str) or len(raw) > longest:
            raise ValueError(f"{where} must be a text of at most {longest} characters")
        return raw
    if hint is bool:
        if not isinstance(raw, bool):
            raise ValueError(f"{where} must be true or false")
        return raw
    # NaN fails the comparison too
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not abs(raw) < MAX_NUMBER:
        raise ValueError(f"{where} must be a finite number")
    if hint is int and raw != int(raw):
        raise ValueError(f"{where} must be a whole number")
    return int(raw) if hint is int else float(raw)
