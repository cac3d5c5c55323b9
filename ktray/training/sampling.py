"""How often an epoch shows each image: uniformly over clusters, so that large clusters do not drown out small ones.

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
    """An `order` for `Task` that shows every cluster equally often in each epoch.

    An epoch has as many draws as there are images that at least one clustering keeps. All clusters get the same number of
    draws, give or take one, and so do the images within a cluster: images of a small cluster repeat, and a large cluster is
    shown only in part. Several clusterings share the draws equally, give or take one.

    Args:
        clusterings: (N,) int64 each, -1 = left out; each has at least one image in a cluster.

    Returns:
        A function of an epoch's generator that returns image indices (n,) int64, in order.
    """
    labels = [torch.from_numpy(np.ascontiguousarray(clustering, dtype=np.int64)) for clustering in clusterings]
    total = int(torch.stack([entry >= 0 for entry in labels]).any(0).sum())
    parts = [total // len(labels) + (index < total % len(labels)) for index in range(len(labels))]

    def order(generator: torch.Generator) -> Tensor:
        drawn = torch.cat([_draw(entry, count, generator) for entry, count in zip(labels, parts, strict=True)])
        return drawn[torch.randperm(len(drawn), generator=generator)]

    return order


def _draw(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` images, taken from the clusters in turn; each cluster cycles through its images in random order."""
    images = torch.nonzero(labels >= 0).flatten()
    images = images[torch.randperm(len(images), generator=generator)]
    clusters, cluster, sizes = labels[images].unique(return_inverse=True, return_counts=True)
    images = images[cluster.argsort(stable=True)]  # cluster by cluster, shuffled within each
    starts = sizes.cumsum(0) - sizes
    turns = torch.arange(count)
    drawn_cluster = torch.randperm(len(clusters), generator=generator)[turns % len(clusters)]
    return images[starts[drawn_cluster] + (turns // len(clusters)) % sizes[drawn_cluster]]
