"""The contract of all transfers; a new file in the folder is tested automatically."""

from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch

from ktray import plugins
from ktray.pipeline.pair_graph import build
from ktray.spec import Augment, Schedule
from ktray.training import loop
from ktray.training.task import Features, Labels, Targets, make_batch
from tests.toy_images import toy_images
from tests.toys import HOG, toy_pair

torch.set_num_threads(1)

KINDS = plugins.kinds("transfer")
TRAINED = [kind for kind in KINDS if hasattr(plugins.module("transfer", kind), "task")]
BACKBONE = plugins.parse("backbone", {"kind": "alexnet", "width": 0.125})
IMAGES = toy_images(64, size=16)
SMALL = {"k": 4, "neighbours": 3, "anchors": 16, "queue": 16, "grid": 1}  # for 64 images
OF_THE_TEACHER = {"clusters", "pseudo_labels", "features"}


def needs(kind):
    return plugins.module("transfer", kind).NEEDS


def small(kind, **changes):
    """The spec of a kind, made for few images."""
    fields = plugins.module("transfer", kind).Spec.model_fields
    return plugins.parse("transfer", {"kind": kind, **{name: n for name, n in SMALL.items() if name in fields}, **changes})


def targets(kind, labels=IMAGES.labels):
    """What the kind reads of the toy images: four clusters that are their classes, features that tell them apart."""
    features = np.random.default_rng(0).normal(0.2, 0.1, (len(IMAGES.labels), 10)).astype(np.float32)
    features[np.arange(len(features)), IMAGES.labels] += 1
    nearest = (IMAGES.labels[:, None] + np.arange(3)) % 4
    squared = np.sort(np.random.default_rng(1).uniform(0.5, 2, nearest.shape), axis=1).astype(np.float32)
    found = needs(kind)
    heads = (Labels(labels, 4, nearest, squared),) if {"pseudo_labels", "labels"} & found.keys() else ()
    read = Features((features[:40], features[40:])) if "features" in found else None
    return Targets(len(IMAGES.labels), heads, read, IMAGES.size)


def task_of(kind, **changes):
    return plugins.module("transfer", kind).task(small(kind), targets(kind, **changes), Augment(crop=0))


def fitted(kind, out, until, start=None, losses=None):
    return loop.fit(
        loop.untrained_backbone(BACKBONE, 0),
        task_of(kind),
        IMAGES,
        Schedule(epochs=40, lr=0.05, batch_size=16),
        0,
        out=out,
        until=until,
        start=start,
        on_epoch=lambda epoch, metrics, write: losses.append(metrics["loss"]) if losses is not None else None,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_transfer_declares_which_of_its_fields_determine_which_stage(kind):
    named = [field for needed in needs(kind).values() for field in needed]
    assert set(needs(kind)) <= {*OF_THE_TEACHER, "labels"}
    assert ("clusters" in needs(kind)) == ("pseudo_labels" in needs(kind))
    assert len(named) == len(set(named))
    assert set(named) <= plugins.module("transfer", kind).Spec.model_fields.keys() - {"kind"}


@pytest.mark.parametrize("kind", TRAINED)
def test_every_transfer_trains_a_student_whose_loss_falls(kind, tmp_path):
    losses = []
    fitted(kind, tmp_path, 40, losses=losses)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", TRAINED)
def test_every_transfer_trains_to_the_same_bits_however_it_is_split_into_segments(kind, tmp_path):
    whole = fitted(kind, tmp_path / "whole", 3)
    fitted(kind, tmp_path / "1", 1)
    assert fitted(kind, tmp_path / "parts", 3, tmp_path / "1") == whole
    for name in ("weights.safetensors", "optimizer.safetensors", "history.parquet"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


@pytest.mark.parametrize("kind", TRAINED)
def test_every_transfer_draws_its_batches_only_from_the_generator(kind):
    task, indices = task_of(kind), torch.tensor([3, 50, 41, 3])
    pixels = torch.from_numpy(IMAGES.read(indices.numpy()))
    (one, wanted), (two, again) = (make_batch(task, pixels, indices, torch.Generator().manual_seed(5)) for _ in range(2))
    assert one.shape == (4, 3, 16, 16)
    assert len(wanted) == 4
    assert torch.equal(one, two)
    assert torch.equal(wanted, again)
    assert torch.equal(wanted[0], wanted[3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_has_the_stages_that_its_transfer_needs(kind):
    teacher = HOG if needs(kind).keys() & OF_THE_TEACHER else None
    graph = build(toy_pair(transfer=small(kind), teacher=teacher), lambda spec: "content")
    names = {stage.name for stage in graph.stages}
    assert ("features" in names) == (teacher is not None)
    assert {"clusters", "pseudo_labels"} & names == {"clusters", "pseudo_labels"} & needs(kind).keys()
    student = next(stage for stage in graph.stages if stage.name == "student")
    read = {role for role in student.inputs if not role.startswith("images")}
    assert read == needs(kind).keys() - {"labels"}


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_of_a_transfer_is_ignored(kind):
    teacher = HOG if needs(kind).keys() & OF_THE_TEACHER else None

    def student(**changes):
        return build(toy_pair(transfer=small(kind, **changes), teacher=teacher), lambda spec: "content").keys["student"]

    for name, field in plugins.module("transfer", kind).Spec.model_fields.items():
        if name != "kind":
            value = another(getattr(small(kind), name), field.annotation)
            assert student(**{name: value}) != student(), name


def another(value, annotation):
    """A value of a field that differs from `value`."""
    if get_origin(annotation) is Literal:
        return next(option for option in get_args(annotation) if option != value)
    if isinstance(value, bool):
        return not value
    if str in get_args(annotation):
        return f"{value}5"
    if isinstance(value, tuple):
        return [*value, 16]
    return 2 if value is None else value + 1 if isinstance(value, int) else value / 2 or 0.5


@pytest.mark.parametrize("kind", ["clusters", "labels"])
def test_images_without_a_target_are_left_out(kind):
    labels = np.where(np.arange(64) % 7 == 0, -1, IMAGES.labels)
    task = task_of(kind, labels=labels)
    assert task.keep.tolist() == [index for index in range(64) if index % 7]
    _, found = make_batch(
        task, torch.from_numpy(IMAGES.read(np.arange(1, 7))), torch.arange(1, 7), torch.Generator().manual_seed(0)
    )
    assert found.tolist() == labels[1:7].tolist()


@pytest.mark.parametrize("kind", ["clusters", "labels"])
def test_targets_outside_the_classes_are_refused(kind):
    with pytest.raises(ValueError, match=r"targets lie in \[0, 4\], but must lie in \[-1, 4\)"):
        task_of(kind, labels=np.where(np.arange(64) == 9, 4, IMAGES.labels))


@pytest.mark.parametrize("kind", [kind for kind in TRAINED if "features" in needs(kind)])
def test_a_transfer_that_reads_features_raises_if_there_are_none(kind):
    with pytest.raises(ValueError, match="reads the teacher's features"):
        plugins.module("transfer", kind).task(small(kind), Targets(64), Augment())


def test_an_untrained_student_needs_no_inputs_and_defines_no_task():
    module = plugins.module("transfer", "none")
    assert module.NEEDS == {}
    assert not hasattr(module, "task")
