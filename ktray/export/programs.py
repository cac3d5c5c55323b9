"""Programs: a network as pt2 or ONNX, for batches of any size. Each is run and compared with torch before it is kept."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ktray.errors import UserError

ProgramForm = Literal["pt2", "onnx"]
FILES: dict[ProgramForm, str] = {"pt2": "model.pt2", "onnx": "model.onnx"}
BATCHES = (1, 3, 8)  # sizes at which a program is compared with its network; none is that of the example it was traced with
TOLERANCE = 1e-4  # of the largest output; all backbones and a dozen models of timm stay below 2e-6
_OPSET = 18
_INSTEAD = "Nothing was written. Export the weights alone, without --format."


def write_program(network: nn.Module, head: nn.Module | None, size: int, form: ProgramForm, folder: Path) -> Path:
    """Write the program (B, 3, size, size) float32 -> (B, D) or (B, K) float32 for any B >= 1 into `folder`; returns its path.

    Args:
        network: a backbone; it is put into eval mode.
        head: the classifier on its features, or None.
        size: side in pixels, the fixed height and width of the input.

    Raises:
        UserError: the network cannot be a program for any batch size, the program computes something else than the network,
            or the packages for ONNX are missing.
    """
    model, path = _ToVectors(network, head).eval(), folder / FILES[form]
    if form == "onnx":
        _require_onnx()
    with torch.no_grad(), _silenced():
        program = _traced(model, size)
        path.write_bytes(_pt2(program) if form == "pt2" else _onnx(program))
        compare(model, _loaded(path, form), size, f"the {form} program", _INSTEAD)
    return path


def compare(network: nn.Module, program: Callable[[Tensor], Tensor], size: int, what: str, instead: str) -> None:
    """Run network and program on random images (B, 3, size, size), in batches of each size in `BATCHES`.

    Args:
        what: how the error calls the program.
        instead: what the error advises.

    Raises:
        UserError: their outputs differ in shape, or by more than `TOLERANCE`, or the program does not run.
    """
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        images = 4 * torch.rand(batch, 3, size, size, generator=generator) - 2  # the range of normalised pixels
        with torch.no_grad():
            expected = network(images)
            try:
                found = program(images)
            except Exception as error:  # whatever the runtime raises, the program is of no use
                raise UserError(f"{what} does not run on {batch} images: {_first_line(error)}", instead=instead) from error
        if found.shape != expected.shape:
            shapes = f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
            raise UserError(f"{what} yields {shapes} for {batch} images", instead=instead)
        difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
        if not difference <= TOLERANCE * largest:  # also if either is NaN
            raise UserError(
                f"{what} does not compute what the network does: at {batch} images the outputs differ by {difference:.2g}, "
                f"the largest is {largest:.2g}",
                instead=instead,
            )


class _ToVectors(nn.Module):
    """A network with its classifier, if there is one; the output is one vector per image."""

    def __init__(self, network: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.network, self.head = network, head or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.head(self.network(images))
        return features


def _traced(model: nn.Module, size: int) -> torch.export.ExportedProgram:
    example = torch.zeros(2, 3, size, size)  # two, because torch.export treats a batch of one as a constant
    try:
        return torch.export.export(model, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}})
    except Exception as error:  # torch.export raises a dozen kinds, and passes on what the network raises
        problem = f"torch.export cannot make a program for every batch size of this network: {_first_line(error)}"
        raise UserError(problem, instead=_INSTEAD) from error


def _pt2(program: torch.export.ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401 - torch needs both, but reports a missing one late and less clearly
        import onnxruntime  # noqa: F401 - runs the program before it is kept
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"ONNX needs the package {error.name or 'onnxscript'}",
            "--format onnx",
            "Install it with: pip install 'ktray[onnx]'.",
        ) from error


def _onnx(program: torch.export.ExportedProgram) -> bytes:
    try:
        converted = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"images": {0: "batch"}},  # only the name: `program` says which dimension is free
            opset_version=_OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        assert converted is not None
        return bytes(converted.model_proto.SerializeToString())
    except Exception as error:  # the converter raises many kinds, protobuf its own above 2 GB
        raise UserError(f"torch.onnx cannot convert this network: {_first_line(error)}", instead=_INSTEAD) from error


def _loaded(path: Path, form: ProgramForm) -> Callable[[Tensor], Tensor]:
    """The program as it lies on disk, as a function of images."""
    if form == "pt2":
        loaded: nn.Module = torch.export.load(path).module()
        return loaded
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it writes to the terminal past Python
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip(" -")]
    return f"{type(error).__name__}: {lines[0].strip()[:300]}" if lines else type(error).__name__


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
