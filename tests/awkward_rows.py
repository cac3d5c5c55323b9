"""Rows on which a clustering that is not exact would depend on the processor: ties, duplicates, midpoints, extreme values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

N, WIDTH, K = 300, 24, 20


def tables() -> dict[str, NDArray[np.float32]]:
    """Name -> rows (N, WIDTH)."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(N, WIDTH)) + rng.normal(size=(12, WIDTH))[rng.integers(0, 12, N)] * 2
    lattice = rng.integers(-2, 3, (N, WIDTH)).astype(float)
    sparse = np.where(rng.random((N, WIDTH)) < 0.8, 0, np.abs(plain))
    found = {
        "plain": plain,
        "lattice": lattice,
        "duplicates": plain[rng.integers(0, 3 * K, N)],
        "midpoints": (plain[rng.integers(0, 40, N)] + plain[rng.integers(0, 40, N)]) / 2,
        "huge": plain * 1e17,
        "tiny": plain * 1e-38,
        "norms from 1e-3 to 1e3": plain * np.logspace(-3, 3, N)[:, None],
        "an outlier": np.concatenate([plain[:-1], plain[-1:] * 1e4]),
        "constant columns": np.where(np.arange(WIDTH) % 2 == 0, 7.25, plain),
        "far from zero": plain + 8000,
        "zeros": sparse,
        "rows of zeros": np.where(rng.random((N, 1)) < 0.3, 0, plain),
        "one column": np.pad(lattice[:, :1] * plain[:, :1], ((0, 0), (0, WIDTH - 1))),
    }
    return {name: rows.astype(np.float32) for name, rows in found.items()}
