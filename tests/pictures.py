"""Noise as arrays and as encoded images, for tests of data."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from ktray import plugins
from ktray.images import Splits
from ktray.spec import DataSpec


def noise(height: int = 40, width: int = 40, channels: int = 3, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[:, :, 0] if channels == 1 else pixels


def png(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()


def picture(seed: int, side: int = 24) -> Image.Image:
    return Image.fromarray(noise(side, side, seed=seed))


def data_spec(value: Any) -> Any:
    """The spec of a data set in any form that a person may type."""
    return TypeAdapter(DataSpec).validate_python(value)


def listed(value: Any) -> Splits:
    spec = data_spec(value)
    return plugins.module_of("dataset", spec).load(spec)
