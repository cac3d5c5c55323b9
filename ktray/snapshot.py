"""A training at the end of one epoch, as a directory: all that its next epoch and its features depend on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ktray import plugins
from ktray.errors import UserError

_BACKBONE = "backbone."


def write(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, history: list[dict[str, Any]]) -> None:
    """Write weights.safetensors, optimizer.safetensors, history.parquet and, last, state.json {"epoch"}.

    Args:
        model: its state_dict names the weights, so `nn.ModuleDict` of "backbone" and, where there is one, "head".
        optimizer: its buffers are saved as "<parameter>/<buffer>"; None for what was never trained.
        history: one row per epoch from 1 on, all of the same columns.
    """
    import pyarrow
    from pyarrow import parquet

    directory.mkdir(parents=True, exist_ok=True)
    save_file(_plain(model.state_dict()), directory / "weights.safetensors")
    buffers: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, buffer in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            if buffer is not None:  # SGD without momentum keeps a None
                buffers[f"{name}/{key}"] = buffer
    save_file(_plain(buffers), directory / "optimizer.safetensors")
    columns = list(history[0]) if history else ["epoch", "loss", "lr"]
    types = {column: pyarrow.int64() if column == "epoch" else pyarrow.float64() for column in columns}
    parquet.write_table(pyarrow.Table.from_pylist(history, pyarrow.schema(types)), directory / "history.parquet")
    (directory / "state.json").write_text(json.dumps({"epoch": len(history)}) + "\n")


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def resume(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Bring `model` and `optimizer` to the state that `write` saw, bit for bit; the history until then.

    Raises:
        ValueError: history and state are not of the same epoch.
        RuntimeError: the weights are of another model.
    """
    from pyarrow import parquet

    model.load_state_dict(load_file(directory / "weights.safetensors"))
    parameters = dict(model.named_parameters())
    for path, saved in load_file(directory / "optimizer.safetensors").items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        if key != "step":  # which stays on the CPU; the others go where and as their parameter lies
            saved = torch.empty_like(parameter, requires_grad=False).copy_(saved)
        optimizer.state[parameter][key] = saved
    history = parquet.read_table(directory / "history.parquet").to_pylist()
    epoch = json.loads((directory / "state.json").read_text())["epoch"]
    if epoch != len(history):
        raise ValueError(f"the snapshot {directory} is of epoch {epoch}, but its history has {len(history)} epochs")
    return history


def load(backbone: nn.Module, directory: Path) -> None:
    """Give `backbone` the weights of a snapshot; the head stays behind.

    Raises:
        FileNotFoundError: `directory` holds no snapshot.
        RuntimeError: the snapshot is of another network; the message names the tensors.
    """
    weights = load_file(directory / "weights.safetensors")
    backbone.load_state_dict({n.removeprefix(_BACKBONE): w for n, w in weights.items() if n.startswith(_BACKBONE)})


def write_untrained(backbone: nn.Module, directory: Path) -> None:
    """Write a snapshot of epoch 0 without a head: a network as it was drawn, or as somebody else trained it."""
    write(directory, nn.ModuleDict({"backbone": backbone}), None, [])


def adopt(backbone_spec: Any, checkpoint: Path, directory: Path) -> int:
    """Write a snapshot of epoch 0 with weights from a file made elsewhere; the number of parameters of the backbone.

    What the backbone has no place for, such as torchvision's `fc`, is left behind; what it lacks is an error. Names may begin
    with "backbone." or, after data-parallel training, with "module.".

    Args:
        checkpoint: safetensors, or a state_dict (alone or under "state_dict") that loads with `weights_only`.

    Raises:
        UserError: no such file, not such a file, or not the weights of this backbone.
    """
    backbone = plugins.module_of("backbone", backbone_spec).build(backbone_spec)
    wanted = backbone.state_dict()
    found = {_bare(name): tensor for name, tensor in _tensors(checkpoint).items()}
    for name in wanted:
        if name.endswith("num_batches_tracked"):  # files from before PyTorch 0.4.1 lack it, and only a null momentum reads it
            found.setdefault(name, wanted[name])
    wrong = [n for n, w in wanted.items() if n not in found or found[n].shape != w.shape]
    if wrong:
        raise UserError(
            f"{checkpoint.name} has no {wrong[0]} of shape {tuple(wanted[wrong[0]].shape)}"
            f" (nor {len(wrong) - 1} other tensors of {len(wanted)})",
            where="teacher.checkpoint",
            instead="Give the backbone (kind, depth, form, width) that these weights were trained with.",
        )
    backbone.load_state_dict({name: found[name] for name in wanted})
    write_untrained(backbone, directory)
    return sum(parameter.numel() for parameter in backbone.parameters())


def _bare(name: str) -> str:
    return name.removeprefix("module.").removeprefix(_BACKBONE)


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    from pickle import UnpicklingError  # what torch.load raises at the first object that is not a tensor; nothing is unpickled

    from safetensors import SafetensorError

    instead = "Give a .safetensors file, or a state_dict saved by torch.save."
    try:
        if checkpoint.suffix == ".safetensors":
            return load_file(checkpoint)
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on old pickle protocols, beside our own refusal
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {checkpoint.name}", "teacher.checkpoint", instead) from None
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(f"{checkpoint.name} holds more or other than tensors", "teacher.checkpoint", instead) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
