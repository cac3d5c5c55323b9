"""float32 products are float32 on a GPU, too, and TF32 and bfloat16 are what a spec asks for by name."""

from __future__ import annotations

import pytest
import torch

from ktray.ops.precision import autocast, products_in


@pytest.mark.parametrize(("precision", "rounded"), [("float32", False), ("tf32", True), ("bfloat16", False)])
def test_tf32_is_allowed_only_where_it_is_asked_for_and_the_callers_choice_comes_back(precision: str, rounded: bool) -> None:
    before = torch.backends.cudnn.allow_tf32
    seen = []

    def fail() -> None:
        with products_in(precision):
            seen.extend([torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32])
            raise RuntimeError("a failed training")

    with pytest.raises(RuntimeError, match="a failed training"):
        fail()
    assert seen == [rounded, rounded]
    assert torch.backends.cudnn.allow_tf32 is before
    assert torch.backends.cuda.matmul.allow_tf32 is False


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("tf32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_only_bfloat16_changes_the_type_of_a_product(precision: str, dtype: torch.dtype) -> None:
    with autocast(precision, torch.device("cpu")):
        assert (torch.ones(2, 3) @ torch.ones(3, 2)).dtype is dtype


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "below", "above"), [("float32", 1e-5, 0.0), ("tf32", 5e-3, 5e-5), ("bfloat16", 5e-2, 1e-3)]
)
def test_the_error_of_products_and_convolutions_on_a_gpu_is_that_of_their_precision(
    precision: str, below: float, above: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, matrix = torch.randn(256, 512, generator=generator), torch.randn(512, 128, generator=generator)
    images, kernels = torch.randn(8, 64, 16, 16, generator=generator), torch.randn(64, 64, 3, 3, generator=generator)
    convolve = torch.nn.functional.conv2d
    for operation, one, other in ((torch.matmul, rows, matrix), (convolve, images, kernels)):
        exact = operation(one.double(), other.double())
        with products_in(precision), autocast(precision, torch.device("cuda")):
            found = operation(one.cuda(), other.cuda()).cpu().double()
        error = float((found - exact).norm() / exact.norm())
        assert above <= error < below
