"""Bag of words of HOG: how often each of K kinds of small edge patterns occurs, wherever it is; the teacher of CC+HOG.

Every block of the `hog` descriptor, one per cell, is a pattern. k-means on patterns of the training images makes the words;
an image is the histogram of the words nearest to its patterns. The paper's settings are not known; these are ours.

Source: "bag of words of HOG" in table 3 of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385; visual words
from Csurka et al., ECCV workshop 2004; a grid of histograms from Lazebnik, Schmid, Ponce, CVPR 2006.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from ktray import plugins, progress
from ktray.clustering import kmeans
from ktray.errors import UserError
from ktray.fingerprint import seed_of
from ktray.images import Images
from ktray.pool import LocalPool
from ktray.spec import DescriptorSpec, Seed
from ktray.strict import StrictSpec

REVISION = 1
TOOLS = (kmeans,)

_BATCH = 256
_DISTANCES = 1 << 24  # held at a time: 64 MiB


class Spec(StrictSpec):
    """Dense HOG blocks, the words that they are told by, and the cells whose words are counted apart."""

    kind: Literal["bag_of_hog"] = "bag_of_hog"
    hog: DescriptorSpec = Field(default={"kind": "hog", "cell": 4}, validate_default=True)
    words: int = Field(default=256, ge=2, le=20_000, description="K; at most the distinct patterns of the training images")
    grid: int = Field(default=1, ge=1, le=8, description="cells along each side with a histogram each; 1: place is forgotten")
    patterns: int = Field(default=100_000, ge=100, description="most patterns that the words are made from")
    iterations: int = Field(default=20, ge=1, le=1000, description="of k-means")
    seed: Seed = 0

    @field_validator("hog")
    @classmethod
    def _only_hog(cls, value: Any) -> Any:
        if value.kind != "hog":
            raise ValueError(f"the patterns are blocks of the descriptor hog, not of {value.kind!r}")
        return value


def fit(spec: Spec, images: Images) -> dict[str, NDArray[Any]]:
    """{"words": (K, block^2 * orientations) float32}, centroids of patterns drawn from images all over the data.

    Raises:
        UserError: the images are smaller than one block.
        ValueError: fewer distinct patterns than words.
    """
    each = _patterns(spec, torch.from_numpy(images.read(np.zeros(1, np.int64)))).shape[1]
    per_image = min(each, max(1, -(-spec.patterns // len(images))))
    count = min(len(images), max(1, spec.patterns // per_image))
    chosen = np.linspace(0, len(images) - 1, count).astype(np.int64)
    draws = np.random.default_rng(seed_of(spec.seed, "patterns"))
    found = []
    for start in range(0, count, _BATCH):
        rows = _patterns(spec, torch.from_numpy(images.read(chosen[start : start + _BATCH]))).numpy()
        order = draws.random(rows.shape[:2]).argsort(axis=1)[:, :per_image]
        progress.moved("images", len(rows))
        found.append(np.take_along_axis(rows, order[:, :, None], axis=1).reshape(-1, rows.shape[2]))
    with tempfile.TemporaryDirectory() as folder:  # k-means reads shards from files
        shard = Path(folder) / "patterns.npy"
        np.save(shard, np.concatenate(found))
        made = kmeans.fit([shard], spec.words, seed=spec.seed, iterations=spec.iterations, projection={}, pool=LocalPool())
    return {"words": made.centroids}


def describe(spec: Spec, state: dict[str, NDArray[Any]] | None, images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, grid^2 * K) float32, shares of the patterns of each cell, row by row.

    Raises:
        UserError: the images are smaller than one block, or the grid is finer than their blocks.
        ValueError: no words were fitted.
    """
    if state is None:
        raise ValueError("the descriptor bag_of_hog has no words; fit it to images first")
    words = torch.from_numpy(state["words"]).to(images.device)
    rows, columns = _blocks(spec, images)
    if min(rows, columns) < spec.grid:
        raise UserError(
            f"a grid of {spec.grid} is finer than the {rows} x {columns} HOG blocks of an image",
            "descriptor.grid",
            f"At most {min(rows, columns)}.",
        )
    cell = (torch.arange(rows) * spec.grid // rows)[:, None] * spec.grid + torch.arange(columns) * spec.grid // columns
    nearest = _nearest(_patterns(spec, images).flatten(0, 1), words).view(len(images), -1)
    where = cell.flatten().to(images.device) * len(words) + nearest
    counts = torch.zeros(len(images), spec.grid**2 * len(words), device=images.device)
    counts.scatter_add_(1, where, torch.ones_like(where, dtype=torch.float32))
    counts = counts.view(len(images), spec.grid**2, len(words))
    return (counts / counts.sum(dim=2, keepdim=True)).flatten(1)


def check(spec: Spec, size: int, count: int) -> None:
    """Refuse more words than there are patterns: an image has as many as blocks, and at most `patterns` of all are drawn.

    Args:
        size: side of the images in pixels, which hold a block.
        count: number of images that the words are made from.

    Raises:
        UserError: there are fewer patterns than words.
    """
    blocks = (size // spec.hog.cell - spec.hog.block + 1) ** 2
    found = min(spec.patterns, blocks * count)
    if spec.words > found:
        raise UserError(
            f"{spec.words} words cannot be made of {found} patterns",
            "descriptor.words",
            f"Use at most {found}, better a hundredth of it.",
        )


def quick(spec: Spec) -> Spec:
    """The same patterns and grid with two words, which two images can give."""
    return spec.model_copy(update={"words": 2, "patterns": 100, "iterations": 1})


def _blocks(spec: Spec, images: Tensor) -> tuple[int, int]:
    """Rows and columns of blocks."""
    height, width = images.shape[1:3]
    return height // spec.hog.cell - spec.hog.block + 1, width // spec.hog.cell - spec.hog.block + 1


def _patterns(spec: Spec, images: Tensor) -> Tensor:
    """(B, blocks, block^2 * orientations) float32, the blocks row by row."""
    described: Tensor = plugins.module_of("descriptor", spec.hog).describe(spec.hog, None, images)
    return described.view(len(images), -1, spec.hog.block**2 * spec.hog.orientations)


def _nearest(rows: Tensor, words: Tensor) -> Tensor:
    """The word (int64) nearest to each row, the first where equal."""
    norms = words.square().sum(dim=1)
    parts = rows.split(max(1, _DISTANCES // len(words)))
    return torch.cat([(norms - 2 * part @ words.T).min(dim=1).indices for part in parts])
