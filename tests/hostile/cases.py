"""What all mutants have in common: the case itself, files of unusual kinds, and JSON with wrong
values.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READ_ALL, LEFT_OUT, REFUSED = 0, 4, 2
ESCAPES = "\x1b[31mred\x1b]0;title\x07\r\n[bold]x[/bold]\u202e\x00"


@dataclass(frozen=True)
class Mutant:
    """One spoilt input.

    words: of the command, `@` standing for the mutant's own folder. check: what is wrong with what
    the command wrote into that folder, or "".
    """

    name: str
    words: tuple[str, ...]
    make: Callable[[Path], None]
    statuses: tuple[int, ...] = (READ_ALL, REFUSED, LEFT_OUT)
    check: Callable[[Path], str] = lambda folder: ""


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_endless_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_link_out(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def as_sparse_giant(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(200 << 30)


UNUSUAL = (as_fifo, as_endless_device, as_folder, as_link_out, as_loop, as_sparse_giant)


def nested(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


VALUES: tuple[Any, ...] = (
    None,
    0,
    -1,
    1e308,
    10**400,
    True,
    "",
    "x",
    ESCAPES,
    "../../../../etc/passwd",
    "evil.py",
    [],
    {},
    [[]],
    {"x": {}},
    [None],
    "scenes:count=1000000000",
    "a" * 10_000,
    nested(500),
)


def spoilt_json(text: str, seed: int, most: int) -> Iterator[tuple[str, str]]:
    """JSON whose fields hold values of every other kind, one at a time; fields drawn at random up
    to `most`.
    """
    value = json.loads(text)
    places: list[tuple[Any, ...]] = []

    def walk(node: Any, way: tuple[Any, ...]) -> None:
        places.append(way)
        items = (
            node.items()
            if isinstance(node, dict)
            else enumerate(node)
            if isinstance(node, list)
            else ()
        )
        for key, inner in list(items)[:40]:
            walk(inner, (*way, key))

    walk(value, ())
    draw = random.Random(seed)
    cases = [(way, v) for way in places for v in range(len(VALUES))]
    for way, number in draw.sample(cases, min(most, len(cases))):
        fresh = json.loads(text)
        if not way:
            fresh = VALUES[number]
        else:
            node = fresh
            for key in way[:-1]:
                node = node[key]
            node[way[-1]] = VALUES[number]
        yield f"{'.'.join(map(str, way)) or 'all'} = {number}", json.dumps(fresh)
    keys = [way for way in places if way and isinstance(way[-1], str)]
    for way in draw.sample(keys, min(most // 6, len(keys))):
        fresh = json.loads(text)
        node = fresh
        for key in way[:-1]:
            node = node[key]
        del node[way[-1]]
        yield f"without {'.'.join(map(str, way))}", json.dumps(fresh)
    yield "nested deeply", "[" * 200_000 + "]" * 200_000
    yield "a number of a million digits", "1" * 1_000_000
    yield "NaN", text.replace("1", "NaN", 1)
