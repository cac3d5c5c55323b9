"""What a plan refuses: pairs that are well formed and that a network, a descriptor or the data would refuse in the run."""

from __future__ import annotations

import re

import pytest
import torch

from ktray import plugins
from ktray.errors import UserError
from ktray.pipeline.pair_check import _extract, _learn, check_pair, data_loader
from tests.toys import DATA, HOG, ROTATION, STUDENT, toy_pair

torch.set_num_threads(1)

LOAD = data_loader()
NARROW = {"kind": "alexnet", "width": 0.125}
FULL = {**NARROW, "form": "full"}
BAG = {"kind": "bag_of_hog", "words": 8, "hog": {"kind": "hog", "cell": 4}}


def random_network(**fields):
    return {"descriptor": {"kind": "random_network", "backbone": NARROW, **fields}}


def puzzle(kind="jigsaw", **fields):
    return {**ROTATION, "pretext": {"kind": kind, "permutations": 20, **fields}}


REFUSED = {
    "a layer of a descriptor": (
        {"evals": [{"kind": "knn", "of": "teacher", "layer": "conv3"}]},
        "evals.0.layer: the teacher is the descriptor hog, which has no layer 'conv3'",
    ),
    "pseudo-labels that nobody makes": (
        {"teacher": None, "transfer": "labels", "evals": ["knn", "cluster_quality"]},
        "evals.1: cluster_quality judges pseudo-labels, and the transfer 'labels' makes none",
    ),
    "a cell larger than half the image": (
        {"teacher": {"descriptor": {"kind": "hog", "cell": 20}}},
        "teacher.descriptor.cell: images of 28 x 28 px are too small for a block",
    ),
    "the same in a bag of words": (
        {"teacher": {"descriptor": {**BAG, "hog": {"kind": "hog", "cell": 20}}}},
        "teacher.descriptor.hog.cell: images of 28 x 28 px are too small for a block",
    ),
    "a teacher's grid": ({"teacher": {**ROTATION, "pool": {"grid": 9}}}, "teacher.pool.grid: a grid of 9 is finer"),
    "an evaluation's grid": (
        {"evals": [{"kind": "knn", "layer": "conv5", "pool": {"grid": 9}}]},
        "evals.0.pool.grid: a grid of 9 is finer",
    ),
    "a random network's layer": (random_network(layer="conv9"), "teacher.descriptor.layer: the backbone has no layer 'conv9'"),
    "a random network's grid": (
        random_network(layer="conv5", pool={"grid": 9}),
        "teacher.descriptor.pool.grid: a grid of 9 is finer",
    ),
    "a histogram's grid": (
        {"teacher": {"descriptor": {"kind": "colour_histogram", "grid": 12}}, "data": {**DATA, "size": 8}},
        "teacher.descriptor: the descriptor colour_histogram cannot take images of 8 px: its features are not finite",
    ),
    "a student too deep for the images": (
        {"student": {**STUDENT, "backbone": FULL}},
        "student.backbone: the alexnet cannot take images of 28 px",
    ),
    "a teacher too deep for the images": (
        {"teacher": {**ROTATION, "backbone": FULL}},
        "teacher.backbone: the alexnet cannot learn rotation from images of 28 px",
    ),
    "more words than patterns are drawn": (
        {"teacher": {"descriptor": {**BAG, "words": 200, "patterns": 100}}},
        "teacher.descriptor.words: 200 words cannot be made of 100 patterns",
    ),
    "more words than the images have patterns": (
        {"teacher": {"descriptor": {**BAG, "words": 8000}}},
        "teacher.descriptor.words: 8000 words cannot be made of 7776 patterns",
    ),
    "clusters larger than the data": (
        {"transfer": {"kind": "clusters", "k": 5, "min_size": 300}},
        "transfer.min_size: no cluster of 216 images has min_size=300",
    ),
    "permutations that do not exist": (
        {"teacher": puzzle(distance=9)},
        "teacher.pretext.permutations: found only 9 of 20 permutations",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_refuses_what_a_run_would_refuse(case):
    changes, said = REFUSED[case]
    changes = changes if "descriptor" not in changes else {"teacher": changes}
    with pytest.raises(UserError, match="^" + re.escape(said)):
        check_pair(toy_pair(**changes), LOAD)


@pytest.mark.parametrize("kind", plugins.kinds("pretext"))
def test_every_pretext_task_that_ships_is_tried_on_made_up_images(kind):
    check_pair(toy_pair(teacher={**ROTATION, "pretext": {"kind": kind}}), LOAD)


@pytest.mark.parametrize("kind", plugins.kinds("descriptor"))
def test_every_descriptor_that_ships_is_tried_on_made_up_images(kind):
    fields = {"random_network": {"backbone": NARROW}}.get(kind, {})
    check_pair(toy_pair(teacher={"descriptor": {"kind": kind, **fields}}), LOAD)


def test_each_network_runs_once_however_many_draws_share_it():
    first = toy_pair(teacher=ROTATION)
    check_pair(first, LOAD)
    before = _extract.cache_info().misses, _learn.cache_info().misses
    check_pair(toy_pair(teacher=ROTATION, transfer={"kind": "clusters", "k": 6}), LOAD)
    assert (_extract.cache_info().misses, _learn.cache_info().misses) == before


def test_a_trial_run_leaves_the_random_stream_as_it_was():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_pair(toy_pair(teacher=random_network(seed=77), evals=[{"kind": "knn", "pool": {"grid": 1}}]), LOAD)
    check_pair(toy_pair(teacher={**ROTATION, "pretext": {"kind": "rotation", "rotations": "one"}}), LOAD)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_hog_teacher_that_fits_is_let_through():
    check_pair(toy_pair(teacher=HOG, evals=[{"kind": "knn", "of": "teacher"}, "cluster_quality"]), LOAD)


def roles(other, **changes):
    """The toy data in all roles but `changes`' one, which holds out other images than the target."""
    return {
        **dict.fromkeys(("pretext", "cluster", "transfer", "target"), DATA),
        other: {**DATA, "split": {"seed": 1}, **changes},
    }


@pytest.mark.parametrize(
    ("role", "changes"),
    [
        ("transfer", {"teacher": None, "transfer": "labels"}),
        ("pretext", {"teacher": {**ROTATION, "pretext": "supervised"}}),
    ],
)
def test_images_that_judge_are_not_trained_on_with_their_labels(role, changes):
    with pytest.raises(UserError, match=rf"data\.{role}\.split: \d+ of 24 images that judge .* reads their labels.*seed: 0"):
        check_pair(toy_pair(data=roles(role), **changes), LOAD)
    check_pair(toy_pair(data=roles(role, seed=9), **changes), LOAD)  # other images
    check_pair(toy_pair(data=roles(role, split={"seed": 0}, size=32), **changes), LOAD)  # the same images are held out


@pytest.mark.parametrize("role", ["pretext", "cluster", "transfer"])
def test_a_role_that_reads_no_labels_may_see_the_images_that_judge(role):
    check_pair(toy_pair(data=roles(role), teacher=ROTATION), LOAD)
