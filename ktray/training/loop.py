"""The training loop for pretext tasks, students, fine-tuning and probes; nothing else in ktray steps an optimiser.

Training is a chain of segments. Where it is split does not affect the result, bit for bit on one CPU: every draw is a function
of (seed, epoch, step), and a snapshot holds the complete state after an epoch. Images that fit are kept on the device as uint8.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ktray import plugins, progress
from ktray.fingerprint import seed_of
from ktray.images import Images
from ktray.ops import precision
from ktray.spec import Schedule
from ktray.training import snapshot
from ktray.training.step_task import Recipe, StepTask
from ktray.training.task import Task

IDENTITY, REVISION = "training_loop", 2

# Up to this size all pixels are held as one tensor; beyond it, each batch is read while the previous one trains.
RESIDENT_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}

Save = Callable[[Path], None]
OnEpoch = Callable[[int, dict[str, float], Save], None]


def untrained_backbone(backbone_spec: Any, seed: int) -> nn.Module:
    """An untrained backbone, its weights determined by `seed` alone; the caller's random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "weights"))
        backbone: nn.Module = plugins.module_of("backbone", backbone_spec).build(backbone_spec)
        return backbone


def learning_rate(schedule: Schedule, position: float) -> float:
    """The learning rate at `position`, in epochs from the start; `fit` evaluates it at the middle of each step.

    Before its decay, `warmup_stable` does not depend on the total, so a longer training continues the trunk of a shorter one.

    Source: cosine, Loshchilov & Hutter, ICLR 2017; warmup_stable with decay, Hu et al., arXiv:2404.06395, section 4.
    """
    rate = schedule.lr
    if position < schedule.warmup:
        rate *= position / schedule.warmup
    if schedule.kind == "warmup_stable" and position > _decay_start(schedule):
        rate *= max(0.0, schedule.epochs - position) / (schedule.epochs * schedule.decay)
    if schedule.kind == "cosine" and position >= schedule.warmup:
        length = schedule.epochs - schedule.warmup
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, (position - schedule.warmup) / length)))
    return rate


def _decay_start(schedule: Schedule) -> float:
    return schedule.epochs - schedule.epochs * schedule.decay


def snapshot_slice(schedule: Schedule, epoch: int) -> dict[str, Any]:
    """The part of `schedule` that determines the snapshot at the end of `epoch`, as plain data for a key.

    A trunk snapshot (constant, or warmup_stable before its decay) is the same for every total, so total and decay are left out.
    """
    trunk = schedule.kind == "constant" or (schedule.kind == "warmup_stable" and epoch <= _decay_start(schedule))
    return schedule.model_dump(mode="json", exclude={"epochs", "decay"} if trunk else None)


def schedule_of(sliced: Mapping[str, Any], epoch: int) -> Schedule:
    """The schedule that leads to the snapshot at the end of `epoch`, from its `snapshot_slice`.

    The slice of a trunk snapshot contains neither the total nor the decay; neither is needed up to `epoch`.
    """
    if "epochs" in sliced:
        return Schedule.model_validate(dict(sliced))
    return Schedule.model_validate({**sliced, "epochs": max(epoch, math.ceil(sliced["warmup"]))})


def fit(
    backbone: nn.Module,
    task: Task,
    images: Images,
    schedule: Schedule,
    seed: int,
    *,
    out: Path,
    until: int,
    start: Path | None = None,
    device: str = "cpu",
    max_batch_size: int | None = None,
    on_epoch: OnEpoch | None = None,
) -> dict[str, float]:
    """Train to the end of epoch `until`, write the snapshot to `out`, and return the metrics of the last epoch.

    On one CPU with a fixed number of threads, 0 -> 8 equals 0 -> 3 -> 8 in every bit of weights, optimiser state and history.
    The last batch of an epoch may be smaller; a last batch of one image is dropped, because batch norm cannot use it.

    Args:
        backbone: as from `untrained_backbone`; moved to the device and trained in place; `start`, if given, sets its weights.
        seed: for the head's weights, the shuffles, the batches, and everything that uses the global generator (dropout).
        out: directory for weights.safetensors ("backbone.*", "head.*"), optimizer.safetensors, history.parquet (epoch, loss,
            lr of the last step, the task's metrics as means over images; all epochs from 1) and state.json, written last.
        until: last epoch, at most `schedule.epochs`; 0 writes the initial weights and returns no metrics.
        start: snapshot of an earlier epoch of the same training; None trains from scratch.
        max_batch_size: if given, at most this many images, and at most a quarter of a batch, go through the network at once
            (see `_Batches.parts`).
        on_epoch: called with (epoch, its metrics, a function that writes the snapshot of this epoch to a directory).

    Raises:
        ValueError: the loss is not finite (the message names the epoch), fewer than two images, or `until` is out of range.
    """
    backbone.to(device).to(memory_format=torch.channels_last)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), precision.products_in(schedule.precision):
        torch.manual_seed(seed_of(seed, "head"))
        model = _model(backbone, task, device)
        optimizer = _optimizer(schedule, model)
        history = snapshot.restore(start, model, optimizer) if start else []
        if not len(history) <= until <= schedule.epochs:
            raise ValueError(f"epoch {until} is not between the start, {len(history)}, and the total, {schedule.epochs}")
        batches = _Batches(images, task, schedule.batch_size, seed, device, max_batch_size)
        for epoch in range(len(history) + 1, until + 1):
            torch.manual_seed(seed_of(seed, "epoch", epoch))
            metrics = _train_epoch(epoch, model, task, optimizer, schedule, batches)
            history.append({"epoch": epoch, **metrics})
            if on_epoch:
                on_epoch(epoch, metrics, functools.partial(snapshot.write, model=model, optimizer=optimizer, history=history))
        snapshot.write(out, model, optimizer, history)
    return {name: value for name, value in history[-1].items() if name != "epoch"} if history else {}


def _model(backbone: nn.Module, task: Task, device: str) -> nn.ModuleDict:
    head = task.head(int(backbone.feature_dim)).to(device)  # type: ignore[arg-type]
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    if task.prepare:
        task.prepare(model)
    return model


def _train_epoch(
    epoch: int, model: nn.ModuleDict, task: Task, optimizer: torch.optim.Optimizer, schedule: Schedule, batches: _Batches
) -> dict[str, float]:
    backbone, head = model["backbone"], model["head"]
    model.train()
    sums: dict[str, Tensor] = {}
    seen = 0
    for step, (pixels, indices, generator) in enumerate(batches.epoch_batches(epoch)):
        rate = learning_rate(schedule, epoch - 1 + (step + 0.5) / batches.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = task.batch(pixels, indices, generator)
        terms: list[tuple[str, Tensor, float]] = []
        for share, part_inputs, part_targets in batches.parts(inputs, targets):
            with precision.autocast(schedule.precision, pixels.device):
                outputs = task.forward(model, part_inputs) if task.forward else head(backbone(part_inputs))
                loss, metrics = task.loss(outputs, part_targets)
            if not terms:
                optimizer.zero_grad()
            loss.backward(torch.full_like(loss, share))  # 1 for a whole batch; the gradients of parts add up to it
            terms += [(name, value.detach(), share * len(indices)) for name, value in {"loss": loss, **metrics}.items()]
        optimizer.step()
        if task.after_step:
            task.after_step(model)
        for name, value, count in terms:  # summed on the device: reading a value would synchronise
            part = value.double() * count
            sums[name] = sums[name] + part if name in sums else part
        seen += len(indices)
        progress.advance("step")
    means = {name: float(total) / seen for name, total in sums.items()}
    if not math.isfinite(means["loss"]):
        raise ValueError(f"the loss of epoch {epoch} is {means['loss']}; a lower learning rate than {schedule.lr} may help")
    return {"loss": means.pop("loss"), "lr": rate, **means}


class _Batches:
    """Shuffled batches of the kept images: pixels on the device, indices and the generator for each step of an epoch."""

    def __init__(self, images: Images, task: Task, size: int, seed: int, device: str, max_batch_size: int | None) -> None:
        self.images, self.size, self.seed, self.device = images, size, seed, device
        self.order = task.order
        self.max_part = None
        if max_batch_size is not None and task.mean_over_images:
            # A quarter, because a batch smaller than `max_batch_size` did not fit as a whole either.
            self.max_part = max(2, min(max_batch_size, size // 4))
        self.kept = torch.arange(len(images)) if task.keep is None else task.keep
        if len(self.kept) < 2:
            raise ValueError(f"training needs two images or more, and {len(self.kept)} of {len(images)} are kept")
        self.steps = len(self.kept) // size + (len(self.kept) % size > 1)

    @functools.cached_property
    def resident(self) -> Tensor | None:
        if len(self.kept) * self.images.size**2 * 3 > RESIDENT_BYTES.get(torch.device(self.device).type, 0):
            return None
        return torch.from_numpy(self.images.read(self.kept.numpy())).to(self.device)

    def epoch_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
        parts = self._order(torch.Generator().manual_seed(seed_of(self.seed, "shuffle", epoch))).split(self.size)[: self.steps]
        generator = torch.Generator()
        for step, (pixels, positions) in enumerate(zip(self._pixels(parts), parts, strict=True)):
            yield pixels, self.kept[positions], generator.manual_seed(seed_of(self.seed, "batch", epoch, step))

    def parts(self, inputs: Tensor, targets: Tensor) -> list[tuple[float, Tensor, Tensor]]:
        """(share of the batch, inputs, targets) of each part of a batch: the whole batch, or parts of a few images.

        The complete batch is built first and then split, so each image looks the same as without parts. If the task's loss is
        a mean over images, the gradients of the parts, weighted by their shares, add up to the gradient of the batch, up to
        rounding. What the network itself computes over a batch is computed per part: the statistics of batch norm, which are
        also updated once per part, and the draws of dropout. No part is a single image, which batch norm cannot use.
        """
        if self.max_part is None or len(targets) <= self.max_part:
            return [(1.0, inputs, targets)]
        number = min(-(-len(targets) // self.max_part), len(targets) // 2)
        target_parts = targets.tensor_split(number)
        rows = len(inputs) // len(targets)
        input_parts = inputs.split([rows * len(part) for part in target_parts])
        return [
            (len(target_part) / len(targets), input_part, target_part)
            for input_part, target_part in zip(input_parts, target_parts, strict=True)
        ]

    def _order(self, generator: torch.Generator) -> Tensor:
        """Positions in `kept` of the images of one epoch."""
        if self.order is None:
            return torch.randperm(len(self.kept), generator=generator)
        ordered = self.order(generator)
        positions = torch.searchsorted(self.kept, ordered).clamp_(max=len(self.kept) - 1)
        if len(ordered) != len(self.kept) or not torch.equal(self.kept[positions], ordered):
            raise ValueError(f"the order of the task must name {len(self.kept)} of the {len(self.kept)} images that it keeps")
        return positions

    def _pixels(self, parts: tuple[Tensor, ...]) -> Iterator[Tensor]:
        if self.resident is not None:
            for positions in parts:
                yield self.resident.index_select(0, positions.to(self.device, non_blocking=True))
            return
        with ThreadPoolExecutor(1) as reader:
            pending = reader.submit(self.images.read, self.kept[parts[0]].numpy())
            for positions in parts[1:]:
                pixels, pending = pending.result(), reader.submit(self.images.read, self.kept[positions].numpy())
                yield torch.from_numpy(pixels).to(self.device)
            yield torch.from_numpy(pending.result()).to(self.device)


def _optimizer(schedule: Schedule, model: nn.Module) -> torch.optim.Optimizer:
    """Weight decay applies to weights but not to biases and norms (one axis), as in Caffe's AlexNet and most recipes since."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=schedule.lr)
    return torch.optim.SGD(groups, lr=schedule.lr, momentum=schedule.momentum)


def fit_steps(
    model: nn.ModuleDict,
    task: StepTask,
    recipe: Recipe,
    seed: int,
    *,
    device: str,
    start: Path | None = None,
    on_report: Callable[[int, dict[str, float], Save], None] | None = None,
    report_every: int = 50,
) -> list[dict[str, float]]:
    """Train `model` ("backbone" and further modules) in place; returns the history, one row per report.

    Args:
        start: a snapshot that `on_report` wrote in an earlier attempt at the same training; None to begin.
        on_report: called after every `report_every` steps, and after the last, with the steps taken, the means of the terms
            since the last report, and a function that writes a snapshot into a directory.

    Raises:
        ValueError: the loss is not finite; the message names the step.
    """
    place = torch.device(device)
    model.to(place)
    with (
        torch.random.fork_rng(devices=[place] if place.type == "cuda" else []),
        precision.products_in(recipe.precision),
        _deterministic(place),
        ThreadPoolExecutor(1) as reader,
    ):
        optimizer = _step_optimizer(model, recipe)
        history = snapshot.restore(start, model, optimizer) if start else []
        first = int(history[-1]["step"]) if history else 0
        model.train()
        for module in task.frozen:
            module.requires_grad_(False).eval()
        sums: dict[str, Tensor] = {}
        pending = reader.submit(_step_batch, task, seed, first) if first < recipe.steps else None
        for step in range(first, recipe.steps):
            assert pending is not None
            batch = pending.result()
            if step + 1 < recipe.steps:
                pending = reader.submit(_step_batch, task, seed, step + 1)
            for name, value in _take_step(model, task, recipe, optimizer, batch, step, seed).items():
                sums[name] = sums[name] + value if name in sums else value
            progress.advance("step")
            if (step + 1) % report_every == 0 or step + 1 == recipe.steps:
                means = {name: float(total) / (step % report_every + 1) for name, total in sums.items()}
                sums = {}
                if not math.isfinite(means["loss"]):
                    raise ValueError(f"the loss before step {step + 1} is {means['loss']}; try a lower rate than {recipe.lr}")
                history.append({"epoch": len(history) + 1, "step": step + 1, **means, "lr": recipe.rate(step)})
                if on_report:
                    write = functools.partial(snapshot.write, model=model, optimizer=optimizer, history=history)
                    on_report(step + 1, means, write)
    return history


def _step_batch(task: StepTask, seed: int, step: int) -> Any:
    return task.batch(step, torch.Generator().manual_seed(seed_of(seed, "batch", step)))


def _take_step(
    model: nn.ModuleDict, task: StepTask, recipe: Recipe, optimizer: torch.optim.Optimizer, batch: Any, step: int, seed: int
) -> dict[str, Tensor]:
    torch.manual_seed(seed_of(seed, "step", step))
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate(step) * group["factor"]
    device = next(model.parameters()).device
    with precision.autocast(recipe.precision, device):
        terms = task.loss(model, batch)
    loss = torch.stack([term.float() for term in terms.values()]).sum()
    optimizer.zero_grad()
    loss.backward()
    if recipe.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    parts = {name: term.detach().double() for name, term in terms.items()} if len(terms) > 1 else {}
    return {**parts, "loss": loss.detach().double()}


def _step_optimizer(model: nn.ModuleDict, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD; weight decay applies to weights but not to biases and norms (one axis), as in `_optimizer`."""
    groups = []
    for own in (True, False):
        modules = [module for name, module in model.items() if (name == "backbone") == own]
        parameters = [p for module in modules for p in module.parameters()]
        for matrix in (True, False):
            chosen = [p for p in parameters if (p.ndim > 1) == matrix]
            if chosen:
                decay, factor = recipe.weight_decay if matrix else 0.0, 1.0 if own else recipe.head_factor
                groups.append({"params": chosen, "weight_decay": decay, "factor": factor})
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


@contextmanager
def _deterministic(place: torch.device) -> Iterator[None]:
    """Kernels of a GPU that give the same result in every run, where PyTorch has them; elsewhere nothing changes."""
    if place.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # names the kernels that have no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
