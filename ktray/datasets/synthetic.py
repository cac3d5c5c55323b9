"""Synthetic images of coloured shapes on a noisy background, generated on the fly, with labels and boxes.

An image shows one large shape, which determines the label, and up to `objects` - 1 smaller ones; all have boxes. Position,
angle, brightness and background are random; class c is shape c % 6 in colour c // 6. Image i depends only on (seed, split, i).

Source: ktray's own.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ktray.fingerprint import fingerprint, seed_of
from ktray.images import Source, Splits
from ktray.spec import Seed, Split
from ktray.strict import StrictSpec

REVISION = 1
LOCATION: tuple[str, ...] = ()
SHAPES = ("disc", "square", "triangle", "cross", "ring", "bar")
COLOURS = {
    "red": (220, 50, 47),
    "green": (60, 180, 75),
    "blue": (50, 100, 230),
    "yellow": (240, 220, 50),
    "magenta": (210, 60, 200),
    "cyan": (60, 200, 220),
    "white": (245, 245, 245),
    "orange": (250, 140, 30),
}
_THIN = 0.3  # half the width of a bar or of an arm of a cross, in radii
_LONG = math.sqrt(1 - _THIN**2)
_HALF = math.sqrt(0.5)
_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(x, y) for x in (-_HALF, _HALF) for y in (-_HALF, _HALF)],
    "triangle": [(math.cos(a), math.sin(a)) for a in (math.pi / 2, math.pi * 7 / 6, math.pi * 11 / 6)],
    "cross": [(x, y) for a, b in ((_LONG, _THIN), (_THIN, _LONG)) for x in (-a, a) for y in (-b, b)],
    "bar": [(x, y) for x in (-_LONG, _LONG) for y in (-_THIN, _THIN)],
}


class Spec(StrictSpec):
    """The number of images and classes, and the difficulty of the images."""

    kind: Literal["synthetic"] = "synthetic"
    count: int = Field(default=1000, ge=1, description="number of training images, val included")
    test: int = Field(default=200, ge=0, description="number of test images")
    classes: int = Field(default=6, ge=1, le=len(SHAPES) * len(COLOURS))
    objects: int = Field(default=1, ge=1, le=8, description="most shapes per image")
    channels: Literal["rgb", "grey"] = "rgb"
    noise: float = Field(
        default=0.1, ge=0, le=1, description="standard deviation of the noise, relative to the range of a channel"
    )
    seed: Seed = 0
    size: int = Field(default=32, ge=8, le=2048, description="side of the images in pixels")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")

    @model_validator(mode="after")
    def _no_colours_in_grey(self) -> Spec:
        if self.channels == "grey" and self.classes > len(SHAPES):
            raise ValueError(f"grey images have only {len(SHAPES)} classes, one per shape; use channels: rgb")
        return self


def annotations_of(spec: Spec) -> tuple[str, ...]:
    """One label per image, and boxes."""
    return ("labels", "boxes")


def load(spec: Spec) -> Splits:
    """The training and test images, with labels and boxes."""
    content = spec.model_dump(mode="json", exclude={"split", "max_unreadable"})
    return Splits(
        train=_source(spec, "train", spec.count),
        test=_source(spec, "test", spec.test) if spec.test else None,
        identity=fingerprint(content),
    )


def _classes(spec: Spec) -> tuple[str, ...]:
    colours = ("grey",) if spec.channels == "grey" else tuple(COLOURS)
    return tuple(f"{colours[number // len(SHAPES)]} {SHAPES[number % len(SHAPES)]}" for number in range(spec.classes))


def _source(spec: Spec, split: str, count: int) -> Source:
    scenes, counts = _scenes(spec, split, count)
    boxes = _boxes(scenes)
    return Source(
        names=tuple(f"{split}/{index:06d}" for index in range(count)),
        read=lambda index: _render(spec, scenes[index, : counts[index]], seed_of(spec.seed, split, index)),
        labels=scenes[:, 0, 0].astype(np.int64),
        classes=_classes(spec),
        boxes=tuple(boxes_of_image[:number] for boxes_of_image, number in zip(boxes, counts, strict=True)),
    )


def _scenes(spec: Spec, split: str, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The shapes (count, objects, 5) [class, x, y, radius, angle] in pixels and radians, and the number (count,) shown.

    All come from one stream of uniform draws, so that image i does not depend on `count`. The first shape is the large one.
    """
    draws = np.random.default_rng(seed_of(spec.seed, split)).random((count, spec.objects, 6))
    scenes = np.empty((count, spec.objects, 5))
    scenes[..., 0] = np.floor(draws[..., 0] * spec.classes)
    radius = 0.12 + 0.06 * draws[..., 3]
    radius[:, 0] = 0.24 + 0.16 * draws[:, 0, 3]
    scenes[..., 3] = spec.size * radius
    scenes[..., 1:3] = spec.size * (radius[..., None] + (1 - 2 * radius[..., None]) * draws[..., 1:3])
    scenes[..., 4] = 2 * math.pi * draws[..., 4]
    return scenes, 1 + np.floor(draws[:, 0, 5] * spec.objects).astype(np.int64)


def _boxes(scenes: NDArray[np.float64]) -> NDArray[np.float32]:
    """(count, objects, 5) [x0, y0, x1, y1, class]: tight around each shape, whether occluded or not."""
    shapes = scenes[..., 0].astype(np.int64) % len(SHAPES)
    low, high = -np.ones((*shapes.shape, 2)), np.ones((*shapes.shape, 2))
    for number, shape in enumerate(SHAPES):
        if shape in _CORNERS:
            of_shape = shapes == number
            angle = scenes[of_shape, 4][:, None]
            x, y = np.array(_CORNERS[shape]).T
            turned = np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=-1)
            low[of_shape], high[of_shape] = turned.min(axis=1), turned.max(axis=1)
    centre, radius = scenes[..., 1:3], scenes[..., 3:4]
    corners = [centre + radius * low, centre + radius * high, scenes[..., :1]]
    return np.concatenate(corners, axis=-1).astype(np.float32)


def _render(spec: Spec, scene: NDArray[np.float64], seed: int) -> NDArray[np.uint8]:
    """The pixels (size, size, 3) of one scene (n, 5)."""
    random = np.random.default_rng(seed)
    size = spec.size
    y, x = np.mgrid[0:size, 0:size] + 0.5
    slope = random.uniform(-20, 20, (2, 3))
    canvas = random.uniform(40, 120, 3) + (x[..., None] * slope[0] + y[..., None] * slope[1]) / size
    for kind, centre_x, centre_y, radius, angle in reversed(scene):
        right, down = (x - centre_x) / radius, (y - centre_y) / radius
        u = right * math.cos(angle) + down * math.sin(angle)
        v = down * math.cos(angle) - right * math.sin(angle)
        cover = np.clip(0.5 - radius * _distance(SHAPES[int(kind) % len(SHAPES)], u, v), 0, 1)[..., None]
        colour = np.array(list(COLOURS.values())[int(kind) // len(SHAPES)]) if spec.channels == "rgb" else np.full(3, 210)
        canvas = canvas * (1 - cover) + colour * random.uniform(0.8, 1.0) * cover
    if spec.channels == "grey":
        canvas = np.repeat(canvas.mean(axis=2, keepdims=True), 3, axis=2)
        canvas += 255 * spec.noise * random.standard_normal((size, size, 1))
    else:
        canvas += 255 * spec.noise * random.standard_normal((size, size, 3))
    pixels: NDArray[np.uint8] = canvas.round().clip(0, 255).astype(np.uint8)
    return pixels


def _distance(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    """Signed distance in radii from the edge of a shape inside the unit circle, negative within (a bound near corners)."""
    a, b = np.abs(u), np.abs(v)
    if shape == "disc":
        return np.asarray(np.hypot(u, v) - 1)
    if shape == "ring":
        return np.asarray(np.maximum(np.hypot(u, v) - 1, 0.55 - np.hypot(u, v)))
    if shape == "square":
        return np.maximum(a, b) - _HALF
    if shape == "triangle":
        return np.maximum(-v, math.sqrt(3) / 2 * a + v / 2) - 0.5
    arm = np.maximum(a - _LONG, b - _THIN)
    return arm if shape == "bar" else np.minimum(arm, np.maximum(a - _THIN, b - _LONG))
