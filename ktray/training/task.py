"""A training problem as a record of functions, which plugins define and `loop.fit` solves, and the targets that students learn.

Targets are what a transfer reads besides the images: pseudo-labels or labels, and the teacher's features.

Legend: N images of the transfer data's training split, K classes of one head, D width of the teacher's features, B batch
size, m nearest clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ktray.errors import UserError
from ktray.ops.random_draws import Draws, map_draws
from ktray.text import counted


@dataclass(frozen=True)
class Task:
    """A training problem for a backbone.

    The model is ``head(backbone(inputs))``. One image may become several inputs (the nine tiles of a puzzle, two views);
    `inputs` then has a multiple of B rows, and the head combines them again.

    Attributes:
        head: feature width D of the backbone -> the module on top of it, which maps (M, D) to the input of `loss`.
        draw: (indices (B,) int64 of the images of a batch, a generator seeded from (seed, epoch, step)) -> all random draws of
            the batch, and what it reads from files, as named tensors on the CPU. Their names, shapes and types depend on B
            alone. They are made ahead of the steps, perhaps in several threads, and uploaded: the same for every device.
        batch: (images (B, H, W, 3) uint8, their indices (B,) int64, the tensors of `draw`; all on the training device) ->
            (inputs (M, 3, h, w) float32 as from `augmentation.to_float`, targets with B rows). It draws nothing itself.
        loss: (outputs of the head, targets) -> (scalar loss, metrics as scalars, such as {"top1": ...} in [0, 1]).
        keep: indices (n,) int64 of the images to train on, ascending; None for all.
        order: a CPU generator seeded from (seed, epoch) -> the images (n,) of one epoch, all in `keep`; images may
            repeat or be missing. None shows each image of `keep` once, shuffled.
        after_step: called with the model (`nn.ModuleDict` of "backbone" and "head") after every optimiser step.
        prepare: called once with the freshly initialised model, before a snapshot is loaded; it may add modules that are saved
            with the model but not trained, such as a moving average of the backbone.
        forward: (model, inputs) -> the input of `loss`; None for ``head(backbone(inputs))``.
        mean_over_images: whether `loss` is a mean of one term per image, computed from the inputs and targets of that image
            alone, and the rows of `inputs` are grouped by image. A batch that does not fit in memory may then go through the
            network in parts, see `loop.fit`. False for a loss that compares images with each other, and for a `forward` that
            stores something about the batch for `after_step`: parts would change the training. False is the safe choice: a
            batch that does not fit then fails with an error.
        capturable: whether `batch`, `forward`, `loss`, `after_step` and the head compute with tensors of the device alone: they
            neither read a value of one nor, after their first calls, copy anything to it (see `ops/random_draws.py: copies`),
            and change no Python variable. Their kernels may then be recorded once and replayed, see `cuda_graph.py`. False is
            the safe choice: a replay would repeat what such code did in the recorded step.
    """

    head: Callable[[int], nn.Module]
    draw: Callable[[Tensor, torch.Generator], Draws]
    batch: Callable[[Tensor, Tensor, Draws], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
    keep: Tensor | None = None
    order: Callable[[torch.Generator], Tensor] | None = None
    after_step: Callable[[nn.ModuleDict], None] | None = None
    prepare: Callable[[nn.ModuleDict], None] | None = None
    forward: Callable[[nn.ModuleDict, Tensor], Tensor] | None = None
    mean_over_images: bool = False
    capturable: bool = False


def make_batch(task: Task, images: Tensor, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one batch, its draws made now.

    Args:
        images: (B, H, W, 3) uint8 on any device.
        indices: (B,) int64 on the CPU.
    """
    draws = map_draws(lambda drawn: drawn.to(images.device), task.draw(indices, generator))
    return task.batch(images, indices.to(images.device), draws)


# Up to this size a GPU holds all features; beyond it, and on the CPU, each batch reads its rows from the files.
RESIDENT_BYTES = 4 << 30


def require_images(k: int, count: int) -> None:
    """Raise if there are fewer images than clusters, or other classes formed from them.

    Raises:
        UserError: `k` is larger than `count`.
    """
    if k > count:
        raise UserError(
            f"k={k} clusters cannot be made from {counted(count, 'image')}",
            "k",
            f"Use at most {count}, or better a hundredth of that.",
        )


@dataclass(frozen=True)
class Labels:
    """One class per image.

    Attributes:
        of_image: (N,) int64 in [-1, classes), -1 = left out; of positions (N, positions), none of them left out.
        classes: K.
        nearest: (N, m) integers in [0, classes), the nearest clusters of each image, nearest first; None unless the transfer
            asked for them.
        squared: (N, m) float32, squared distances to these clusters in the projected space, ascending.
    """

    of_image: NDArray[np.int64]
    classes: int
    nearest: NDArray[np.integer] | None = None
    squared: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Features:
    """The teacher's features (N, D) of all images, read by index.

    Attributes:
        shards: arrays (n, D) of float32 or float16, memory-mapped or not, in the order of the images.
    """

    shards: Sequence[NDArray[np.floating]]
    _held: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    @property
    def width(self) -> int:
        """D."""
        return int(self.shards[0].shape[1])

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """The features of the images with these indices, (B, D) float32, in the given order.

        Raises:
            IndexError: an index is not in [0, N).
        """
        starts = np.cumsum([0, *map(len, self.shards)])
        if len(indices) and not 0 <= indices.min() <= indices.max() < starts[-1]:
            raise IndexError(f"rows [{indices.min()}, {indices.max()}], but there are {starts[-1]}")
        shard_of = np.searchsorted(starts, indices, side="right") - 1
        rows = np.empty((len(indices), self.width), np.float32)
        for shard in np.unique(shard_of):
            selected = shard_of == shard
            rows[selected] = self.shards[shard][indices[selected] - starts[shard]]
        return rows

    @property
    def fit_on_a_device(self) -> bool:
        """Whether `rows_on` may be called: the features are small enough to be held as one tensor."""
        return len(self) * self.width * 4 <= RESIDENT_BYTES

    def held_on(self, device: torch.device) -> Tensor:
        """All features, (N, D) float32 on `device`; read once and kept there."""
        held = self._held.get(device)
        if held is None:
            held = self._held[device] = torch.empty((len(self), self.width), dtype=torch.float32, device=device)
            start = 0
            for shard in self.shards:
                held[start : start + len(shard)] = torch.from_numpy(np.array(shard, np.float32))
                start += len(shard)
        return held

    def rows_on(self, device: torch.device, indices: Tensor) -> Tensor:
        """As `read` for indices (B,) int64 on `device`, and there; a GPU holds all features."""
        if device.type == "cpu":
            return torch.from_numpy(self.read(indices.numpy()))
        return self.held_on(device).index_select(0, indices)


@dataclass(frozen=True)
class Targets:
    """What a student learns from; filled with the inputs that the transfer's NEEDS name, and nothing else.

    Attributes:
        count: N.
        heads: pseudo-labels for each k in the order of the spec ("pseudo_labels"), or the images' own labels ("labels").
        features: the teacher's features ("features").
        size: side of the images in pixels; 0 if it is not known.
    """

    count: int
    heads: tuple[Labels, ...] = ()
    features: Features | None = None
    size: int = 0

    def require_features(self) -> Features:
        """`features`, which must be there.

        Raises:
            ValueError: there are no features.
        """
        if self.features is None:
            raise ValueError("this transfer reads the teacher's features, but there are none")
        return self.features
