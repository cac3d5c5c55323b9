"""The training loop for pretext tasks, students, fine-tuning and probes; nothing else in ktray steps an optimiser.

Training is a chain of segments. Where it is split does not affect the result, bit for bit on one CPU: every draw is a function
of (seed, epoch, step), and a snapshot holds the complete state after an epoch. On one GPU the same holds, except that compiled
kernels, which only trainings of minutes use, may be chosen anew by a process that resumes.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ktray import conditions, plugins, progress
from ktray.fingerprint import seed_of
from ktray.images import Images
from ktray.ops import precision
from ktray.ops.random_draws import Draws
from ktray.spec import Schedule
from ktray.training import averaged_weights, compilation, cuda_graph, optimisers, snapshot
from ktray.training.averaged_weights import WeightAverage
from ktray.training.batches import Batches, RowLayout
from ktray.training.compilation import StepTimer
from ktray.training.cuda_graph import Graphs
from ktray.training.step_task import Recipe, StepTask
from ktray.training.task import Task

IDENTITY, REVISION = "training_loop", 2
TOOLS_OF_SOME = (averaged_weights, optimisers)  # see `training_segment.tools_of`

Save = Callable[[Path], None]
OnEpoch = Callable[[int, dict[str, float], Save], None]


def untrained_backbone(backbone_spec: Any, seed: int) -> nn.Module:
    """An untrained backbone, its weights determined by `seed` alone; the caller's random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "weights"))
        backbone: nn.Module = plugins.module_of("backbone", backbone_spec).build(backbone_spec)
        return backbone


def lr_at(schedule: Schedule, position: float) -> float:
    """The learning rate at `position`, in epochs from the start; `fit` evaluates it at the middle of each step.

    Before its decay, `warmup_stable` does not depend on the total, so a longer training continues the trunk of a shorter one.

    Source: cosine, Loshchilov & Hutter, ICLR 2017; warmup_stable with decay, Hu et al., arXiv:2404.06395, section 4.
    """
    lr = schedule.lr
    if position < schedule.warmup:
        lr *= position / schedule.warmup
    if schedule.kind == "warmup_stable" and position > _decay_start(schedule):
        lr *= max(0.0, schedule.epochs - position) / (schedule.epochs * schedule.decay)
    if schedule.kind == "cosine" and position >= schedule.warmup:
        length = schedule.epochs - schedule.warmup
        lr *= 0.5 * (1 + math.cos(math.pi * min(1.0, (position - schedule.warmup) / length)))
    return lr


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
    The last batch of an epoch may be smaller; a last batch of one image is dropped, because batch norm cannot use it. On a GPU
    the steps are replayed as CUDA graphs, with the same bits, and compiled if that pays; see `cuda_graph.py`, `compilation.py`.

    Args:
        backbone: as from `untrained_backbone`; moved to the device and trained in place.
        seed: for the head's weights, the shuffles, the batches, and everything that uses the global generator (dropout).
        out: directory for weights.safetensors ("backbone.*", "head.*"; with `schedule.ema` their moving average, and those in
            training in trained.safetensors), optimizer.safetensors, history.parquet (epoch, loss,
            lr of the last step, the task's metrics as means over images; all epochs from 1) and state.json, written last.
        until: last epoch, at most `schedule.epochs`; 0 writes the initial weights and returns no metrics.
        start: snapshot of an earlier epoch of the same training, which sets all weights; None trains from scratch.
        max_batch_size: if given, at most this many images, at most a quarter of a batch, pass the network at once (`parts`).
        on_epoch: called with (epoch, its metrics, a function that writes the snapshot of this epoch to a directory).

    Raises:
        ValueError: the loss is not finite (the message names the epoch), fewer than two images, or `until` is out of range.
    """
    place = torch.device(device)
    backbone.to(place).to(memory_format=torch.channels_last)
    with _repeatable(place, schedule.precision):
        torch.manual_seed(seed_of(seed, "head"))
        model = _model(backbone, task, device)
        optimizer = optimisers.optimiser(schedule, model, place, images.size)
        average = averaged_weights.averaging(model, schedule.ema, place)
        history = snapshot.restore(start, model, optimizer, _averaged(average)) if start else []
        if not len(history) <= until <= schedule.epochs:
            raise ValueError(f"epoch {until} is not between the start, {len(history)}, and the total, {schedule.epochs}")
        batches = Batches(images, task, schedule.batch_size, seed, place)
        _set_steps_taken(optimizer, average, len(history) * batches.steps)
        step = _Step(model, task, optimizer, schedule, batches, largest_part(task, schedule, max_batch_size), average)
        step.compile_early = start is not None and snapshot.was_compiled(start)
        with closing(step):
            for epoch in range(len(history) + 1, until + 1):
                torch.manual_seed(seed_of(seed, "epoch", epoch))
                lrs = [lr_at(schedule, epoch - 1 + (number + 0.5) / batches.steps) for number in range(batches.steps)]
                metrics = _train_epoch(epoch, lrs, step, later_steps=(until - epoch) * batches.steps)
                history.append({"epoch": epoch, **metrics})
                if on_epoch:
                    on_epoch(epoch, metrics, functools.partial(step.write_snapshot, history=history))
        snapshot.write(out, model, optimizer, history, average=_averaged(average))
    if place.type == "cuda":
        conditions.note("training", step.conditions())
    return {name: value for name, value in history[-1].items() if name != "epoch"} if history else {}


def _averaged(average: WeightAverage | None) -> nn.ModuleDict | None:
    return average.average if average else None


def _set_steps_taken(optimizer: torch.optim.Optimizer, average: WeightAverage | None, steps: int) -> None:
    optimisers.set_steps_taken(optimizer, steps)
    if average:
        average.steps.fill_(steps)


@contextmanager
def _repeatable(place: torch.device, arithmetic: str) -> Iterator[None]:
    """Within it a training draws and rounds the same in every run, and leaves the caller's random state as it was."""
    with (
        torch.random.fork_rng(devices=[place] if place.type == "cuda" else []),
        precision.products_in(arithmetic),
        precision.deterministic_convolutions(),
        cuda_graph.own_stream(place),
    ):
        yield


def _model(backbone: nn.Module, task: Task, device: str) -> nn.ModuleDict:
    head = task.head(int(backbone.feature_dim)).to(device)  # type: ignore[arg-type]
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    if task.prepare:
        task.prepare(model)
    return model


def _train_epoch(epoch: int, lrs: Sequence[float], step: _Step, later_steps: int) -> dict[str, float]:
    """Train for one epoch, step by step with the learning rates `lrs`; the last of them, and the means of the metrics."""
    batches = step.batches
    step.model.train()
    step.begin_epoch()
    if _uploads_ahead(batches.device):
        for number, (layout, row, pixels) in enumerate(batches.uploaded_ahead(epoch, lrs)):
            step.take_from(layout, row, pixels, later_steps + len(lrs) - number - 1)
            progress.advance("step")
    else:
        for lr, batch in zip(lrs, batches.made_for_each_step(epoch), strict=True):
            optimisers.set_lr(step.optimizer, lr)
            step.take(*batch)
            progress.advance("step")
    means = {name: total / step.seen for name, total in step.totals().items()}
    if not math.isfinite(means["loss"]):
        raise ValueError(f"the loss of epoch {epoch} is {means['loss']}; a lower lr than {max(lrs):g} may help")
    return {"loss": means.pop("loss"), "lr": lrs[-1], **means}


def _uploads_ahead(device: torch.device) -> bool:
    """Whether the draws of a step are made long before it; on a CPU there is nothing to gain."""
    return device.type == "cuda"


class _Step:
    """A step of the optimiser and the metrics of an epoch, which are summed on the device: reading them would synchronise.

    Attributes:
        average: the moving average of the weights, if there is one.
        trained: the parameters in training.
        seen: images of this epoch so far.
        obstacles: what prevents that steps on a GPU are replayed as CUDA graphs.
        capturable: whether steps on a GPU are replayed as CUDA graphs.
        compiled: whether whole batches are computed by compiled kernels, which round differently.
        compile_early: whether to compile without a look at what it would save: the checkpoint's training did.
    """

    def __init__(
        self,
        model: nn.ModuleDict,
        task: Task,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        batches: Batches,
        max_part: int | None,
        average: WeightAverage | None,
    ) -> None:
        self.model, self.task, self.optimizer, self.average = model, task, optimizer, average
        self.batches, self.max_part, self.clip = batches, max_part, schedule.clip
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.names: list[str] = []
        self.sums = torch.zeros(0)
        self.seen = 0
        self.obstacles = [
            *([] if task.capturable else ["the task"]),
            *([] if getattr(model["backbone"], "capturable", True) else ["the network"]),
            *([] if schedule.optimizer in optimisers.CAPTURABLE else [f"the optimizer {schedule.optimizer}"]),
        ]
        self.capturable = not self.obstacles
        self.compiled = self.compile_early = False
        # It does not refer to this object: a cycle would hold the memory of a finished training until it is collected.
        self._loss_of = _loss_function(model, task, schedule.precision)
        self._loss_of_whole_batch = self._loss_of
        self._graphs = Graphs(self.capturable)
        self._timer = StepTimer()

    def begin_epoch(self) -> None:
        """Forget the metrics of the epoch before."""
        self.sums.zero_()
        self.seen = 0

    def totals(self) -> dict[str, float]:
        """Sum over the images of this epoch of the loss and each metric."""
        return dict(zip(self.names, self.sums.tolist(), strict=True))

    def conditions(self) -> dict[str, bool | str]:
        """How a GPU took the steps, for the record."""
        why: dict[str, bool | str] = {} if self.capturable else {"because": f"{self.obstacles[0]} cannot be captured"}
        return {"cuda_graph": self.capturable, "compiled": self.compiled, **why}

    def take_from(self, layout: RowLayout, row: Tensor, pixels: Sequence[Tensor], steps_left: int) -> None:
        """One step from a row of `Batches.uploaded_ahead`, as a CUDA graph where the task and the network allow it."""
        replayed = self._graphs.call(self._take_row, layout, row, *pixels)
        self.seen += layout.count
        if replayed and layout.count == self.batches.size and not self.compiled and self.max_part is None:
            seconds = self._timer.replayed()
            if self.compile_early or (seconds is not None and compilation.pays(seconds * steps_left)):
                self._compile()

    def _compile(self) -> None:
        """Compile the network and its loss for whole batches, from the next step on; what was captured is forgotten."""
        self._loss_of_whole_batch, self.compiled = compilation.compiled(self._loss_of), True
        self._graphs = Graphs(self.capturable)

    def write_snapshot(self, out: Path, history: list[dict[str, Any]]) -> None:
        """Write model, optimiser and `history` as they are now to a directory."""
        average = _averaged(self.average)
        snapshot.write(out, self.model, self.optimizer, history, compiled=self.compiled, average=average)

    def close(self) -> None:
        """Forget what was captured. Until this object is collected no other process could use its memory."""
        self._graphs = Graphs(self.capturable)

    def _take_row(self, layout: RowLayout, row: Tensor, *pixels: Tensor) -> None:
        held = layout.unpack(row)
        optimisers.set_lr(self.optimizer, held["lr"])
        resident = self.batches.resident
        seen = pixels[0] if resident is None else resident.index_select(0, held["positions"])
        self._take(seen, self.batches.kept_on_device.index_select(0, held["positions"]), held["draws"])

    def take(self, pixels: Tensor, indices: Tensor, draws: Draws) -> None:
        """One step, kernel by kernel."""
        self._take(pixels, indices, draws)
        self.seen += len(indices)

    def _take(self, pixels: Tensor, indices: Tensor, draws: Draws) -> None:
        loss_of = self._loss_of_whole_batch if len(indices) == self.batches.size else self._loss_of
        inputs, targets = self.task.batch(pixels, indices, draws)
        for number, (share, some, wanted) in enumerate(parts(inputs, targets, self.max_part)):
            loss, metrics = loss_of(some, wanted)
            if number == 0:
                self.optimizer.zero_grad()
            loss.backward(torch.full_like(loss, share))  # 1 for a whole batch; the gradients of parts add up to it
            self._add({"loss": loss, **metrics}, share * len(indices))
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        if self.task.after_step:
            self.task.after_step(self.model)
        if self.average:
            self.average.update()

    def _add(self, metrics: dict[str, Tensor], count: float) -> None:
        values = torch.stack([value.detach().double() for value in metrics.values()])
        if not self.names:
            self.names, self.sums = list(metrics), torch.zeros_like(values)
        self.sums.add_(values.mul_(count))


def _loss_function(
    model: nn.ModuleDict, task: Task, arithmetic: str
) -> Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]:
    def loss_of(inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with precision.autocast(arithmetic, inputs.device):
            return task.loss(task.forward(model, inputs) if task.forward else model["head"](model["backbone"](inputs)), targets)

    return loss_of


def parts(inputs: Tensor, targets: Tensor, most: int | None) -> list[tuple[float, Tensor, Tensor]]:
    """(share of the batch, inputs, targets) of each part of a batch: the whole batch, or parts of at most `most` images.

    The complete batch is built first and then split, so each image looks the same as without parts. If the task's loss is
    a mean over images, the gradients of the parts, weighted by their shares, add up to the gradient of the batch, up to
    rounding. What the network itself computes over a batch is computed per part: the statistics of batch norm, which are
    also updated once per part, and the draws of dropout. No part is a single image, which batch norm cannot use.
    """
    if most is None or len(targets) <= most:
        return [(1.0, inputs, targets)]
    number = min(-(-len(targets) // most), len(targets) // 2)
    target_parts = targets.tensor_split(number)
    rows = len(inputs) // len(targets)
    input_parts = inputs.split([rows * len(part) for part in target_parts])
    return [
        (len(target_part) / len(targets), input_part, target_part)
        for input_part, target_part in zip(input_parts, target_parts, strict=True)
    ]


def largest_part(task: Task, schedule: Schedule, max_batch_size: int | None) -> int | None:
    """Most images that go through the network at once; None for whole batches.

    Args:
        max_batch_size: as for `fit`.

    Raises:
        ValueError: the schedule states micro-batches, and the task's loss is not a mean over images.
    """
    if schedule.micro_batch is not None and not task.mean_over_images:
        raise ValueError(
            f"schedule.micro_batch={schedule.micro_batch} cuts a batch into parts, and the loss of this task compares all of "
            "its images with each other; leave it out, and use a smaller batch_size"
        )
    if max_batch_size is None or not task.mean_over_images:
        return schedule.micro_batch
    # A batch smaller than `max_batch_size` did not fit as a whole either.
    most = max(2, min(max_batch_size, schedule.batch_size // 4))
    return most if schedule.micro_batch is None else min(most, schedule.micro_batch)


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
                    raise ValueError(f"the loss before step {step + 1} is {means['loss']}; try a lower lr than {recipe.lr}")
                history.append({"epoch": len(history) + 1, "step": step + 1, **means, "lr": recipe.lr_at(step)})
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
        group["lr"] = recipe.lr_at(step) * group["factor"]
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
