"""Exported students: weights as safetensors, and a `student.json` with all that is needed to use them.

No file contains a path of this machine, and none contains code: weights load without pickle.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ktray import __version__, plugins
from ktray.errors import UserError
from ktray.fingerprint import file_sha256
from ktray.spec import Student

FORMAT = "ktray-student/1"
WEIGHTS, CARD = "model.safetensors", "student.json"
Form = Literal["safetensors", "pt2", "onnx"]
Head = Literal["classifier", "none"]
_INPUT = {  # what `augmentation.to_float` does, in the terms of other libraries
    "layout": "NCHW",
    "channels": "RGB",
    "dtype": "float32",
    "range": [0.0, 1.0],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}

# The directories of an absolute path in any string: /home/me/x -> x, parquet:/data/a.parquet -> parquet:a.parquet; not s3://b/x.
_DIRECTORIES = re.compile(r"(?<![\w./~])(?:file://)?~?/(?!/)(?:[^/?\n]+/)*|\b[A-Za-z]:\\(?:[^\\\n]+\\)*")


def export_student(
    snapshot: Path,
    student: Student,
    size: int,
    metrics: Mapping[str, float],
    lineage: Mapping[str, Any],
    out: Path,
    classes: int | None,
    head: Head = "none",
    form: Form = "safetensors",
) -> list[Path]:
    """Write `model.safetensors` and `student.json` to the new folder `out`, the latter last, and return the paths.

    Tensors are named as in the backbone; the pseudo-label classifier gets the name in the backbone's `HEAD`, such as `fc`. A
    "full" resnet of width 1 therefore loads strictly into torchvision's class once its `fc` is replaced by a linear layer
    with the right number of classes, or by the identity; `student.json` shows how. The folder appears complete or not at all.

    Args:
        snapshot: directory with `weights.safetensors` ("backbone.*", "head.*") as from `loop.fit`.
        size: side in pixels of the images that the student was trained on.
        metrics: the metrics of the student; numbers that are not finite become null.
        lineage: its origin, such as the keys of its stages; absolute paths are reduced to their last part.
        out: absent or empty.
        classes: width K of the student's linear classifier, or None if its transfer has none.
        head: "classifier" exports this classifier with the backbone, "none" only the backbone.
        form: "pt2" and "onnx" add the same network as a program, `model.pt2` or `model.onnx`.

    Raises:
        UserError: `out` is not empty, there is no classifier to export, or a package for ONNX is missing.
        RuntimeError: the snapshot does not fit the network of `student`.
    """
    _require_empty(out)
    saved = load_file(snapshot / "weights.safetensors")
    architecture = student.backbone.model_dump(mode="json")
    network, tensors = _empty(architecture), _part(saved, "backbone.")
    network.load_state_dict(tensors)
    names = _head_names(saved, architecture["kind"], classes) if head == "classifier" else {}
    tensors |= {new: saved[old].contiguous() for old, new in names.items()}
    card = {
        "format": FORMAT,
        "ktray": __version__,
        "architecture": architecture,
        "feature_dim": int(network.feature_dim),  # type: ignore[arg-type]
        "head": {"classes": classes, "tensors": sorted(names.values())} if names else None,
        "torchvision": _torchvision(student.backbone, int(network.feature_dim), classes if names else None),  # type: ignore[arg-type]
        "input": {"size": [size, size], **_INPUT},
        **_portable({"metrics": metrics, "lineage": lineage}),
    }
    program = None if form == "safetensors" else partial(_write_program, network, _head(tensors, names), size, form)
    return _write(out, tensors, card, program)


def load_student(directory: Path) -> nn.Module:
    """The backbone of an exported folder, in eval mode on the CPU.

    It maps (B, 3, H, W) float32, as from `augmentation.to_float`: (x / 255 - 0.5) / 0.25, to (B, feature_dim) float32.

    Raises:
        UserError: the folder contains no exported student, it is damaged, or its kind of backbone is unknown or not allowed.
    """
    directory = Path(directory)
    try:
        card = json.loads((directory / CARD).read_text())
        if card["format"] != FORMAT:
            raise UserError(f"{directory} has the format {card['format']!r}, but this version of ktray reads {FORMAT}")
        heads = set(card["head"]["tensors"]) if card["head"] else set()
        tensors = load_file(directory / WEIGHTS)
        intact = file_sha256(directory / WEIGHTS) == card["files"][WEIGHTS]["sha256"]
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} contains no exported student: {Path(error.filename or WEIGHTS).name} is missing"
        ) from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"the student in {directory} is damaged ({error})", instead="Export it again.") from error
    if not intact:
        raise UserError(
            f"the student in {directory} is damaged ({WEIGHTS} does not match its checksum)", instead="Export it again."
        )
    network = _empty(card["architecture"])
    network.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in heads})
    return network.eval()


def _empty(architecture: Mapping[str, Any]) -> nn.Module:
    spec = plugins.parse("backbone", architecture)
    with torch.random.fork_rng(devices=[]):  # building draws weights, which must not change the caller's random state
        network: nn.Module = plugins.module_of("backbone", spec).build(spec)
    return network


def _part(saved: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor.contiguous() for name, tensor in saved.items() if name.startswith(prefix)}


def _head_names(saved: Mapping[str, Tensor], kind: str, classes: int | None) -> dict[str, str]:
    """Name in the snapshot -> name in the export, for weight and bias of the classifier."""
    found = {name for name in saved if name.startswith("head.")}
    if classes is None or found != {"head.weight", "head.bias"}:
        raise UserError("this student has no linear classifier to export", instead="Export it without a head.")
    if len(saved["head.bias"]) != classes:
        raise ValueError(f"the classifier has {len(saved['head.bias'])} classes, not {classes}")
    new = getattr(plugins.module("backbone", kind), "HEAD", "head")
    return {f"head.{tensor}": f"{new}.{tensor}" for tensor in ("weight", "bias")}


def _head(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> nn.Linear | None:
    """The exported classifier as a module, if there is one."""
    if not names:
        return None
    weight, bias = tensors[names["head.weight"]], tensors[names["head.bias"]]
    with torch.random.fork_rng(devices=[]):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


def _torchvision(backbone: Any, features: int, classes: int | None) -> str | None:
    """Code for the torchvision model that these weights fit; None if there is none."""
    module = plugins.module_of("backbone", backbone)
    model = module.in_torchvision(backbone) if hasattr(module, "in_torchvision") else None
    if model is None:
        return None
    head = re.sub(r"\.(\d+)", r"[\1]", module.HEAD)
    layer = "torch.nn.Identity()" if classes is None else f"torch.nn.Linear({features}, {classes})"
    return f"torchvision.models.{model}{'; ' if ' with ' in model else ' with '}{head} = {layer}"


def _portable(value: Any) -> Any:
    """`value` as JSON to share: absolute paths reduced to their last part, numbers that are not finite replaced by null."""
    if isinstance(value, Mapping):
        return {str(name): _portable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if isinstance(value, str | Path):
        return _DIRECTORIES.sub("", str(value))
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _require_empty(out: Path) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder", instead="Name a new folder; nothing is overwritten.")


def _write(out: Path, tensors: dict[str, Tensor], card: dict[str, Any], program: Callable[[Path], Path] | None) -> list[Path]:
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})  # required by readers such as transformers
        files = [scratch / WEIGHTS, *([program(scratch)] if program else [])]
        card["files"] = {path.name: {"sha256": file_sha256(path), "size": path.stat().st_size} for path in files}
        (scratch / CARD).write_text(json.dumps(card, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
        for path in files:
            path.chmod((scratch / CARD).stat().st_mode)  # safetensors makes files readable only by their owner
        try:
            scratch.rename(out)  # fails if the folder is no longer empty
        except OSError:
            _require_empty(out)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [*(out / path.name for path in files), out / CARD]


_ProgramForm = Literal["pt2", "onnx"]
_PROGRAM_NAMES: dict[_ProgramForm, str] = {"pt2": "model.pt2", "onnx": "model.onnx"}
_OPSET = 18


class _ToVectors(nn.Module):
    """A network with its classifier, if there is one; the output is one vector per image."""

    def __init__(self, network: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.network, self.head = network, head or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.head(self.network(images))
        return features


def _write_program(network: nn.Module, head: nn.Module | None, size: int, form: _ProgramForm, out: Path) -> Path:
    """Write the program (B, 3, size, size) float32 -> (B, D) or (B, K) float32 for any B >= 1 to `out`; returns its path.

    Args:
        network: a backbone; it is put into eval mode.
        head: the classifier on its features, or None.
        size: side in pixels, the fixed height and width of the input.

    Raises:
        UserError: the packages for ONNX are not installed.
    """
    model, path = _ToVectors(network, head).eval(), out / _PROGRAM_NAMES[form]
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
            opset_version=_OPSET,
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
