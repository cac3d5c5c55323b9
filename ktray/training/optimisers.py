"""Optimisers as a schedule asks for them, and which weights get which learning rate and weight decay.

Source: layer-wise decay of the learning rate after Clark, Luong, Le, Manning, "ELECTRA", ICLR 2020, arXiv:2003.10555, and Bao,
Dong, Piao, Wei, "BEiT", ICLR 2022, arXiv:2106.08254. LARS: You, Gitman, Ginsburg, arXiv:1708.03888; LAMB: You et al., ICLR
2020, arXiv:1904.00962; both as implemented by timm.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ktray.errors import UserError
from ktray.spec import Schedule

IDENTITY, REVISION = "optimisers", 1

CAPTURABLE = ("sgd", "adamw")
"""Those whose step can be part of a CUDA graph. timm's lars and lamb read values of tensors and count steps in Python."""


def check(schedule: Schedule) -> None:
    """Refuse an optimiser whose library is not installed.

    Raises:
        UserError: it is timm's, and timm is not installed.
    """
    if schedule.optimizer not in CAPTURABLE:
        _from_timm(schedule.optimizer)


def _from_timm(name: str) -> Any:
    try:
        from timm.optim.lamb import Lamb
        from timm.optim.lars import Lars
    except ModuleNotFoundError as error:
        raise UserError(
            f"the optimizer {name} needs the package timm", "schedule.optimizer", "pip install 'ktray[timm]'"
        ) from error
    return {"lars": Lars, "lamb": Lamb}[name]


def optimiser(schedule: Schedule, model: nn.ModuleDict, device: torch.device, size: int) -> torch.optim.Optimizer:
    """The optimiser of a training; each of its groups has a `factor` on the learning rate.

    Weight decay applies to weights but not to biases and norms (one axis), as in Caffe's AlexNet and most recipes since; and so
    do the layer-wise rates of LARS and LAMB. On a GPU one kernel of sgd or adamw updates all weights, with the learning rate
    from a tensor that a CUDA graph can read.

    Args:
        model: "backbone" and "head".
        size: side of the images in pixels.
    """
    groups = _groups(schedule, model, size)
    if schedule.optimizer not in CAPTURABLE:
        own = {"momentum": schedule.momentum} if schedule.optimizer == "lars" else {"max_grad_norm": None}
        made: torch.optim.Optimizer = _from_timm(schedule.optimizer)(groups, lr=schedule.lr, **own)
        return made
    cuda = device.type == "cuda"
    lr: Any = torch.tensor(schedule.lr, device=device) if cuda else schedule.lr
    if cuda and schedule.layer_decay != 1:
        groups = [{**group, "lr": lr.clone()} for group in groups]  # they differ from group to group
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=cuda or None, capturable=cuda)
    return torch.optim.SGD(groups, lr=lr, momentum=schedule.momentum, fused=cuda or None)


def _groups(schedule: Schedule, model: nn.ModuleDict, size: int) -> list[dict[str, Any]]:
    """Groups of parameters with `weight_decay` and `factor`, in a fixed order."""
    factors = _factors(schedule.layer_decay, model["backbone"], size) if schedule.layer_decay != 1 else {}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: dict[tuple[float, bool], list[Tensor]] = defaultdict(list)
    for matrix in (True, False):
        for name, parameter in trained:
            if (parameter.ndim > 1) == matrix:
                groups[factors.get(name, 1.0), matrix].append(parameter)
    return [
        {"params": parameters, "weight_decay": schedule.weight_decay if matrix else 0.0, "factor": factor}
        for (factor, matrix), parameters in groups.items()
    ]


def _factors(decay: float, backbone: nn.Module, size: int) -> dict[str, float]:
    """Factor on the learning rate of each weight of the backbone by its name in the model; the head has 1."""
    numbers, of_head = layer_numbers(backbone, size)
    return {f"backbone.{name}": decay ** (of_head - number) for name, number in numbers.items()}


def layer_numbers(backbone: nn.Module, size: int) -> tuple[dict[str, int], int]:
    """The number of the layer that each parameter of a backbone belongs to, from 0, and the number of the head.

    It is the number of `backbone.layers` that are complete when the parameter's module runs: weights before or in the first
    layer have 0, those after the last one the head's. A backbone with a method of this name numbers its parameters itself.

    Args:
        size: side of the images in pixels, of which one is run.
    """
    own = getattr(backbone, "layer_numbers", None)
    if own is not None:
        numbers, of_head = own()
        return dict(numbers), int(of_head)
    layers: tuple[str, ...] = backbone.layers  # type: ignore[assignment]
    completed: list[str] = []
    begun: dict[str, int] = {}

    def begin(name: str) -> None:
        begun.setdefault(name, len(completed))

    handles = [
        module.register_forward_pre_hook(lambda module, given, name=name: begin(name))
        for name, module in backbone.named_modules()
    ]
    handles += [
        backbone.get_submodule(name).register_forward_hook(lambda module, given, output, name=name: completed.append(name))
        for name in layers
    ]
    device, training = next(backbone.parameters()).device, backbone.training
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, 3, size, size, device=device))
    finally:
        backbone.train(training)
        for handle in handles:
            handle.remove()
    return {name: _of_module(name.rpartition(".")[0], begun) for name, _ in backbone.named_parameters()}, len(layers)


def _of_module(name: str, begun: dict[str, int]) -> int:
    """The number of a module, or of the nearest one around it that is called."""
    while name not in begun:
        name = name.rpartition(".")[0]
    return begun[name]


def set_lr(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Set the learning rate of the next step; a GPU keeps it in tensors, which the optimiser's kernel reads."""
    for group in optimizer.param_groups:
        factor = group["factor"]
        given = lr if factor == 1 else lr * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(torch.as_tensor(given))
        else:
            group["lr"] = float(given)


def set_steps_taken(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Tell an optimiser that counts its steps beside the state of its parameters, as timm's LAMB does, how many were taken."""
    if type(optimizer).__name__ == "Lamb":
        for group in optimizer.param_groups:
            group["step"] = torch.tensor(float(steps))
