"""Bag of visual words over HOG blocks: how often each of K local edge patterns occurs in an image (the teacher of CC+HOG).

Each block of the `hog` descriptor is a pattern. k-means on patterns of the training images yields the K words; an image is
described by the histogram of the words nearest to its patterns. The paper does not give its settings; the defaults are our own.

Source: "bag of words of HOG" in table 3 of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385; visual words
from Csurka et al., ECCV workshop 2004; the grid of histograms from Lazebnik, Schmid, Ponce, CVPR 2006.
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
_DISTANCES = 1 << 24  # most distances held at once: 64 MiB


class Spec(StrictSpec):
    """Dense HOG blocks, the vocabulary, and the grid of cells that get a histogram each."""

    kind: Literal["bag_of_hog"] = "bag_of_hog"
    hog: DescriptorSpec = Field(default={"kind": "hog", "cell": 4}, validate_default=True)
    words: int = Field(
        default=256, ge=2, le=20_000, description="size K of the vocabulary; at most the number of distinct training patterns"
    )
    grid: int = Field(
        default=1, ge=1, le=8, description="cells per side, each with its own histogram; 1: positions are ignored"
    )
    patterns: int = Field(default=100_000, ge=100, description="most training patterns that are clustered")
    iterations: int = Field(default=20, ge=1, le=1000, description="most iterations of k-means")
    seed: Seed = 0

    @field_validator("hog")
    @classmethod
    def _only_hog(cls, value: Any) -> Any:
        if value.kind != "hog":
            raise ValueError(f"the patterns are blocks of the descriptor hog, not of {value.kind!r}")
        return value


def fit(spec: Spec, images: Images) -> dict[str, NDArray[Any]]:
    """{"words": (K, block^2 * orientations) float32}: the k-means centroids of patterns sampled from the whole data set.

    Raises:
        UserError: the images are smaller than one block.
        ValueError: there are fewer distinct patterns than words.
    """
    blocks = _patterns(spec, torch.from_numpy(images.read(np.zeros(1, np.int64)))).shape[1]
    per_image = min(blocks, max(1, -(-spec.patterns // len(images))))
    count = min(len(images), max(1, spec.patterns // per_image))
    chosen = np.linspace(0, len(images) - 1, count).astype(np.int64)
    draws = np.random.default_rng(seed_of(spec.seed, "patterns"))
    found = []
    for start in range(0, count, _BATCH):
        rows = _patterns(spec, torch.from_numpy(images.read(chosen[start : start + _BATCH]))).numpy()
        order = draws.random(rows.shape[:2]).argsort(axis=1)[:, :per_image]
        progress.advance("images", len(rows))
        found.append(np.take_along_axis(rows, order[:, :, None], axis=1).reshape(-1, rows.shape[2]))
    with tempfile.TemporaryDirectory() as folder:  # k-means reads shards from files
        shard = Path(folder) / "patterns.npy"
        np.save(shard, np.concatenate(found))
        result = kmeans.fit([shard], spec.words, seed=spec.seed, iterations=spec.iterations, projection={}, pool=LocalPool())
    return {"words": result.centroids}


def describe(spec: Spec, state: dict[str, NDArray[Any]] | None, images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, grid^2 * K) float32: the normalised histogram of each cell, row by row.

    Raises:
        UserError: the images are smaller than one block, or have fewer blocks per side than the grid has cells.
        ValueError: `state` is None.
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
    bin_index = cell.flatten().to(images.device) * len(words) + nearest
    counts = torch.zeros(len(images), spec.grid**2 * len(words), device=images.device)
    counts.scatter_add_(1, bin_index, torch.ones_like(bin_index, dtype=torch.float32))
    counts = counts.view(len(images), spec.grid**2, len(words))
    return (counts / counts.sum(dim=2, keepdim=True)).flatten(1)


def check(spec: Spec, size: int, count: int) -> None:
    """Refuse more words than sampled patterns: an image has one pattern per block, and at most `patterns` are sampled.

    Args:
        size: side of the images in pixels; large enough for a block.
        count: number of training images.

    Raises:
        UserError: there are fewer patterns than words.
    """
    hog = _hog(spec)
    blocks = (size // hog.cell - hog.block + 1) ** 2
    found = min(spec.patterns, blocks * count)
    if spec.words > found:
        raise UserError(
            f"{spec.words} words cannot be made of {found} patterns",
            "descriptor.words",
            f"Use at most {found}, better a hundredth of that.",
        )


def quick(spec: Spec) -> Spec:
    """The same patterns and grid with two words, which can be fitted to two images."""
    return spec.model_copy(update={"words": 2, "patterns": 100, "iterations": 1})


def _hog(spec: Spec) -> Any:
    """The spec of `hog`; a plugin imports no other plugin, so its fields have no static type here."""
    return spec.hog


def _blocks(spec: Spec, images: Tensor) -> tuple[int, int]:
    """Number of rows and columns of blocks."""
    hog, (height, width) = _hog(spec), images.shape[1:3]
    return height // hog.cell - hog.block + 1, width // hog.cell - hog.block + 1


def _patterns(spec: Spec, images: Tensor) -> Tensor:
    """(B, blocks, block^2 * orientations) float32, the blocks row by row."""
    hog = _hog(spec)
    described: Tensor = plugins.module_of("descriptor", hog).describe(hog, None, images)
    return described.view(len(images), -1, hog.block**2 * hog.orientations)


def _nearest(rows: Tensor, words: Tensor) -> Tensor:
    """Index (int64) of the word nearest to each row; the first one in a tie."""
    norms = words.square().sum(dim=1)
    parts = rows.split(max(1, _DISTANCES // len(words)))
    return torch.cat([(norms - 2 * part @ words.T).min(dim=1).indices for part in parts])
