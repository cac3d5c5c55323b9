"""The nearest rows of a bank of features by cosine similarity, in blocks that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ktray import progress

IDENTITY, REVISION = "cosine_neighbours", 1

SIMILARITIES = 1 << 26  # most similarities held at once: 256 MiB


def nearest(bank: Tensor, queries: Tensor, k: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For blocks of queries in order: the number of the first, and similarities and rows (n, min(k, N)), the nearest first.

    Args:
        bank: (N, D) of length 1.
        queries: (M, D) of length 1, on the same device.
    """
    block = max(1, SIMILARITIES // max(len(bank), 1))
    for start in range(0, len(queries), block):
        similarities, rows = (queries[start : start + block] @ bank.T).topk(min(k, len(bank)), dim=1)
        progress.advance("judged", len(rows))
        yield start, similarities, rows


def votes(similarities: Tensor, owners: Tensor, classes: int, temperature: float | None) -> Tensor:
    """Votes (n, classes) float64 of neighbours, each with weight exp(similarity / temperature), or 1 if that is None.

    Weights are relative to that of the nearest, because exp(1 / temperature) overflows for small temperatures.

    Args:
        similarities: (n, k), the nearest first.
        owners: (n, k) classes of the neighbours.
    """
    if temperature is None:
        weights = torch.ones_like(similarities, dtype=torch.float64)
    else:
        weights = ((similarities - similarities[:, :1]).double() / temperature).exp()
    return weights.new_zeros(len(weights), classes).scatter_add_(1, owners, weights)
