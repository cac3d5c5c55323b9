"""The state of a training after an epoch, as a directory: all that the next epoch and the features depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ktray.checksums import intact
from ktray.text import counted

_BACKBONE, _TRAINED = "backbone.", "trained.safetensors"


def write(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    history: list[dict[str, Any]],
    compiled: bool = False,
    average: nn.Module | None = None,
) -> None:
    """Write weights.safetensors, optimizer.safetensors, history.parquet and, last, state.json {"epoch"}.

    Args:
        model: an `nn.ModuleDict` of "backbone" and, if there is one, "head"; its state_dict names the weights.
        optimizer: its buffers are saved as "<parameter>/<buffer>"; None for an untrained model.
        history: one row per epoch from 1 on, all with the same columns.
        compiled: of a checkpoint: whether the training used compiled kernels, and should go on with them.
        average: the model with averaged weights, which weights.safetensors then has; trained.safetensors has those of `model`.
    """
    import pyarrow
    from pyarrow import parquet

    directory.mkdir(parents=True, exist_ok=True)
    save_file(_on_cpu((average or model).state_dict()), directory / "weights.safetensors")
    if average is not None:
        save_file(_on_cpu(model.state_dict()), directory / _TRAINED)
    buffers: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, buffer in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            if buffer is not None:  # SGD without momentum stores None
                buffers[f"{name}/{key}"] = buffer
    save_file(_on_cpu(buffers), directory / "optimizer.safetensors")
    columns = list(history[0]) if history else ["epoch", "loss", "lr"]
    types = {column: pyarrow.int64() if column == "epoch" else pyarrow.float64() for column in columns}
    parquet.write_table(pyarrow.Table.from_pylist(history, pyarrow.schema(types)), directory / "history.parquet")
    said = {"compiled": compiled, "averaged": average is not None}
    state = {"epoch": len(history), **{name: True for name, holds in said.items() if holds}}
    (directory / "state.json").write_text(json.dumps(state) + "\n")


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def restore(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Restore `model`, `optimizer` and `average` to the state that `write` saved, bit for bit; returns the history up to there.

    Raises:
        ValueError: history and state disagree about the epoch.
        RuntimeError: the weights belong to another model.
    """
    from pyarrow import parquet

    if average is not None:
        average.load_state_dict(load_file(intact(directory / "weights.safetensors")))
    model.load_state_dict(load_file(intact(directory / (_TRAINED if average is not None else "weights.safetensors"))))
    parameters = dict(model.named_parameters())
    for path, saved in load_file(intact(directory / "optimizer.safetensors")).items():
        name, key = path.rsplit("/", 1)
        parameter = parameters[name]
        if key != "step":  # the others get the device and layout of their parameter
            saved = torch.empty_like(parameter, requires_grad=False).copy_(saved)
        elif optimizer.defaults.get("capturable"):  # the number of steps stays on the CPU unless a CUDA graph counts them
            saved = saved.to(parameter.device)
        optimizer.state[parameter][key] = saved
    history: list[dict[str, Any]] = parquet.read_table(intact(directory / "history.parquet")).to_pylist()
    epoch = json.loads(intact(directory / "state.json").read_text())["epoch"]
    if epoch != len(history):
        raise ValueError(f"the snapshot {directory} is of epoch {epoch}, but its history has {counted(len(history), 'epoch')}")
    return history


def was_compiled(directory: Path) -> bool:
    """Whether a checkpoint says that its training used compiled kernels."""
    return bool(json.loads(intact(directory / "state.json").read_text()).get("compiled"))


def epoch_of(directory: Path) -> int:
    """The epoch of a snapshot, after checking that all of its files are intact and can be read.

    Raises:
        DamagedArtifact: a file is not as it was written.
        ValueError: a file is missing or truncated, as after a crash of the machine; the message names directory and reason.
    """
    from pyarrow import parquet
    from safetensors import SafetensorError, safe_open

    try:
        state = json.loads(intact(directory / "state.json").read_text())
        for name in ("weights.safetensors", "optimizer.safetensors", *((_TRAINED,) if state.get("averaged") else ())):
            with safe_open(intact(directory / name), framework="pt"):  # raises if the file is shorter than its header says
                pass
        rows = parquet.read_table(intact(directory / "history.parquet")).num_rows
        epoch = int(state["epoch"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:  # pyarrow raises ValueErrors and OSErrors
        raise ValueError(f"the snapshot {directory} cannot be read: {type(error).__name__}: {error}") from error
    if epoch != rows:
        raise ValueError(f"the snapshot {directory} is of epoch {epoch}, but its history has {counted(rows, 'epoch')}")
    return epoch


def load_backbone(backbone: nn.Module, directory: Path) -> None:
    """Load the weights of a snapshot into `backbone`; its head is ignored.

    Raises:
        FileNotFoundError: `directory` contains no snapshot.
        RuntimeError: the snapshot belongs to another network; the message names the tensors.
    """
    weights = load_file(intact(directory / "weights.safetensors"))
    backbone.load_state_dict({n.removeprefix(_BACKBONE): w for n, w in weights.items() if n.startswith(_BACKBONE)})


def write_untrained(backbone: nn.Module, directory: Path) -> None:
    """Write a snapshot of epoch 0 without a head: a network freshly initialised, or trained elsewhere."""
    write(directory, nn.ModuleDict({"backbone": backbone}), None, [])
