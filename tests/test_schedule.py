"""A schedule has only the fields of its kind, and reaches its learning rate."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ktray.spec import Schedule
from ktray.training.loop import lr_at
from tests.toys import STUDENT, toy_pair


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "cosine", "decay": 0.2}, "decay belongs to warmup_stable"),
        ({"kind": "constant", "warmup": 1}, "no warmup"),
        ({"kind": "linear"}, "warmup_stable"),
        ({"optimizer": "adamw", "momentum": 0.5}, "momentum belongs to sgd"),
        (
            {"warmup": 6},
            r"warmup=6 epochs do not end before the training ends, after 5 of 5, so lr=0\.05 is never reached; warm up",
        ),
        ({"warmup": 3, "decay": 0.5}, r"do not end before the decay begins, after 2\.5 of 5"),
        ({"kind": "cosine", "warmup": 5}, "do not end before the training ends"),
        ({"lr": 0}, "greater than 0"),
        ({"lr": float("nan")}, "finite"),
        ({"weight_decay": float("inf")}, "finite"),
    ],
)
def test_a_schedule_has_only_the_fields_of_its_kind(fields, words):
    with pytest.raises(ValidationError, match=words):
        Schedule(epochs=5, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": 10, "warmup": 7, "decay": 0.3},
        {"epochs": 10, "warmup": 1, "decay": 0.9},
        {"epochs": 1, "warmup": 1},  # the first epoch of a longer training, which is in its place
        {"epochs": 1, "decay": 1.0},
        {"epochs": 2, "warmup": 1.5, "kind": "cosine"},
    ],
)
def test_a_schedule_may_warm_up_until_its_decay_begins_or_its_training_ends(fields):
    schedule = Schedule(**fields)
    assert lr_at(schedule, schedule.warmup) == pytest.approx(schedule.lr)


def test_a_warmup_that_is_too_long_is_refused_with_its_place_in_the_pair():
    with pytest.raises(ValidationError) as caught:
        toy_pair(student={**STUDENT, "schedule": {"epochs": 2, "warmup": 5}})
    assert [problem["loc"] for problem in caught.value.errors()] == [("student", "schedule")]
