"""Export of students as programs that run without ktray: torch.export's `.pt2`, or ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ktray.errors import UserError

Form = Literal["pt2", "onnx"]
NAMES: dict[Form, str] = {"pt2": "model.pt2", "onnx": "model.onnx"}
OPSET = 18


class _ToVectors(nn.Module):
    """A network with its classifier, if there is one; the output is one vector per image."""

    def __init__(self, network: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.network, self.head = network, head or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.head(self.network(images))
        return features


def write(network: nn.Module, head: nn.Module | None, size: int, form: Form, out: Path) -> Path:
    """Write the program (B, 3, size, size) float32 -> (B, D) or (B, K) float32 for any B >= 1 to `out`; returns its path.

    Args:
        network: a backbone; it is put into eval mode.
        head: the classifier on its features, or None.
        size: side in pixels, the fixed height and width of the input.

    Raises:
        UserError: the packages for ONNX are not installed.
    """
    model, path = _ToVectors(network, head).eval(), out / NAMES[form]
    example = torch.zeros(2, 3, size, size)  # two, because torch.export treats a batch of one as a constant
    batch = {"images": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad(), _silenced():
        if form == "pt2":
            torch.export.save(torch.export.export(model, (example,), dynamic_shapes=batch), path)
        else:
            _write_onnx(model, example, path)
    return path


def _write_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    try:
        import onnx  # noqa: F401 - torch needs both, but reports a missing one late and less clearly
        import onnxscript  # noqa: F401

        torch.onnx.export(
            model,
            (example,),
            path,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": {0: torch.export.Dim.AUTO}},
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except ImportError as error:
        raise UserError(
            f"ONNX needs the package {error.name or 'onnxscript'}",
            "--format onnx",
            "Install it with: pip install 'ktray[onnx]'.",
        ) from error


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Suppress the output of torch's exporters, which print progress and warn about their own internals."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
