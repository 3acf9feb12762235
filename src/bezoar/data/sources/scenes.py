"""Scenes: forty classes of textured shapes, drawn and captioned procedurally.

A class is a texture and a shape: `striped square`. Colours, nearest neighbours in pixels and single
words of the caption do not reveal it. A caption may lack the texture (one in ten) or use other
words (a `banded box`, a `star with polka dots`); it also names colours, light and clutter, and in a
share of the records it belongs to another scene.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import numpy as np
import torch

from bezoar.data.blocks import blocks
from bezoar.data.decoding import thread_count
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.data.scene_drawing import CLASSES, COLORS, NODES, SHAPES, TEXTURES, Sketch, draw_scenes
from bezoar.errors import UserError
from bezoar.machine import free_memory
from bezoar.registry import method

LONGEST = 12  # words in a caption
BATCH = 4096  # records made at a time
TEXT_BYTES = 400  # that id, caption and label of a record take
# Uniform numbers of a record: for its contents, its caption, and its appearance.
FACTS = 6
WORDS = 10
LOOKS = {
    "center": 2,
    "scale": 1,
    "turn": 1,
    "gain": 1,
    "paint": 3,
    "second": 1,
    "pattern": 3,
    "ground": 1,
    "nodes": NODES**2,
    "node_colors": 3 * NODES**2,
    "boxes": 10,
    "box_color": 1,
    "light": 2,
    "noise": 1,
    "key": 1,
}

PAINTS, SHAPE_NAMES, TEXTURE_NAMES = tuple(COLORS), tuple(SHAPES), tuple(TEXTURES)
LIGHTS = ("dim", "soft", "bright")
SIZES = ("small", "medium", "large")
TEXTURE_WORDS = (  # other words for a texture, before the shape's name
    ("plain", "filled"),
    ("banded", "stripy"),
    ("checked", "chequered"),
    ("spotted", "polka dot"),
)
TEXTURE_ENDS = (  # and after it
    ("without a pattern", "of one color"),
    ("with stripes", "with bands"),
    ("with checks", "with a checkerboard"),
    ("with dots", "with polka dots"),
)
SHAPE_WORDS = (  # other words for a shape
    ("disc", "round shape"),
    ("box", "block"),
    ("pyramid", "triangular shape"),
    ("star-shaped sign", "five-pointed shape"),
    ("plus sign", "plus"),
    ("hoop", "round band"),
    ("heart-shaped sign", "love sign"),
    ("moon", "half moon"),
    ("rhombus", "lozenge"),
    ("sand timer", "egg timer"),
)
OPENINGS = (
    "",
    "",
    "",
    "a photo of",
    "a picture of",
    "an image of",
    "a drawing of",
    "here is",
    "there is",
    "we see",
)
ENDINGS = (
    "",
    "on a {ground} background",
    "on {ground} ground",
    "against {ground}",
    "over a {ground} wall",
    "in {light} light",
    "under a {light} lamp",
    "on a {light} day",
    "with some clutter",
    "beside paper scraps",
    "near {clutter} scraps",
    "in a noisy photo",
)


@method
class Scenes:
    """The fields say which records; they are drawn when the source is called."""

    count: Annotated[int, "how many records"] = 20_000
    size: Annotated[int, "height and width of the images in pixels, 32 to 128"] = 32
    split: Annotated[Literal["train", "test"], "train or test; the two share no record"] = "train"
    seed: Annotated[int, "another seed gives other records of the same kind"] = 0
    wrong: Annotated[float, "share of the records whose caption belongs to another scene"] = 0.05

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1; got {self.count}")
        if not 32 <= self.size <= 128:
            raise ValueError(f"size must be 32 to 128 pixels; got {self.size}")
        if self.split not in ("train", "test"):
            raise ValueError(f"split must be train or test; got {self.split!r}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be 0 or more, below 2**63; got {self.seed}")
        if not 0 <= self.wrong <= 1:
            raise ValueError(f"wrong must be 0 to 1; got {self.wrong}")

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all records: seed, split and place."""
        return tuple(f"scenes-{self.seed}-{self.split}-{i:07d}" for i in range(self.count))

    def __call__(self) -> Pairs:
        """Return all records, with labels in 0..39.

        Raises UserError for more than memory holds.
        """
        needed, free = self.count * (3 * self.size**2 + TEXT_BYTES), free_memory()
        if free and needed > free:
            raise UserError(
                f"{self.count:,} scenes of {self.size} px take {needed / 2**30:,.1f} GiB; "
                f"{free / 2**30:,.1f} are free"
            )
        return self.render(self.ids)

    def render(self, ids: Sequence[str], device: torch.device | str = "cpu") -> Pairs:
        """Return records of this seed, functions of (seed, id, size, wrong), in the order of ids.

        Raises UserError for an id that is not of this seed's records.
        """
        pattern = re.compile(rf"scenes-{self.seed}-(train|test)-[0-9]{{7,}}")
        foreign = next((i for i in ids if not pattern.fullmatch(i)), None)
        if foreign is not None:
            raise UserError(
                f"no record {foreign!r}; ids are like 'scenes-{self.seed}-{self.split}-0000123'"
            )
        if len(ids) <= BATCH:
            return self._render(ids, device)
        images = torch.empty(len(ids), 3, self.size, self.size, dtype=torch.uint8, device=device)

        def draw(rows: slice) -> Pairs:
            part = self._render(ids[rows], device)
            images[rows] = part.images
            return replace(part, images=images[rows])

        with ThreadPoolExecutor(thread_count()) as pool:
            parts = list(pool.map(draw, blocks(len(ids), BATCH)))
        captions = tuple(caption for part in parts for caption in part.captions)
        labels = torch.cat([part.labels for part in parts if part.labels is not None])
        return Pairs(images, captions, labels, tuple(ids), CLASSES)

    def _render(self, ids: Sequence[str], device: torch.device | str) -> Pairs:
        widths = [1, FACTS, FACTS, WORDS, sum(LOOKS.values())]
        u = draws(self.seed, ids, sum(widths))
        wrong, true, other, words, looks = np.split(u, np.cumsum(widths)[:-1], axis=1)
        facts = _facts(true)
        other[:, 0] = _another(facts.label, other[:, 0], len(CLASSES))
        caption_facts = _facts(np.where(wrong < self.wrong, other, true))
        # The same pixels on either device, see scene_drawing.
        canvas_device = "cuda" if torch.cuda.is_available() else "cpu"
        images = draw_scenes(_sketch(facts, looks).to(canvas_device), self.size).to(device)
        labels = torch.from_numpy(facts.label).to(device)
        return Pairs(images, tuple(_captions(caption_facts, words)), labels, tuple(ids), CLASSES)


@dataclass(frozen=True)
class Facts:
    """The facts about n scenes for captions: indices int64 (n,) into the tables above."""

    label: np.ndarray
    color: np.ndarray
    ground: np.ndarray  # never the shape's colour
    light: np.ndarray
    size: np.ndarray
    clutter: np.ndarray  # colour of the first piece of clutter; never the shape's colour


def _choose(u: np.ndarray, n: int) -> np.ndarray:
    """Turn uniform numbers into integers in 0..n-1."""
    return (u * n).astype(np.int64)


def _another(value: np.ndarray, u: np.ndarray, n: int) -> np.ndarray:
    """Return a uniform number that `_choose` turns into any of 0..n-1 but `value`."""
    other: np.ndarray = (value + 1 + _choose(u, n - 1)) % n
    return (other + 0.5) / n


def _facts(u: np.ndarray) -> Facts:
    """Turn uniform numbers (n, FACTS) into facts."""
    label, color, ground, light, size, clutter = u.T
    paint = _choose(color, len(PAINTS))
    return Facts(
        _choose(label, len(CLASSES)),
        paint,
        _choose(_another(paint, ground, len(PAINTS)), len(PAINTS)),
        _choose(light, len(LIGHTS)),
        _choose(size, len(SIZES)),
        _choose(_another(paint, clutter, len(PAINTS)), len(PAINTS)),
    )


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u


def _sketch(facts: Facts, u: np.ndarray) -> Sketch:
    """Turn facts and uniform numbers (n, all of LOOKS) into the contents of scenes."""
    look = dict(zip(LOOKS, np.split(u, np.cumsum(list(LOOKS.values()))[:-1], axis=1), strict=True))
    palette = np.array(list(COLORS.values()), dtype=np.float64)
    gain = _between((facts.light[:, None] + look["gain"]) / len(LIGHTS), 0.75, 1.15)
    paint = palette[facts.color] + _between(look["paint"], -15, 15)
    red, green, blue = paint.T
    bright = (0.299 * red + 0.587 * green + 0.114 * blue) / 255  # luma, ITU-R BT.601
    second = np.where(bright + _between(look["second"][:, 0], -0.15, 0.15) > 0.5, 20.0, 240.0)
    paints = np.stack([paint, np.repeat(second[:, None], 3, axis=1)], axis=1)

    blend_to = _choose(_another(facts.color, look["ground"][:, 0], len(PAINTS)), len(PAINTS))
    base, far = palette[facts.ground][:, :, None], palette[blend_to][:, :, None]
    nodes = base + (far - base) * _between(look["nodes"], 0, 0.6)[:, None]
    nodes += _between(look["node_colors"], -25, 25).reshape(-1, 3, NODES**2)
    nodes = np.clip(nodes * gain[:, :, None], 0, 255).round().reshape(-1, 3, NODES, NODES)

    boxes = look["boxes"].reshape(-1, 2, 5)
    low, high = np.array([-0.95, -0.95, 0.08, 0.08, -1]), np.array([0.95, 0.95, 0.34, 0.2, 1])
    box_color = np.stack([facts.clutter, _choose(look["box_color"][:, 0], len(PAINTS))], axis=1)
    floats = {
        "center": _between(look["center"], -0.24, 0.24),
        "scale": _between((facts.size + look["scale"][:, 0]) / len(SIZES), 0.58, 0.92),
        "turn": _between(look["turn"][:, 0], -0.17, 0.17),  # up to 19 degrees to either side
        "paint": paints * gain[:, :, None],
        "pattern": np.concatenate(
            [_between(look["pattern"][:, :1], 0.54, 0.66), look["pattern"][:, 1:]], axis=1
        ),
        "ground": nodes,
        "boxes": low + (high - low) * boxes,
        "box_paint": palette[box_color] * gain[:, :, None],
        "light": _between(look["light"], -0.15, 0.15),
        "noise": _between(look["noise"][:, 0], 6, 20),
    }
    key = (look["key"][:, 0] * 2.0**32 - 2.0**31).astype(np.int32)
    shape, texture = np.divmod(facts.label, len(TEXTURES))
    return Sketch(
        shape=torch.from_numpy(shape),
        texture=torch.from_numpy(texture),
        key=torch.from_numpy(key),
        **{name: torch.from_numpy(values.astype(np.float32)) for name, values in floats.items()},
    )


def _captions(facts: Facts, u: np.ndarray) -> Iterator[str]:
    """Turn facts and uniform numbers (n, WORDS) into captions of at most LONGEST words."""
    columns = [getattr(facts, f.name).tolist() for f in fields(facts)]
    for row, words in zip(zip(*columns, strict=True), u.tolist(), strict=True):
        yield _caption(row, words)


def _caption(facts: Sequence[int], u: Sequence[float]) -> str:
    label, color, ground, light, size, clutter = facts
    thing = _thing(*divmod(label, len(TEXTURES)), u)
    if u[5] < 0.7:
        thing = f"{PAINTS[color]} {thing}" if u[6] < 0.85 else f"{thing} in {PAINTS[color]}"
    if u[7] < 0.4 and size != 1:
        thing = f"{SIZES[size]} {thing}"
    article = "an" if thing.startswith(("o", "e", "hourglass")) else "a"
    opening = OPENINGS[int(u[8] * len(OPENINGS))]
    ending = ENDINGS[int(u[9] * len(ENDINGS))]
    ending = ending.format(ground=PAINTS[ground], light=LIGHTS[light], clutter=PAINTS[clutter])
    words = f"{opening} {article} {thing} {ending}".split()
    return " ".join(words if len(words) <= LONGEST else [article, thing, ending])


def _thing(shape: int, texture: int, u: Sequence[float]) -> str:
    """The class in words: by name in 62 of 100 captions, without texture in 10, otherwise in 28."""
    noun, adjective = SHAPE_NAMES[shape], TEXTURE_NAMES[texture]
    if u[0] < 0.62:
        return f"{adjective} {noun}"
    if u[0] >= 0.85:
        noun = SHAPE_WORDS[shape][u[1] < 0.5]
    if u[2] < 0.26:  # 10 in the 38 that are left
        return noun
    if u[0] < 0.7:
        return f"{noun} {TEXTURE_ENDS[texture][u[3] < 0.5]}"
    if u[0] < 0.93:
        adjective = TEXTURE_WORDS[texture][u[4] < 0.5]
    return f"{adjective} {noun}"
