"""Draws small scenes in batches: one textured shape on a cluttered ground, lit and noisy.

A record's pixels do not depend on its batch, its order, the number of threads or the processor's
vector width. Every float operation is one that IEEE 754 rounds correctly (+ - * / sqrt, min, max,
floor), the only matrix product is over integers that float32 represents exactly, and noise is an
integer hash of (record, pixel). Numbers on the device are divided by numbers of the host only if
these are powers of two, because CUDA multiplies by the reciprocal instead.

Frame coordinates: x to the right, y up, both -1..1 over the image. Object coordinates of a shape
are relative to its centre, rotated, and divided by its scale; the shape reaches to about 0.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

NODES = 4  # the ground is NODES x NODES colours, interpolated
# Weight of a node in one direction, in integers: 255 * 32 * 32 < 2**24, and 32 * 32 fits TF32.
STEPS = 32
CHUNK = 1 << 18  # pixels drawn at a time: small enough for the cache


@dataclass(frozen=True)
class Sketch:
    """The contents of n scenes: colours 0..255, lengths in frame coordinates unless stated
    otherwise.
    """

    shape: Tensor  # int64 (n,), index into SHAPES
    texture: Tensor  # int64 (n,), index into TEXTURES
    center: Tensor  # float32 (n, 2)
    scale: Tensor  # float32 (n,), half the frame is 1
    turn: Tensor  # float32 (n,), tangent of half the angle, counter-clockwise
    paint: Tensor  # float32 (n, 2, 3), the shape's own colour and its texture's second one
    pattern: Tensor  # float32 (n, 3), the texture's period, and its phase in x and y in 0..1
    ground: Tensor  # float32 (n, 3, NODES, NODES), whole numbers
    boxes: Tensor  # float32 (n, b, 5), clutter: x, y, half width, half height, turn
    box_paint: Tensor  # float32 (n, b, 3)
    light: Tensor  # float32 (n, 2), slope of the light's strength to the right and up
    noise: Tensor  # float32 (n,), half width of the uniform noise, in levels of 255
    key: Tensor  # int32 (n,), of the noise

    def __len__(self) -> int:
        return len(self.shape)

    def take(self, rows: slice) -> Sketch:
        """Return some of the records."""
        return Sketch(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device | str) -> Sketch:
        """Return the same on a device."""
        return Sketch(*(getattr(self, f.name).to(device) for f in fields(self)))


def draw_scenes(sketch: Sketch, size: int) -> Tensor:
    """Draw scenes: uint8 (n, 3, size, size) on the sketch's device."""
    images = torch.empty(len(sketch), 3, size, size, dtype=torch.uint8, device=sketch.shape.device)
    step = max(1, CHUNK // size**2)
    for start in range(0, len(sketch), step):
        rows = slice(start, start + step)
        images[rows] = _draw(sketch.take(rows), size)
    return images


def _draw(s: Sketch, size: int) -> Tensor:
    """Draw one chunk. Pixels are one axis of P = size**2 until the end."""
    device = s.shape.device
    line = ((2 * torch.arange(size, dtype=torch.float32) + 1) / size - 1).to(device)
    x, y = line.repeat(size), (-line).repeat_interleave(size)
    canvas = _ground(s.ground, size)
    for box, paint in zip(s.boxes.unbind(1), s.box_paint.unbind(1), strict=True):
        u, v = _place(x, y, box[:, :2], box[:, 4])
        d = torch.maximum(u.abs_().sub_(box[:, 2:3]), v.abs_().sub_(box[:, 3:4]))
        canvas += (paint[:, :, None] - canvas).mul_(_cover(d, size / 2)[:, None])

    u, v = _place(x, y, s.center, s.turn)
    u, v = u.div_(s.scale[:, None]), v.div_(s.scale[:, None])
    sharp = s.scale[:, None] * (size / 2)  # pixels in a unit of object coordinates
    inside, first = torch.empty_like(u), torch.empty_like(u)
    for group, sdf in enumerate(SHAPES.values()):
        rows = (s.shape == group).nonzero()[:, 0]
        if len(rows):
            inside[rows] = _cover(sdf(u[rows], v[rows]), sharp[rows])
    for group, weave in enumerate(TEXTURES.values()):
        rows = (s.texture == group).nonzero()[:, 0]
        if len(rows):
            first[rows] = weave(u[rows], v[rows], s.pattern[rows], sharp[rows])
    first *= inside
    canvas *= (1 - inside)[:, None]
    canvas += first[:, None] * s.paint[:, 0, :, None]
    canvas += (inside - first)[:, None] * s.paint[:, 1, :, None]
    canvas *= (x * s.light[:, :1] + y * s.light[:, 1:] + 1)[:, None]
    canvas += _noise(s.key, size * size).mul_((s.noise / 128)[:, None, None])
    return canvas.add_(0.5).clamp_(0, 255).to(torch.uint8).view(-1, 3, size, size)


def _place(x: Tensor, y: Tensor, center: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates (n, P) of pixels (P,) about a centre, turned (half-angle formulas)."""
    t = turn[:, None]
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    dx, dy = x - center[:, :1], y - center[:, 1:]
    return dx * cos + dy * sin, dy * cos - dx * sin


def _cover(distance: Tensor, sharp: Tensor | float) -> Tensor:
    """Turn signed distances, negative inside, into the covered share of each pixel, in place.

    sharp: pixels in a unit of distance.
    """
    return distance.mul_(sharp).neg_().add_(0.5).clamp_(0, 1)


def _ground(nodes: Tensor, size: int) -> Tensor:
    """Interpolate integer colours (n, 3, NODES, NODES) to (n, 3, P), exactly."""
    at = (torch.arange(size, dtype=torch.float64) + 0.5) / size * (NODES - 1)
    left = at.floor()
    near = ((1 - (at - left)) * STEPS).round()
    weight = torch.zeros(size, NODES, dtype=torch.float64)
    weight[torch.arange(size), left.long()] = near
    weight[torch.arange(size), left.long() + 1] = STEPS - near
    both = torch.einsum("yi,xj->ijyx", weight, weight).reshape(NODES**2, size**2).to(nodes)
    return (nodes.reshape(-1, NODES**2) @ both).div_(STEPS**2).view(len(nodes), 3, -1)


def _noise(key: Tensor, pixels: int) -> Tensor:
    """Make noise of keys int32 (n,): float32 (n, 3, pixels), integers uniform in -128..127.

    They are the three low bytes of a 32-bit hash of key + pixel * golden ratio (mixer: lowbias32,
    Wellons 2018).
    """
    place = torch.arange(pixels, dtype=torch.int32, device=key.device) * -1640531527
    x = key[:, None] + place
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16) & 0xFFFF
    left = torch.tensor([24, 16, 8], dtype=torch.int32, device=key.device)[:, None]
    return ((x[:, None] << left) >> 24).to(torch.float32)


# Shapes: signed distance to the outline at object coordinates; exact near it, else a lower bound.


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt_().sub_(0.8)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()).sub_(0.7)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    y = y + 0.2
    return torch.maximum(-y, x.abs() * math.sqrt(0.75) + y * 0.5).sub_(0.475)


def _star(x: Tensor, y: Tensor, tip: float = 0.95, dent: float = 0.4) -> Tensor:
    """Mirrored into the wedge of one tip, whose outline is the line from the tip to the dent."""
    sin, cos = math.sin(math.pi / 5), math.cos(math.pi / 5)
    x = x.abs()
    for nx, ny in ((cos, -sin), (-cos, -sin)):
        beyond = (x * nx + y * ny).clamp_(min=0)
        x, y = x - beyond * (2 * nx), y - beyond * (2 * ny)
    ex, ey = dent * sin, dent * cos - tip
    length = math.hypot(ex, ey)
    return x.abs() * (-ey / length) + (y - tip) * (ex / length)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 0.85, y - 0.29), torch.maximum(x - 0.29, y - 0.85))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt_().sub_(0.62).abs_().sub_(0.22)


def _heart(x: Tensor, y: Tensor, half: float = 0.7) -> Tensor:
    """A square on its corner, and a circle over each of its two upper sides."""
    x, y = x.abs(), y + 0.1 * half
    square = (x + y.abs() - half) * math.sqrt(0.5)
    x, y = x - half / 2, y - half / 2
    return torch.minimum(square, (x * x + y * y).sqrt_().sub_(half * math.sqrt(0.5)))


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    x = x - 0.1
    bite = x - 0.42
    return torch.maximum((x * x + y * y).sqrt_().sub_(0.88), 0.68 - (bite * bite + y * y).sqrt_())


def _diamond(x: Tensor, y: Tensor, wide: float = 0.56, high: float = 0.95) -> Tensor:
    return (x.abs() * high + y.abs() * wide - wide * high) / x.new_tensor(math.hypot(wide, high))


def _hourglass(x: Tensor, y: Tensor) -> Tensor:
    y = y.abs()
    return torch.maximum(y - 0.85, (x.abs() - y * 0.75 - 0.06) * 0.8)


# Textures: share of the shape's own colour at object coordinates.


def _wave(x: Tensor, period: Tensor, phase: Tensor, sharp: Tensor) -> Tensor:
    """Bands of half a period: -0.5 or 0.5, and in between on the edge of a band."""
    t = x / period + phase
    return ((t - t.floor() - 0.5).abs_() - 0.25).mul_(period * sharp).clamp_(-0.5, 0.5)


def _solid(x: Tensor, y: Tensor, pattern: Tensor, sharp: Tensor) -> Tensor:
    return torch.ones_like(x)


def _striped(x: Tensor, y: Tensor, pattern: Tensor, sharp: Tensor) -> Tensor:
    period, phase = pattern[:, :1], pattern[:, 2:]
    return _wave(y, period, phase, sharp).add_(0.5)


def _checkered(x: Tensor, y: Tensor, pattern: Tensor, sharp: Tensor) -> Tensor:
    period, right, up = pattern[:, :1], pattern[:, 1:2], pattern[:, 2:]
    return _wave(x, period, right, sharp).mul_(_wave(y, period, up, sharp)).mul_(2).add_(0.5)


def _dotted(x: Tensor, y: Tensor, pattern: Tensor, sharp: Tensor) -> Tensor:
    """Dots of the second colour, three quarters of a period apart."""
    period, right, up = pattern[:, :1], pattern[:, 1:2], pattern[:, 2:]
    pitch = period * 0.75
    u, v = x / pitch + right, y / pitch + up
    u, v = u - u.floor() - 0.5, v - v.floor() - 0.5
    return _cover(0.3 - (u * u + v * v).sqrt_(), pitch * sharp)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
    "diamond": _diamond,
    "hourglass": _hourglass,
}
TEXTURES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "solid": _solid,
    "striped": _striped,
    "checkered": _checkered,
    "dotted": _dotted,
}
COLORS = {
    "red": (214, 36, 36),
    "orange": (245, 140, 30),
    "yellow": (242, 222, 50),
    "green": (44, 160, 66),
    "cyan": (60, 205, 220),
    "blue": (48, 82, 214),
    "purple": (132, 54, 172),
    "pink": (245, 146, 186),
    "brown": (122, 78, 44),
    "white": (240, 240, 240),
}
CLASSES = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)
