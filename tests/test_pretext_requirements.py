"""Pretext tasks that look at their data first: what they refuse, when, and how their labels are told of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ktray.errors import UserError
from ktray.images import Source, Splits
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_check import check_pair
from ktray.pipeline.pair_graph import build
from ktray.pool import StageContext
from ktray.pretext import colorization, supervised
from ktray.report import headline
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.stores.file import FileStore
from ktray.training.task import make_batch
from tests.toy_images import toy_images
from tests.toys import toy_pair

torch.set_num_threads(1)


def test_grey_images_are_refused_with_the_reason():
    images = toy_images(30)
    grey = replace(images, read=lambda indices: images.read(indices)[..., :1].repeat(3, axis=-1))
    with pytest.raises(ValueError, match="'colorization' needs colours, and the images of this data are grey"):
        colorization.task(colorization.Spec(), 28, grey)


def teacher(kind):
    backbone = {"kind": "alexnet", "width": 0.125}
    return {"pretext": {"kind": kind}, "backbone": backbone, "layer": "conv3", "schedule": {"epochs": 1}}


def listing(pixels, labels):
    source = Source(tuple(f"{i:03}.png" for i in range(100)), lambda index: pixels, labels)
    return lambda spec: Splits(source)


def test_a_plan_is_refused_before_anything_runs_if_the_data_lacks_colours_or_labels():
    coloured = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    labels = np.arange(100) % 4
    check_pair(toy_pair(teacher=teacher("colorization")), listing(coloured, labels))
    with pytest.raises(UserError, match=r"teacher.pretext.kind: the pretext task 'colorization' needs colours"):
        check_pair(toy_pair(teacher=teacher("colorization")), listing(coloured[..., :1].repeat(3, axis=-1), labels))
    check_pair(toy_pair(teacher=teacher("supervised")), listing(coloured, labels))
    unlabelled = {"teacher": teacher("supervised"), "evals": []}
    with pytest.raises(UserError, match=r"teacher.pretext.kind: the pretext task 'supervised' needs labels"):
        check_pair(toy_pair(**unlabelled), listing(coloured, None))


def test_a_supervised_teacher_learns_the_labels_and_leaves_out_what_has_none(tmp_path):
    images = toy_images(60)
    some = replace(images, labels=np.where(np.arange(60) < 50, images.labels, -1))
    task = supervised.task(supervised.Spec(), 28, some)
    assert task.keep.tolist() == list(range(50))
    _, targets = make_batch(task, torch.from_numpy(images.read(np.arange(9))), torch.arange(9), torch.Generator())
    assert targets.tolist() == images.labels[:9].tolist()
    with pytest.raises(ValueError, match="'supervised' needs labelled images"):
        supervised.task(supervised.Spec(), 28, replace(images, labels=None))


def computed(pair, store, stage):
    """The artifact of the pair's stage, computed with what it reads."""
    graph = build(pair, data_identity())
    wanted = [each for each in graph.stages if each.name in ("images", stage)]
    LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(wanted, "test")
    return store.find(graph.keys[stage])


@pytest.mark.parametrize("kind", ["supervised", "colorization"])
def test_the_teacher_stage_gives_the_task_the_images_of_its_data(kind, tmp_path):
    made = computed(toy_pair(teacher=teacher(kind)), FileStore(tmp_path), "teacher")
    assert 0 <= made.metrics["top1"] <= 1
    assert made.record["revisions"][f"pretext.{kind}"] == 1


def test_the_key_of_a_teacher_knows_the_tools_that_its_settings_come_from():
    def revisions(stage, **teacher_fields):
        graph = build(toy_pair(teacher=teacher_fields), lambda spec: "0" * 64)
        return next(each.revisions for each in graph.stages if each.name == stage)

    assert {"distortions", "colour", "pretext.simclr"} <= set(revisions("teacher", **teacher("simclr")))
    assert {"distortions", "colour", "pretext.byol"} <= set(revisions("teacher", **teacher("byol")))
    bag = {"descriptor": {"kind": "bag_of_hog"}}
    assert {"descriptor.hog", "descriptor.bag_of_hog"} <= set(revisions("teacher", **bag))


def test_the_report_says_that_a_supervised_teacher_saw_labels():
    pair = toy_pair(teacher=teacher("supervised")).model_dump()
    assert headline._labels(pair, {}) == "Trained with the labels of its training images."
    pair = toy_pair(teacher=teacher("rotation")).model_dump()
    assert headline._labels(pair, {}) == "No labels were used, neither to train nor to select."
