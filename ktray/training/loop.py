"""The one training loop, for pretext tasks, students, fine-tuning and probes: nothing else in ktray steps an optimiser.

A training is a chain of segments, and where a segment begins changes nothing, bit for bit on one CPU: every draw is a function
of (seed, epoch, step), and a snapshot holds all that an epoch leaves behind. Images that fit live on the device as uint8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ktray import plugins, progress
from ktray.fingerprint import seed_of
from ktray.images import Images
from ktray.spec import Schedule
from ktray.training import snapshot
from ktray.training.task import Task

IDENTITY, REVISION = "training_loop", 1

# Up to here all pixels are held as one tensor; beyond, each batch is read while the one before it trains.
RESIDENT_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}

Save = Callable[[Path], None]
OnEpoch = Callable[[int, dict[str, float], Save], None]


def untrained_backbone(backbone_spec: Any, seed: int) -> nn.Module:
    """An untrained backbone whose weights depend on `seed` alone; the caller's random stream is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "weights"))
        backbone: nn.Module = plugins.module_of("backbone", backbone_spec).build(backbone_spec)
        return backbone


def learning_rate(schedule: Schedule, position: float) -> float:
    """The learning rate at `position`, in epochs from the start; a step of `fit` stands at its own middle.

    Before its decay, `warmup_stable` gives the same number whatever the total: a longer training continues a shorter
    one's trunk.

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

    A trunk snapshot (constant; warmup_stable before its decay) is the same for every total, so total and decay are left out.
    """
    trunk = schedule.kind == "constant" or (schedule.kind == "warmup_stable" and epoch <= _decay_start(schedule))
    return schedule.model_dump(mode="json", exclude={"epochs", "decay"} if trunk else None)


def schedule_of(sliced: Mapping[str, Any], epoch: int) -> Schedule:
    """The schedule that gives the snapshot at the end of `epoch`, from its `snapshot_slice`.

    Of a trunk neither the total nor the decay is known, and neither is read up to `epoch`.
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
    """Train to the end of epoch `until`, write that snapshot into `out`, and return the last epoch's metrics.

    On one CPU with one number of threads, 0 -> 8 equals 0 -> 3 -> 8 in every bit of weights, optimiser and history. The last
    batch of an epoch may be smaller; a single image is left out, because batch norm has nothing to compare it with.

    Args:
        backbone: as from `untrained_backbone`; moved to the device and trained in place, from `start`'s weights if given.
        seed: of the head's weights, the shuffles, the batches, and whatever draws from the global generator (dropout).
        out: directory for weights.safetensors ("backbone.*", "head.*"), optimizer.safetensors, history.parquet (epoch, loss,
            lr of the last step, metrics of the task; means over images; all epochs from 1) and state.json, written last.
        until: last epoch, at most `schedule.epochs`; 0 writes the initial weights, and the metrics are empty.
        start: snapshot of any earlier epoch of the same training; None trains from scratch.
        max_batch_size: so many images at most, and a quarter of a batch, go through the network at once (`_Batches.parts`).
        on_epoch: called with (epoch, its metrics, a function that writes this epoch's snapshot into a directory).

    Raises:
        ValueError: a loss that is not finite (naming the epoch), fewer than two images, or an `until` out of reach.
    """
    backbone.to(device).to(memory_format=torch.channels_last)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
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
    for step, (pixels, indices, generator) in enumerate(batches.of_epoch(epoch)):
        rate = learning_rate(schedule, epoch - 1 + (step + 0.5) / batches.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = task.batch(pixels, indices, generator)
        found: list[tuple[str, Tensor, float]] = []
        for share, some, wanted in batches.parts(inputs, targets):
            with torch.autocast(pixels.device.type, torch.bfloat16, enabled=schedule.precision == "bfloat16"):
                outputs = task.forward(model, some) if task.forward else head(backbone(some))
                loss, metrics = task.loss(outputs, wanted)
            if not found:
                optimizer.zero_grad()
            loss.backward(torch.full_like(loss, share))  # of a whole batch 1, as backward() has it; of parts the sum is its
            found += [(name, value.detach(), share * len(indices)) for name, value in {"loss": loss, **metrics}.items()]
        optimizer.step()
        if task.after_step:
            task.after_step(model)
        for name, value, count in found:  # summed on the device: asking for a number would wait for it
            part = value.double() * count
            sums[name] = sums[name] + part if name in sums else part
        seen += len(indices)
        progress.advance("step")
    means = {name: float(total) / seen for name, total in sums.items()}
    if not math.isfinite(means["loss"]):
        raise ValueError(f"the loss of epoch {epoch} is {means['loss']}; a lower learning rate than {schedule.lr} may help")
    return {"loss": means.pop("loss"), "lr": rate, **means}


class _Batches:
    """Shuffled batches of the kept images: (pixels on the device, indices, generator of the batch) per step of an epoch."""

    def __init__(self, images: Images, task: Task, size: int, seed: int, device: str, max_batch_size: int | None) -> None:
        self.images, self.size, self.seed, self.device = images, size, seed, device
        self.order = task.order
        self.most = None
        if max_batch_size is not None and task.mean_over_images:
            self.most = max(2, min(max_batch_size, size // 4))  # a small batch did not fit either
        self.kept = torch.arange(len(images)) if task.keep is None else task.keep
        if len(self.kept) < 2:
            raise ValueError(f"training needs two images or more, and {len(self.kept)} of {len(images)} are kept")
        self.steps = len(self.kept) // size + (len(self.kept) % size > 1)

    @functools.cached_property
    def resident(self) -> Tensor | None:
        if len(self.kept) * self.images.size**2 * 3 > RESIDENT_BYTES.get(torch.device(self.device).type, 0):
            return None
        return torch.from_numpy(self.images.read(self.kept.numpy())).to(self.device)

    def of_epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
        parts = self._order(torch.Generator().manual_seed(seed_of(self.seed, "shuffle", epoch))).split(self.size)[: self.steps]
        generator = torch.Generator()
        for step, (pixels, places) in enumerate(zip(self._pixels(parts), parts, strict=True)):
            yield pixels, self.kept[places], generator.manual_seed(seed_of(self.seed, "batch", epoch, step))

    def parts(self, inputs: Tensor, targets: Tensor) -> list[tuple[float, Tensor, Tensor]]:
        """(share of the batch, inputs, targets) of each part of a batch: of the whole one, or of few images each.

        A batch is made whole, so each image looks as it would without parts, and only then cut. Where the task's loss is a mean
        over images, the parts' gradients, each times its share, sum to the batch's, up to rounding. What the network itself
        takes from a batch is the part's: batch norm's statistics, which then also move once per part, and dropout's draws. No
        part is a single image, which batch norm cannot use.
        """
        if self.most is None or len(targets) <= self.most:
            return [(1.0, inputs, targets)]
        number = min(-(-len(targets) // self.most), len(targets) // 2)
        wanted = targets.tensor_split(number)
        rows = len(inputs) // len(targets)
        some = inputs.split([rows * len(part) for part in wanted])
        return [(len(part) / len(targets), each, part) for each, part in zip(some, wanted, strict=True)]

    def _order(self, generator: torch.Generator) -> Tensor:
        """Places in `kept` of one epoch's images."""
        if self.order is None:
            return torch.randperm(len(self.kept), generator=generator)
        wanted = self.order(generator)
        places = torch.searchsorted(self.kept, wanted).clamp_(max=len(self.kept) - 1)
        if len(wanted) != len(self.kept) or not torch.equal(self.kept[places], wanted):
            raise ValueError(f"the task's order is not {len(self.kept)} of the {len(self.kept)} images that it keeps")
        return places

    def _pixels(self, parts: tuple[Tensor, ...]) -> Iterator[Tensor]:
        if self.resident is not None:
            for places in parts:
                yield self.resident.index_select(0, places.to(self.device, non_blocking=True))
            return
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self.images.read, self.kept[parts[0]].numpy())
            for places in parts[1:]:
                pixels, coming = coming.result(), reader.submit(self.images.read, self.kept[places].numpy())
                yield torch.from_numpy(pixels).to(self.device)
            yield torch.from_numpy(coming.result()).to(self.device)


def _optimizer(schedule: Schedule, model: nn.Module) -> torch.optim.Optimizer:
    """Weights decay, biases and norms (one axis) do not, as in Caffe's AlexNet and most recipes since."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=schedule.lr)
    return torch.optim.SGD(groups, lr=schedule.lr, momentum=schedule.momentum)
