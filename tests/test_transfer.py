import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

from ktray import classification, plugins, train
from ktray.spec import Augment, Schedule
from tests.toy_images import toy_images

torch.set_num_threads(1)

KINDS = plugins.kinds("transfer")
TRAINED = [kind for kind in KINDS if hasattr(plugins.module("transfer", kind), "task")]
BACKBONE = plugins.parse("backbone", {"kind": "alexnet", "width": 0.125})


def task_of(kind, targets, classes):
    return plugins.module("transfer", kind).task(plugins.parse("transfer", kind), targets, classes, Augment(crop=1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_transfer_says_which_of_its_fields_determine_which_stage(kind):
    module = plugins.module("transfer", kind)
    fields = set(module.Spec.model_fields) - {"kind"}
    named = [field for needed in module.NEEDS.values() for field in needed]
    assert set(module.NEEDS) <= {"features", "clusters", "pseudo_labels", "labels"}
    assert len(named) == len(set(named))
    assert set(named) <= fields


@pytest.mark.parametrize("kind", TRAINED)
def test_every_transfer_trains_a_student_whose_loss_falls(kind, tmp_path):
    images = toy_images(64, size=16)
    targets = images.labels.copy()
    targets[::7] = -1
    losses = []
    metrics = train.fit(
        train.fresh(BACKBONE, 0),
        task_of(kind, targets, 4),
        images,
        Schedule(epochs=6, lr=0.05, batch_size=16),
        0,
        out=tmp_path,
        until=6,
        on_epoch=lambda epoch, metrics, write: losses.append(metrics["loss"]),
    )
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["top1"] > 0.6


@pytest.mark.parametrize("kind", TRAINED)
def test_every_transfer_leaves_out_the_images_without_a_target(kind):
    targets = np.array([0, -1, 2, -1, 1], np.int64)
    task = task_of(kind, targets, 3)
    assert task.keep.tolist() == [0, 2, 4]
    pixels = torch.from_numpy(toy_images(5).read(task.keep.numpy()))
    inputs, found = task.batch(pixels, task.keep, torch.Generator().manual_seed(0))
    assert inputs.shape == (3, 3, 28, 28)
    assert found.tolist() == [0, 2, 1]


@pytest.mark.parametrize("kind", TRAINED)
def test_every_transfer_refuses_targets_beyond_its_classes(kind):
    with pytest.raises(ValueError, match="not 3 classes"):
        task_of(kind, np.array([0, 3], np.int64), 3)


def test_the_fields_of_clusters_and_their_stages_are_complete():
    module = plugins.module("transfer", "clusters")
    named = {field for needed in module.NEEDS.values() for field in needed}
    assert named == set(module.Spec.model_fields) - {"kind"}, "a field that no stage reads would be an ignored parameter"


def test_an_untrained_student_needs_nothing_and_states_no_task():
    module = plugins.module("transfer", "none")
    assert module.NEEDS == {}
    assert not hasattr(module, "task")


def test_cross_entropy_and_top1_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 5, 40)
    loss, metrics = classification.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert float(loss) == pytest.approx(log_loss(targets, chances, labels=range(5)), abs=1e-5)
    assert float(metrics["top1"]) == pytest.approx(accuracy_score(targets, logits.argmax(axis=1)))
