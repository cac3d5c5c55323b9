"""Training of one segment, up to a given epoch, with checkpoints on the way. The stages of teacher and student share it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ktray import plugins
from ktray.artifact import Stage
from ktray.checkpoints import keeping_newest
from ktray.images import Images
from ktray.ops import augmentation, resizing
from ktray.pool import StageContext
from ktray.spec import Augment, Schedule, Student, TrainedTeacher
from ktray.training import averaged_weights, loop, optimisers
from ktray.training.task import Task

IDENTITY, REVISION = "stage.training_segment", 1
TOOLS = (loop, augmentation)
TOOLS_OF_SOME = (averaged_weights, optimisers)
"""Only in the keys of trainings that use them, see `tools_of`."""


IMAGE_SIZE = "image_size"
"""Field of the spec of a training on images that are resized for its network; absent where they are not."""


def resizing_of(network: Student | TrainedTeacher) -> tuple[dict[str, int], tuple[ModuleType, ...]]:
    """What the size of the images that a network sees adds to the spec of its training, and to the revisions in its key."""
    return ({}, ()) if network.image_size is None else ({IMAGE_SIZE: network.image_size}, (resizing,))


def spec_at(epoch: int, schedule: Schedule, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a snapshot at the end of `epoch`, which `run_training` executes.

    It holds only the part of the schedule that determines that snapshot, so that trainings of other lengths share it.

    Args:
        fields: ``backbone``, ``seed`` and whatever else the training depends on.
    """
    return {**fields, "epoch": epoch, "schedule": loop.snapshot_slice(schedule, epoch)}


def tools_of(schedule: Schedule, augment: Augment | None) -> tuple[ModuleType, ...]:
    """The modules whose REVISION counts for a training with these settings, beside those of TOOLS."""
    chosen = schedule.optimizer not in optimisers.CAPTURABLE or schedule.layer_decay != 1
    return (
        *((averaged_weights,) if schedule.ema is not None else ()),
        *((optimisers,) if chosen else ()),
        *(augmentation.tools_of(augment) if augment else ()),
    )


def run_training(
    stage: Stage, task: Task, images: Images, out: Path, context: StageContext, start: Path | None
) -> dict[str, float]:
    """Train the backbone of ``stage.spec`` to ``stage.spec["epoch"]``; metrics of the last epoch and `parameters`."""
    images = resizing.at_size(images, stage.spec.get(IMAGE_SIZE))
    backbone_spec = plugins.parse("backbone", stage.spec["backbone"])
    seed, until = stage.spec["seed"], stage.spec["epoch"]
    backbone = loop.untrained_backbone(backbone_spec, seed)
    schedule = loop.schedule_of(stage.spec["schedule"], until)
    metrics = loop.fit(
        backbone,
        task,
        images,
        schedule,
        seed,
        out=out,
        until=until,
        start=start,
        device=context.device,
        max_batch_size=context.max_batch_size,
        on_epoch=_checkpointing(out, until, context),
    )
    return {**metrics, "epoch": float(until), "parameters": float(sum(p.numel() for p in backbone.parameters()))}


def _checkpointing(out: Path, until: int, context: StageContext) -> loop.OnEpoch:
    """Report every epoch, and save a checkpoint when more than `context.checkpoint_seconds` of work would be lost."""
    keep_newest = keeping_newest(out, context.checkpoint_seconds)

    def on_epoch(epoch: int, metrics: dict[str, float], save: loop.Save) -> None:
        context.progress({"epoch": epoch, "of": until, **metrics})
        if epoch < until:
            keep_newest(epoch, save, {})

    return on_epoch
