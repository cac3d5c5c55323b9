"""Which share of which GPU is free: a whole GPU in two halves of two cards is none. Pure, a part of the registry's books."""

from __future__ import annotations

import math
from collections.abc import Sequence

SLACK = 1e-6


def free_shares(count: float, held: Sequence[tuple[float, tuple[str, ...]]]) -> dict[str, float]:
    """Card -> share that is free.

    Args:
        count: cards of the node.
        held: (share or number of GPUs, names of the cards) of each worker; without names while it is still starting. Such a
            worker is thought where Ray puts it: a share onto the fullest card that still has room, whole ones onto free cards.
    """
    named = sorted({card for _, cards in held for card in cards})
    free = dict.fromkeys([*named, *(f"unnamed {number}" for number in range(int(count) - len(named)))], 1.0)
    for share, cards in held:
        for card in cards:
            free[card] -= share if share < 1 else 1.0
    for share, cards in held:
        if cards or not share:
            continue
        rooms = [card for card in free if free[card] >= min(share, 1.0) - SLACK]
        for card in sorted(rooms, key=lambda card: (free[card], card))[: max(1, math.ceil(share))]:
            free[card] -= min(share, 1.0)
    return free


def has_room(free: dict[str, float], gpus: float) -> bool:
    """Whether a worker with this share, or number, of GPUs can start."""
    if not gpus:
        return True
    return sum(share >= min(gpus, 1.0) - SLACK for share in free.values()) >= math.ceil(gpus)
