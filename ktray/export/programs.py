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


def write_program(
    network: nn.Module, head: nn.Module | None, size: int, form: ProgramForm, folder: Path, from_pixels: bool = False
) -> Path:
    """Write the program (B, 3, size, size) float32 -> (B, D) or (B, K) float32 for any B >= 1 into `folder`; returns its path.

    Args:
        network: a backbone; it is put into eval mode.
        head: the classifier on its features, or None.
        size: side in pixels, the fixed height and width of the input.
        from_pixels: the program takes (B, H, W, 3) uint8 for any H and W instead: it crops, resizes and normalises as well.

    Raises:
        UserError: the network cannot be a program for any batch size, the program computes something else than the network,
            or the packages for ONNX are missing.
    """
    vectors, path = _ToVectors(network, head), folder / FILES[form]
    model = (_FromPixels(vectors, size) if from_pixels else vectors).eval()
    if form == "onnx":
        _require_onnx()
    with torch.no_grad(), _silenced():
        program = _traced(model, size, from_pixels)
        path.write_bytes(_pt2(program) if form == "pt2" else _onnx(program, from_pixels))
        compare(model, _loaded(path, form), size, f"the {form} program", _INSTEAD, from_pixels)
    return path


def compare(
    network: nn.Module,
    program: Callable[[Tensor], Tensor],
    size: int,
    what: str,
    instead: str,
    from_pixels: bool = False,
) -> None:
    """Run network and program on random images (B, 3, size, size), in batches of each size in `BATCHES`.

    Args:
        from_pixels: on (B, H, W, 3) uint8 instead, each batch of another height and width.
        what: how the error calls the program.
        instead: what the error advises.

    Raises:
        UserError: their outputs differ in shape, or by more than `TOLERANCE`, or the program does not run.
    """
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        images = 4 * torch.rand(batch, 3, size, size, generator=generator) - 2  # the range of normalised pixels
        if from_pixels:
            shape = (batch, size + 7 * batch, size + 2, 3)
            images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
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


class _FromPixels(nn.Module):
    """A network behind its preprocessing: (B, H, W, 3) uint8, cut to the centred square, resized as Pillow does it, normalised.

    Pillow's antialiased bilinear interpolation is one product with a matrix per axis, of triangles as wide as the reduction;
    values are rounded after each axis. `images.decoding.fit` is the same up to one grey level: Pillow's numbers are
    fixed-point, and of some tall images it resizes the columns first.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size
        self.register_buffer("middles", torch.arange(size, dtype=torch.float32) + 0.5)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.to(torch.float32).permute(0, 3, 1, 2)
        rows = torch.cumsum(torch.ones_like(pixels[0, 0, :, 0]), 0) - 0.5  # middles of the pixels
        columns = torch.cumsum(torch.ones_like(pixels[0, 0, 0, :]), 0) - 0.5
        side = torch.minimum(rows[-1], columns[-1]) + 0.5
        pixels = torch.floor(pixels @ self._weights(columns, side).transpose(0, 1) + 0.5)
        pixels = torch.floor(self._weights(rows, side) @ pixels + 0.5)
        features: Tensor = self.network(pixels * (4 / 255) - 2)  # as `augmentation.to_float`
        return features

    def _weights(self, places: Tensor, side: Tensor) -> Tensor:
        """(size, N): how much each of N pixels counts for each new one."""
        start, scale = (places[-1] + 0.5 - side) / 2, side / self.size
        centres = start + self.middles * scale  # type: ignore[operator]
        found = (1 - ((places[None] - centres[:, None]) / scale.clamp(min=1.0)).abs()).clamp(min=0)
        return found / found.sum(1, keepdim=True)


def _traced(model: nn.Module, size: int, from_pixels: bool) -> torch.export.ExportedProgram:
    example = torch.zeros(2, 3, size, size)  # two, because torch.export treats a batch of one as a constant
    free = {0: torch.export.Dim("batch", min=1)}
    if from_pixels:
        example = torch.zeros(2, size + 13, size + 5, 3, dtype=torch.uint8)
        free |= {1: torch.export.Dim("height", min=1), 2: torch.export.Dim("width", min=1)}
    try:
        return torch.export.export(model, (example,), dynamic_shapes={"images": free})
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


def _onnx(program: torch.export.ExportedProgram, from_pixels: bool) -> bytes:
    try:
        converted = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={
                "images": {0: "batch"} | ({1: "height", 2: "width"} if from_pixels else {})
            },  # only the name: `program` says which dimension is free
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
