"""The JSON schemas for editors: judged by an independent validator, they accept what ktray accepts and refuse typing errors."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest
import yaml

from ktray.cli import main
from ktray.scheduler.resources import STAGES
from ktray.search.file_schema import SCHEMAS
from tests.searches import SPACE
from tests.source import ROOT
from tests.toys import toy_spec

VALIDATORS = {name: jsonschema.Draft202012Validator(make()) for name, make in SCHEMAS.items()}
FULL_RUNTIME = {"cpus": 8, "stages": {"student": {"gpus": 0.5, "cpus": 2}, "images": {"helpers": 3}}, "dead_after": 20}


def accepts(file: str, content: Any) -> bool:
    return bool(VALIDATORS[file].is_valid(content))


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at a dotted path replaced."""
    found = copy.deepcopy(content)
    *places, last = path.split(".")
    entry = found
    for place in places:
        entry = entry[place]
    entry[last] = value
    return found


@pytest.mark.parametrize("file", SCHEMAS)
def test_a_schema_is_valid_itself(file: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[file]())


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.yaml")), ids=lambda path: path.name)
def test_the_schema_accepts_every_space_that_comes_with_ktray(path: Any) -> None:
    assert list(VALIDATORS["space"].iter_errors(yaml.safe_load(path.read_text()))) == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("space", SPACE),
        ("space", changed(SPACE, "budget", {"trials": 5, "stop_after": "12h"})),
        ("space", changed(SPACE, "pair.student.schedule.lr", {"log_float": [0.01, 0.2]})),
        ("space", changed(SPACE, "pair.transfer", {"one_of": {"a": {"kind": "labels"}, "b": {"kind": "none"}}})),
        ("space", changed(SPACE, "pair.data", {"choice": ["fashion_mnist_mini", "cifar10"]})),
        ("pair", toy_spec()),
        ("pair", toy_spec(data="parquet:/data/x?label=label")),
        ("pair", toy_spec(data=dict.fromkeys(("pretext", "cluster", "transfer", "target"), "cifar10"))),
        ("pair", toy_spec(evals="quick")),
        ("pair", toy_spec(evals=["quick", {"kind": "knn", "k": [1, 5]}])),
        ("pair", toy_spec(teacher={"pair": toy_spec(), "layer": "conv3"})),
        ("pair", toy_spec(teacher={"descriptor": {"kind": "my_lab.corner", "anything": 1}})),
        ("runtime", FULL_RUNTIME),
        ("runtime", {}),
    ],
)
def test_the_schema_accepts_what_ktray_accepts(file: str, content: Any) -> None:
    assert list(VALIDATORS[file].iter_errors(content)) == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("space", changed(SPACE, "budgets", {"trials": 5})),
        ("space", changed(SPACE, "sampler", "tpee")),
        ("space", changed(SPACE, "pair.student.schedule.epoch", 5)),
        ("space", changed(SPACE, "pair.student.schedule.epochs", {"chooses": [1, 2]})),
        ("space", changed(SPACE, "pair.transfer.kind", "cluster")),
        ("pair", SPACE["pair"]),
        ("pair", toy_spec(data="cifar11")),
        ("pair", toy_spec(evals=["knn", "quik"])),
        ("pair", toy_spec(student={"backbone": "alexnet", "schedule": {"epochs": 0}})),
        ("runtime", {"cpu": 8}),
        ("runtime", {"stages": {"students": {}}}),
        ("runtime", {"stages": {"student": {"gpu": 1}}}),
    ],
)
def test_the_schema_refuses_what_ktray_refuses(file: str, content: Any) -> None:
    assert not accepts(file, content)


def test_the_verb_prints_the_schema_that_the_editors_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "runtime"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]["stages"]["properties"]) == set(STAGES)
