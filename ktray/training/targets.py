"""What a transfer may read of the images that its student is trained on: pseudo-labels or labels, and the teacher's features.

Legend: N images of the transfer data's training split, K classes of one head, D width of the teacher's features, B images of
a batch, m nearest clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktray.errors import UserError

# Up to here all features are held on the device; beyond, and on the CPU, each batch reads its rows from the files.
RESIDENT_BYTES = {"cuda": 4 << 30}


def require_images(k: int, count: int) -> None:
    """Refuse more clusters, or other classes, than there are images to make them of.

    Raises:
        UserError: `k` is larger than `count`.
    """
    if k > count:
        raise UserError(
            f"k={k} clusters cannot be made of {count} images", "k", f"Use at most {count}, better a hundredth of it."
        )


@dataclass(frozen=True)
class Labels:
    """One class per image.

    Attributes:
        of_image: (N,) int64 in [-1, classes), -1 = left out.
        classes: K.
        nearest: (N, m) integers in [0, classes), each image's nearest clusters, the nearest first; None if the transfer asked
            for none.
        squared: (N, m) float32, squared distances to them in the projected space, ascending.
    """

    of_image: NDArray[np.int64]
    classes: int
    nearest: NDArray[np.integer] | None = None
    squared: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Features:
    """The teacher's features of all images, (N, D), read by index.

    Attributes:
        shards: arrays of (n, D) float32 or float16, memory-mapped or not, one after the other.
    """

    shards: Sequence[NDArray[np.floating]]
    _held: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    @property
    def width(self) -> int:
        """D."""
        return int(self.shards[0].shape[1])

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows of these images, (B, D) float32, in their order.

        Raises:
            IndexError: an index is not in [0, N).
        """
        starts = np.cumsum([0, *map(len, self.shards)])
        if len(indices) and not 0 <= indices.min() <= indices.max() < starts[-1]:
            raise IndexError(f"rows [{indices.min()}, {indices.max()}] of {starts[-1]}")
        home = np.searchsorted(starts, indices, side="right") - 1
        rows = np.empty((len(indices), self.width), np.float32)
        for shard in np.unique(home):
            here = home == shard
            rows[here] = self.shards[shard][indices[here] - starts[shard]]
        return rows

    def on(self, device: torch.device, indices: Tensor) -> Tensor:
        """The rows of these images (B,) int64 as (B, D) float32 on `device`: the same values, held there or read now."""
        if len(self) * self.width * 4 > RESIDENT_BYTES.get(device.type, 0):
            return torch.from_numpy(self.read(indices.numpy())).to(device)
        held = self._held.get(str(device))
        if held is None:
            held = self._held[str(device)] = torch.empty((len(self), self.width), dtype=torch.float32, device=device)
            start = 0
            for shard in self.shards:
                held[start : start + len(shard)] = torch.from_numpy(np.array(shard, np.float32))
                start += len(shard)
        return held.index_select(0, indices.to(device, non_blocking=True))


@dataclass(frozen=True)
class Targets:
    """What there is to learn from; a transfer finds here what its NEEDS ask for, and nothing else.

    Attributes:
        count: N.
        heads: pseudo-labels of each k in the order of the spec ("pseudo_labels"), or the images' own labels ("labels").
        features: of the teacher ("features").
    """

    count: int
    heads: tuple[Labels, ...] = ()
    features: Features | None = None

    def require_features(self) -> Features:
        """The features.

        Raises:
            ValueError: there are none.
        """
        if self.features is None:
            raise ValueError("this transfer reads the teacher's features, and there are none")
        return self.features
