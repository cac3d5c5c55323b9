"""Weights that were trained elsewhere: torchvision or timm files, exported students, snapshots of another training."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ktray import plugins
from ktray.errors import UserError
from ktray.fingerprint import file_sha256
from ktray.training.snapshot import write_untrained

ARTIFACT = re.compile(r"(teacher|student)-[0-9a-f]{12}")
"""A checkpoint of this form is the key of an artifact; anything else is a path."""

WHERE = "teacher.checkpoint"
_INSTEAD = "Give a .safetensors file, a state_dict saved by torch.save, an exported student's folder, or an artifact's key."
_STUDENT = ("model.safetensors", "student.json")  # as in `export`
_SNAPSHOT = "weights.safetensors"
_PREFIXES = (
    "module.",
    "backbone.",
    "model.",
)  # from data-parallel training, from ktray, and from Lightning or ktray's timm networks
_HEADS = ("fc.", "classifier.", "head.", "heads.")
_COUNTER = "num_batches_tracked"  # missing in files from before PyTorch 0.4.1; only read if momentum is None
_NAMES_SHOWN = 3


def weights_file(checkpoint: Path) -> Path:
    """The file with the weights: `checkpoint` itself, or the one in the folder of an exported student or a snapshot.

    Raises:
        UserError: there is no such file or folder, or the folder contains neither.
    """
    if checkpoint.is_file():
        return checkpoint
    for name in (_STUDENT[0], _SNAPSHOT):
        if (checkpoint / name).is_file():
            return checkpoint / name
    if checkpoint.is_dir():
        raise UserError(f"the folder {checkpoint.name} contains neither {_STUDENT[0]} nor {_SNAPSHOT}", WHERE, _INSTEAD)
    raise UserError(f"there is no file {checkpoint.name} in {checkpoint.parent}", WHERE, _INSTEAD)


def import_weights(backbone_spec: Any, checkpoint: Path, directory: Path) -> int:
    """Write a snapshot of epoch 0 with weights trained elsewhere; returns the number of parameters of the backbone.

    A classifier (`fc`, `classifier`, `head`, `heads`) is dropped; all other tensors must match the backbone's by name.
    Names may start with "backbone.", "model." or, after data-parallel training, with "module.".

    Args:
        checkpoint: safetensors, a state_dict (bare, or under "state_dict" or "model") that loads with `weights_only`, or a
            folder as for `weights_file`.

    Raises:
        UserError: no such file, not a weights file, weights of another architecture, or weights that are not finite.
    """
    backbone = plugins.module_of("backbone", backbone_spec).build(backbone_spec)
    names = {_without_prefixes(name): name for name in backbone.state_dict()}
    wanted = {bare: backbone.state_dict()[name] for bare, name in names.items()}
    found = {_without_prefixes(name): tensor for name, tensor in _tensors(checkpoint).items()}
    for name in wanted:
        if name.endswith(_COUNTER):
            found.setdefault(name, wanted[name])
    found = {name: tensor for name, tensor in found.items() if name in wanted or not _is_dropped(name)}
    _require_same_architecture(checkpoint, wanted, found)
    _require_finite(checkpoint, found)
    backbone.load_state_dict({names[bare]: tensor for bare, tensor in found.items()})
    write_untrained(backbone, directory)
    return sum(parameter.numel() for parameter in backbone.parameters())


def require_readable(checkpoint: Path) -> None:
    """Raise if `import_weights` could not read the file, so that a plan finds out; loads no tensors if the format allows it.

    Raises:
        UserError: no such file, or not a weights file.
    """
    _tensors(checkpoint, mapped=True)


def _without_prefixes(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _is_dropped(name: str) -> bool:
    return name.startswith(_HEADS) or name.endswith(_COUNTER)


def _require_same_architecture(checkpoint: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing = [f"{n} of shape {tuple(w.shape)}" for n, w in wanted.items() if n not in found or found[n].shape != w.shape]
    unexpected = [f"{n} of shape {tuple(t.shape)}" for n, t in found.items() if n not in wanted or wanted[n].shape != t.shape]
    if not missing and not unexpected:
        return
    differences = [f"{verb} {_listed(names)}" for verb, names in (("has no", missing), ("has", unexpected)) if names]
    recorded = _architecture(checkpoint)
    source = f"{checkpoint.name}, the weights of {recorded}," if recorded else checkpoint.name
    raise UserError(
        f"{source} is of another architecture: it {', but '.join(differences)} (the backbone has {len(wanted)} tensors)",
        WHERE,
        "Give the backbone (kind, depth or size, form, width) that these weights were trained with.",
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _require_finite(checkpoint: Path, found: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in found.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{checkpoint.name} has weights that are not finite, in {_listed(broken)}", WHERE, "Train it again.")


def _architecture(checkpoint: Path) -> str:
    """The architecture recorded with an exported student; empty for other checkpoints."""
    try:
        return str(json.loads((checkpoint / _STUDENT[1]).read_text())["architecture"])
    except (OSError, ValueError, KeyError):
        return ""


def _tensors(checkpoint: Path, mapped: bool = False) -> dict[str, Tensor]:
    """Name -> tensor on the CPU; if `mapped`, read from the file on use, except for files written by torch before 1.6."""
    from pickle import UnpicklingError  # raised at the first object that is not a tensor; nothing is unpickled

    from safetensors import SafetensorError

    path = weights_file(checkpoint)
    try:
        if (checkpoint / _STUDENT[1]).is_file():
            _require_intact(checkpoint, path)
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(
            action="ignore"
        ):  # torch warns of old pickle protocols; files that are refused get a message here
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(f"{path.name} must contain tensors and nothing else", WHERE, _INSTEAD) from error
    state: Any = content
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise UserError(f"{path.name} contains no named tensors", WHERE, _INSTEAD)
    return {name: tensor for name, tensor in state.items() if isinstance(name, str) and isinstance(tensor, Tensor)}


def _require_intact(folder: Path, weights: Path) -> None:
    try:
        expected = json.loads((folder / _STUDENT[1]).read_text())["files"][weights.name]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the student in {folder.name} is damaged: {_STUDENT[1]}", WHERE, "Export it again.") from error
    if file_sha256(weights) != expected:
        raise UserError(f"the student in {folder.name} is damaged: {weights.name}", WHERE, "Export it again.")
