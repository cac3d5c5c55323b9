"""Exported students: weights as safetensors, and a `student.json` with all that is needed to use them.

No file contains a path of this machine, and none contains code: weights load without pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ktray import __version__, plugins
from ktray.errors import UserError, disk_is_full
from ktray.export import programs, readme
from ktray.export.programs import ProgramForm, write_program
from ktray.fingerprint import canonical, file_sha256
from ktray.local_path import local_path
from ktray.spec import BackboneSpec, Student

FORMAT = "ktray-student/1"
WEIGHTS, CARD = "model.safetensors", "student.json"
Form = Literal["safetensors"] | ProgramForm
Head = Literal["classifier", "none"]
_INPUT = {  # what `augmentation.to_float` does, in the terms of other libraries
    "layout": "NCHW",
    "channels": "RGB",
    "dtype": "float32",
    "range": [0.0, 1.0],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}
_CHECKED = ("architecture", "feature_dim", "head", "input", "program", "files")
"""Fields of the card that its `checksum` covers: what the network is and takes. Notes may be added to the others."""
_PIXELS = {"dtype": "uint8", "layout": "NHWC", "size": "any"}  # of a program that includes the preprocessing

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
    from_pixels: bool = False,
) -> list[Path]:
    """Write `model.safetensors`, `README.md` and `student.json` to the new folder `out`, in this order; returns the paths.

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
        form: "pt2" and "onnx" add the same network as a program, `model.pt2` or `model.onnx`, which was run and compared.
        from_pixels: the program takes uint8 images of any size, and includes the preprocessing.

    Raises:
        UserError: `from_pixels` without a program, `out` is occupied or cannot be written, there is no classifier to export, or
            the network cannot be a program of this form (`programs.write_program`).
        OSError: the disk is full.
        RuntimeError: the snapshot does not fit the network of `student`.
    """
    if from_pixels and form == "safetensors":
        raise UserError("weights alone include no preprocessing", "--preprocessing", "Add --format pt2 or --format onnx.")
    _destination(out)
    saved = load_file(snapshot / "weights.safetensors")
    architecture = student.backbone.model_dump(mode="json")
    network, tensors = _empty(student.backbone), _part(saved, "backbone.")
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
        **({} if student.schedule.ema is None else {"weights": f"moving average of the training, ema={student.schedule.ema}"}),
        "input": {"size": [size, size], **_INPUT},
        **_portable({"metrics": metrics, "lineage": lineage}),
    }
    program = None
    if form != "safetensors":
        program = partial(write_program, network, _head(tensors, names), size, form, from_pixels=from_pixels)
        card["program"] = {"file": programs.FILES[form], "input": _PIXELS if from_pixels else card["input"]}
    return _write(out, tensors, card, program, readme.readme(card, form, from_pixels))


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
        backbone = plugins.parse("backbone", card["architecture"])
        if card.get("checksum", checksum := _checksum(card)) != checksum:  # cards of ktray 0.2 have none
            raise ValueError(f"{CARD} does not match its checksum")
        heads = set(card["head"]["tensors"]) if card["head"] else set()
        tensors = load_file(directory / WEIGHTS)
        if file_sha256(directory / WEIGHTS) != card["files"][WEIGHTS]["sha256"]:
            raise ValueError(f"{WEIGHTS} does not match its checksum")
        network = _empty(backbone)
        network.load_state_dict({name: tensor for name, tensor in tensors.items() if name not in heads})
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} contains no exported student: {Path(error.filename or WEIGHTS).name} is missing"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:  # of torch: other tensors
        why = " ".join(str(error).split())
        raise UserError(f"the student in {directory} is damaged ({why[:200]})", instead="Export it again.") from error
    return network.eval()


def _checksum(card: Mapping[str, Any]) -> str:
    """The sha256 of the fields of a card that say what the network is and takes."""
    return hashlib.sha256(canonical({name: card[name] for name in _CHECKED if name in card}).encode()).hexdigest()


def _empty(backbone: BackboneSpec) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # building draws weights, which must not change the caller's random state
        network: nn.Module = plugins.module_of("backbone", backbone).build(backbone)
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


def _destination(out: Path) -> Path:
    """The folder that `out` means, with links followed; it is absent or empty.

    Raises:
        UserError: something is there already, or no folder can be there.
    """
    instead = "Name a new folder; nothing is overwritten."
    try:
        out = local_path(out, "")
        for link in filter(os.path.islink, (out, *out.parents)):
            if not link.resolve().exists():
                raise UserError(f"{link} is a link to {os.readlink(link)}, which does not exist", instead=instead)
        place = out.resolve()
        if place.exists() and not place.is_dir():
            raise UserError(f"{out} exists and is not an empty folder", instead=instead)
        if found := sorted(path.name for path in place.iterdir()) if place.exists() else []:
            raise UserError(f"{out} exists and is not an empty folder: {found[0]} is in it", instead=instead)
    except (OSError, RuntimeError, ValueError) as error:  # no permission, a circle of links, an unknown user, a null byte
        raise _cannot_write(out, error) from error
    return place


def _cannot_write(out: Path, error: Exception) -> UserError:
    path = str(out) if len(str(out)) <= 300 else f"{str(out)[:300]}…"
    reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    return UserError(f"the student cannot be written to {path}: {reason}", instead="Nothing was written. Name another folder.")


def _write(
    out: Path, tensors: dict[str, Tensor], card: dict[str, Any], add_program: Callable[[Path], Path] | None, text: str
) -> list[Path]:
    place = _destination(out)
    made = [folder for folder in place.parents if not folder.exists()]
    # A folder that exists keeps its rights, and may be a mount point: the files are moved into it. Else the scratch becomes it.
    scratch = (place if place.exists() else place.parent) / f".ktray-export-{uuid.uuid4().hex[:8]}"
    try:
        scratch.mkdir(parents=True)
        names = _write_files(scratch, tensors, card, add_program, text)
        if scratch.parent == place:
            _move_files(scratch, place, names)
        else:
            scratch.rename(place)  # fails if somebody has made it meanwhile, unless it is an empty folder
    except (OSError, SafetensorError) as error:
        if _is_full(error, scratch):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error
        raise _cannot_write(out, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # after a success it is not empty
                folder.rmdir()
    return [local_path(out, "") / name for name in names]


def _write_files(
    folder: Path, tensors: dict[str, Tensor], card: dict[str, Any], add_program: Callable[[Path], Path] | None, text: str
) -> list[str]:
    """Write all files; their names, the card's last."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})  # required by readers such as transformers
    files = [folder / WEIGHTS, *([add_program(folder)] if add_program else [])]
    card["files"] = {path.name: {"sha256": file_sha256(path), "size": path.stat().st_size} for path in files}
    card["checksum"] = _checksum(card)
    (folder / CARD).write_text(json.dumps(card, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    (folder / readme.FILE).write_text(text, encoding="utf-8")
    for path in files:
        path.chmod((folder / CARD).stat().st_mode)  # safetensors makes files readable only by their owner
    return [*(path.name for path in files), readme.FILE, CARD]


def _move_files(scratch: Path, place: Path, names: list[str]) -> None:
    moved: list[Path] = []
    try:
        for name in names:
            if (place / name).exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
            (scratch / name).rename(place / name)
            moved.append(place / name)
    except BaseException:
        for path in moved:
            path.unlink()
        raise


def _is_full(error: OSError | SafetensorError, folder: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return disk_is_full(error, folder)  # safetensors hides the errno
