"""How a GPU rounds the inputs of products and convolutions (TF32, bfloat16, float16, or not), and in which order it sums."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Within a `with`, products and convolutions of float32 on a GPU round their inputs to TF32 if, and only if, asked to.

    PyTorch's own default rounds those of convolutions, so that float32 would not be what it says. On a CPU nothing changes.
    bfloat16 and float16 need `autocast` as well.

    Args:
        precision: "float32", "tf32" (10 bits of mantissa, and float32 sums), "bfloat16" or "float16".
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with warnings.catch_warnings():  # newer releases of PyTorch recommend names that older ones do not have
        warnings.simplefilter("ignore", UserWarning)
        before = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            matmul.allow_tf32, cudnn.allow_tf32 = before


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context for a forward pass: products and convolutions in bfloat16 or float16 if `precision` says so; weights stay."""
    return torch.autocast(device.type, _AUTOCAST.get(precision, torch.bfloat16), enabled=precision in _AUTOCAST)


@contextmanager
def computing_in(precision: str, device: torch.device | str) -> Iterator[None]:
    """Within a `with`, a network's products and convolutions have this precision: `products_in` and `autocast`."""
    with products_in(precision), autocast(precision, torch.device(device)):
        yield


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Within a `with`, gradients of convolutions on a GPU have the same bits every time: no sums in the order of arrival."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
