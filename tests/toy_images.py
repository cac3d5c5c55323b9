"""Toy images whose classes, rotations and tiles a small network can tell apart within seconds."""

from __future__ import annotations

import numpy as np

from ktray.images import Images


def toy_images(count: int = 64, size: int = 28, classes: int = 4, seed: int = 0) -> Images:
    """Light above, dark below, warm left, cold right, with a bright square whose corner of the image is its class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % classes
    down, across = np.mgrid[0:size, 0:size] / (size - 1)
    pixels = np.stack([200 - 120 * down - 60 * across, 180 - 140 * down, 100 - 60 * down + 80 * across], axis=-1)
    batch = pixels + rng.normal(0, 12, (count, size, size, 3))
    half = size // 2
    for image, label in zip(batch, labels, strict=True):
        top, left = divmod(int(label) % 4, 2)
        image[top * half : top * half + half // 2, left * half : left * half + half // 2] = 255
    stored = np.clip(batch, 0, 255).astype(np.uint8)
    return Images(
        count=count,
        size=size,
        read=lambda indices: stored[indices],
        labels=labels,
        classes=tuple(f"corner {c}" for c in range(classes)),
        names=tuple(f"{i:04d}.png" for i in range(count)),
    )
