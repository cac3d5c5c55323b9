"""How many labels the judges of a search read: a report says so, and must not conceal one."""

from __future__ import annotations

import sys

import pytest

from ktray.cli.search_command import _footer
from ktray.errors import UserError
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_graph import build
from ktray.pipeline.references import labels_used
from ktray.pool import StageContext
from ktray.runs.search_run import SearchOutcome
from ktray.runs.settings import Settings
from ktray.runs.voc_composition import compose
from ktray.stores.file import FileStore
from tests.pictures import data_spec, picture
from tests.toys import DATA, toy_pair

AGREEMENT = """
from ktray.spec import Pooling
from ktray.strict import StrictSpec
REVISION = 1
NEEDS_LABELS, READS_PSEUDO_LABELS, DIRECTION = False, True, {"rand_index": "max"}
class Spec(StrictSpec):
    kind: str = "lab_of_labels.agreement"
    name: str | None = None
    of: str = "student"
    layer: None = None
    pool: Pooling = Pooling()
    split: str = "val"
def evaluate(spec, *, features, train, judged, pseudo_labels, out, device):
    raise NotImplementedError
"""
OTHER = {**DATA, "count": 120}  # 108 training images and 12 of val, where DATA has 216 and 24


@pytest.fixture
def store(tmp_path):
    return FileStore(tmp_path / "store")


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A function that writes the evaluation `lab_of_labels.agreement`, which declares what it is given."""

    def write(declared=""):
        (tmp_path / "lab_of_labels").mkdir()
        (tmp_path / "lab_of_labels" / "agreement.py").write_text(AGREEMENT + declared)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "lab_of_labels")
        for name in [name for name in sys.modules if name.split(".")[0] == "lab_of_labels"]:
            monkeypatch.delitem(sys.modules, name)

    return write


def finished(store, **changes):
    """The keys of a trial of which the images and the judgements are in the store; nothing was trained for them."""
    graph = build(toy_pair(**changes), data_identity())
    for stage in graph.stages:
        if stage.name == "images":
            execute(stage, store, "a", StageContext())
        elif stage.name == "evaluation":
            record = {"metrics": {"rand_index": 0.5}, "spec": stage.spec, "inputs": dict(stage.inputs)}
            store.publish(store.scratch(stage.key, "a"), stage.key, record)
    return graph.keys


def test_a_judge_that_needs_labels_reads_those_of_training_images_and_of_the_split_it_judges(store):
    assert labels_used([finished(store)], store) == {"train": 216, "val": 24}
    assert labels_used([finished(store, evals=[{"kind": "knn", "split": "test"}])], store).keys() == {"train", "test"}


def test_no_judge_that_reads_labels_means_no_labels(store):
    assert labels_used([finished(store, evals=[{"kind": "effective_rank"}])], store) == {}
    assert labels_used([], store) == {}


def test_labels_of_one_data_set_count_once_and_those_of_every_further_target_are_added(store):
    trials = [finished(store), finished(store, evals=[{"kind": "knn", "k": 1}])]
    assert labels_used(trials, store) == {"train": 216, "val": 24}
    trials.append(finished(store, data={**dict.fromkeys(("pretext", "cluster", "transfer"), DATA), "target": OTHER}))
    assert labels_used(trials, store) == {"train": 216 + 108, "val": 24 + 12}


def test_pseudo_labels_are_judged_by_the_labels_of_the_transfer_data(store):
    data = {**dict.fromkeys(("pretext", "cluster", "target"), DATA), "transfer": OTHER}
    assert labels_used([finished(store, data=data, evals=[{"kind": "cluster_quality"}])], store) == {"train": 108}


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("", {}),
        ('MAY_READ_LABELS = ("train",)', {"train": 216}),
        ('MAY_READ_LABELS = ("train", "judged")', {"train": 216, "val": 24}),
    ],
)
def test_an_evaluation_from_outside_declares_which_labels_it_reads_where_there_are_any(declared, expected, store, lab):
    lab(declared)
    assert labels_used([finished(store, evals=[{"kind": "lab_of_labels.agreement"}])], store) == expected


@pytest.mark.parametrize(("task", "needed"), [("detection", "presence"), ("detection", "boxes"), ("segmentation", "mask")])
def test_an_image_with_several_labels_with_boxes_or_with_a_mask_counts_once(task, needed, store, lab, tmp_path):
    compose(data_spec("fashion_mnist_mini"), tmp_path / "scenes", images=40, size=48)
    lab(f'NEEDS_ANNOTATIONS = ("{needed}",)')
    data = {"kind": "voc", "path": str(tmp_path / "scenes"), "size": 32, "task": task, "split": {"val": 0.2}}
    trial = finished(store, data=data, evals=[{"kind": "lab_of_labels.agreement"}])
    assert labels_used([trial], store) == ({"train": 16, "val": 4} if task == "detection" else {"train": 8, "val": 2})


def test_an_evaluation_that_is_not_trusted_may_have_read_all_labels(store, lab, monkeypatch):
    lab()
    trial = finished(store, evals=[{"kind": "lab_of_labels.agreement"}])
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "")
    assert labels_used([trial], store) == {"train": 216, "val": 24}


def test_labels_that_can_be_counted_no_more_are_not_passed_over(store):
    trial = finished(store)
    (images,) = store.root.glob("images-*")
    images.rename(images.with_name("gone"))
    with pytest.raises(UserError, match="the labels read cannot be counted"):
        labels_used([trial], store)


def test_the_end_of_a_search_advises_the_test_split_only_where_the_data_have_one(store, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for place in range(40):
        picture(place).save(photos / f"{place}.png")
    outcome = SearchOutcome("toy", "done")
    options = Settings(tmp_path, store.url)

    def said(again="", **changes):
        best, stages = {"keys": finished(store, **changes)}, {"computed": {}, "reused": {}}
        answer = {"stages": stages, "tracking_uri": "", "best": best, "seconds": 1.0}
        return _footer(answer, outcome, "", again, False, options)

    assert "ktray best toy --test" in said()
    without = said(data={"kind": "folder", "path": str(photos), "size": 28}, evals=[{"kind": "effective_rank"}])
    assert "ktray report toy" in without
    assert "--test" not in without
    assert "--retry" not in without
    assert "ktray search toy.yaml --retry" in said(again="ktray search toy.yaml")
