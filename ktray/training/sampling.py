"""Which images an epoch shows how often: uniformly over their clusters, so that large clusters do not drown small ones.

Source: Caron, Bojanowski, Joulin, Douze, "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018,
arXiv:1807.05520, section 3.3 ("Trivial parametrization").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IDENTITY, REVISION = "sampling", 1

Order = Callable[[torch.Generator], Tensor]


def uniform_over_clusters(clusterings: Sequence[NDArray[np.int64]]) -> Order:
    """The order of `Task` for epochs that show every cluster equally often.

    An epoch has as many images as any of the clusterings keeps. Clusters get the same number of draws, give or take one, and
    so do the images of one cluster: those of a small one come several times, of a large one not all come. With several
    clusterings each decides an equal part of the draws, give or take one.

    Args:
        clusterings: (N,) int64 each, -1 = left out; at least one image is in a cluster of each.

    Returns:
        A function of an epoch's generator: indices (n,) int64 of images, in order.
    """
    labels = [torch.from_numpy(np.ascontiguousarray(each, dtype=np.int64)) for each in clusterings]
    total = int(torch.stack([each >= 0 for each in labels]).any(0).sum())
    parts = [total // len(labels) + (place < total % len(labels)) for place in range(len(labels))]

    def order(generator: torch.Generator) -> Tensor:
        drawn = torch.cat([_draw(each, count, generator) for each, count in zip(labels, parts, strict=True)])
        return drawn[torch.randperm(len(drawn), generator=generator)]

    return order


def _draw(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` images by turns of the clusters, each cluster dealing its images in an order of its own, again and again."""
    images = torch.nonzero(labels >= 0).flatten()
    images = images[torch.randperm(len(images), generator=generator)]
    names, cluster, sizes = labels[images].unique(return_inverse=True, return_counts=True)
    images = images[cluster.argsort(stable=True)]  # cluster by cluster, shuffled within each
    starts = sizes.cumsum(0) - sizes
    turns = torch.arange(count)
    dealer = torch.randperm(len(names), generator=generator)[turns % len(names)]
    return images[starts[dealer] + (turns // len(names)) % sizes[dealer]]
