"""Students as programs that run without ktray and without its classes: torch.export's `.pt2`, or ONNX."""

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
    """A network and, where there is one, the classifier on it; its output is always one vector per image."""

    def __init__(self, network: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.network, self.head = network, head or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.head(self.network(images))
        return features


def write(network: nn.Module, head: nn.Module | None, size: int, form: Form, out: Path) -> Path:
    """Write the program (B, 3, size, size) float32 -> (B, D) or (B, K) float32 for any B >= 1 into `out`; its path.

    Args:
        network: a backbone; it is put into eval mode.
        head: the classifier on its features, or None.
        size: side in pixels; height and width of the input are fixed to it.

    Raises:
        UserError: the packages that write ONNX are not installed.
    """
    model, path = _ToVectors(network, head).eval(), out / NAMES[form]
    example = torch.zeros(2, 3, size, size)  # two: torch.export takes a batch of one for a constant
    batch = {"images": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad(), _in_silence():
        if form == "pt2":
            torch.export.save(torch.export.export(model, (example,), dynamic_shapes=batch), path)
        else:
            _write_onnx(model, example, path)
    return path


def _write_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    try:
        import onnx  # noqa: F401 - torch asks for both late, and with words of its own
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
def _in_silence() -> Iterator[None]:
    """torch's exporters print what they do, and warn of their own internals."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
