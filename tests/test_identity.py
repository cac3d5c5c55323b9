"""A stage executes the spec that its key was made of; nothing else, and no file's place, is part of either."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

import ktray
from ktray import plugins
from ktray.artifact import KEY_FORMAT, Stage, identity_text
from ktray.cli import main
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_graph import build
from ktray.pool import StageContext
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.spec import TOLERANCE, PairSpec
from ktray.stores.file import FileStore
from tests.source import PACKAGE
from tests.toys import DATA, ROTATION, STUDENT, toy_pair

DOCS = Path(__file__).parent.parent / "docs" / "identity.md"
PLACES = {"data", "checkpoint", "files", TOLERANCE}  # a tolerance decides whether images are accepted, not what they are
STRETCHED = {"epochs": 4, "lr": 0.02, "batch_size": 32, "warmup": 2.0, "decay": 0.25}
EVALS = [{"kind": "knn"}, {"kind": "knn", "name": "taught", "of": "teacher", "layer": "conv2"}]


def pair_of(kind: str, folder: Path) -> PairSpec:
    """A toy pair whose stages take another way each."""
    if kind == "trained":
        evals = [*EVALS, {"kind": "cluster_quality"}]
        return toy_pair(teacher=ROTATION, student={**STUDENT, "schedule": STRETCHED}, evals=evals)
    if kind == "several k":
        return toy_pair(transfer={"kind": "clusters", "k": [5, 7], "iterations": 3}, evals=[])
    if kind == "soft":
        return toy_pair(transfer={"kind": "soft_clusters", "k": 12, "neighbours": 3, "iterations": 3}, evals=[])
    if kind == "ready-made":
        rows = len(plugins.module("dataset", "synthetic").load(plugins.parse("dataset", DATA)).train.names)
        np.save(folder / "made.npy", np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32))
        return toy_pair(teacher={"features": str(folder / "made.npy")}, transfer={"kind": "regression"})
    return toy_pair(teacher=None, transfer={"kind": "none"})


@pytest.mark.parametrize("kind", ["trained", "several k", "soft", "ready-made", "random"])
def test_what_the_record_says_and_the_places_give_every_stage_in_the_same_bytes(kind: str, tmp_path: Path) -> None:
    graph = build(pair_of(kind, tmp_path), data_identity(), milestones={"student": [1, 3]})
    first, again = FileStore(tmp_path / "first"), FileStore(tmp_path / "again")
    LocalScheduler(first, execute, StageContext(), lambda event: None).obtain(list(graph.stages), "test")
    for stage in graph.stages:
        made = first.find(stage.key)
        assert made
        record = json.loads((made.directory / "record.json").read_text())
        rebuilt = Stage(record["stage"], record["spec"], record["revisions"], record["inputs"], local=stage.local)
        assert rebuilt.key == stage.key
        anew, _ = execute(rebuilt, again, "again", StageContext())
        assert anew.record["files"] == record["files"], stage.key


@pytest.mark.parametrize("kind", ["trained", "several k", "soft", "ready-made", "random"])
def test_beside_its_spec_a_stage_is_given_places_alone(kind: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for stage in build(pair_of(kind, tmp_path), data_identity()).stages:
        assert set(stage.local) <= PLACES
        assert TOLERANCE not in stage.local or stage.name == "images"
        for places in stage.local.get("data", {}).values():
            assert set(places) <= set(plugins.module("dataset", DATA["kind"]).LOCATION)
        assert all(Path(path).is_absolute() for path in stage.local.get("files", {}).values())


def test_the_places_of_a_data_set_are_those_that_its_kind_names() -> None:
    data = {"kind": "cifar10", "path": "/elsewhere"}
    stages = build(toy_pair(data=data), lambda spec: "content").stages
    for stage in stages:
        assert "path" not in stage.spec
        for places in stage.local.get("data", {}).values():
            assert places == {"path": "/elsewhere", "download": False}
    assert [stage.key for stage in stages] == [
        stage.key for stage in build(toy_pair(data={**data, "path": "/here"}), lambda spec: "content").stages
    ]


def test_the_functions_of_stages_read_nothing_of_a_stage_but_its_spec_and_its_places() -> None:
    read = {
        (module.name, node.attr)
        for module in PACKAGE
        if module.part == "stages"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "stage"
    }
    assert read
    assert {attribute for _, attribute in read} == {"spec", "local", "other_views"}  # views that the same pass may extract


def revisioned() -> dict[str, ModuleType]:
    """Name -> module of all that have a REVISION, plugins included."""
    found = {f"{group} {kind}": plugins.module(group, kind) for group in plugins.GROUPS for kind in plugins.kinds(group)}
    for module in PACKAGE:
        if any(isinstance(node, ast.Name) and node.id == "IDENTITY" for node in ast.walk(module.tree)):
            found[module.name] = import_module(module.name)
    return {name: module for name, module in found.items() if module.__name__ != "ktray.plugins"}


def test_no_two_modules_have_one_identity_name() -> None:
    names = [plugins.identity_name(module) for module in revisioned().values()]
    assert len(names) > 40
    assert len(names) == len(set(names))


def test_an_identity_name_says_nothing_of_where_the_file_lies() -> None:
    for group in plugins.GROUPS:
        for kind in plugins.kinds(group):
            assert plugins.identity_name(plugins.module(group, kind)) == f"{group}.{kind}"
    for name, module in revisioned().items():
        if hasattr(module, "IDENTITY"):
            moved = ModuleType("elsewhere.entirely")
            moved.__dict__.update(IDENTITY=module.IDENTITY, REVISION=module.REVISION)
            assert plugins.revisions(moved).items() <= plugins.revisions(module).items(), name
    outside = ModuleType("my_lab.colour")
    assert plugins.identity_name(outside) == "my_lab.colour"


def example(text: str) -> str:
    """The page with the canonical text and the key of today's code in its example."""
    pair = PairSpec.model_validate(yaml.safe_load(re.findall(r"```yaml\n(.*?)\n```", text, re.DOTALL)[0]))
    stages = build(pair, data_identity()).stages
    stage = next(stage for stage in stages if stage.name == "clusters")
    record = {"key_format": KEY_FORMAT, "stage": stage.name, "revisions": stage.revisions}
    canonical = identity_text({**record, "spec": stage.spec, "inputs": stage.inputs})
    digest = hashlib.sha256(str(canonical).encode()).hexdigest()
    text = re.sub(r"(```json\n).*?(\n```)", lambda m: f"{m.group(1)}{canonical}{m.group(2)}", text)
    text = re.sub(r"(Its sha256 is `)[0-9a-f]{64}`", lambda m: f"{m.group(1)}{digest}`", text)
    assert digest == stage.sha256
    return re.sub(r"(so the key is `clusters-)[0-9a-f]{12}`", lambda m: f"{m.group(1)}{digest[:12]}`", text)


def test_the_example_in_the_docs_is_the_key_that_ktray_computes() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert example(text) == text, "run: python -m tests.test_identity"


def test_the_key_of_an_older_format_is_not_explained() -> None:
    assert identity_text({"stage": "clusters", "revisions": {}, "spec": {}, "inputs": {}}) is None


def test_the_version_is_that_of_the_project() -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{ktray.__version__}"' in project


def test_the_cache_says_which_artifacts_an_earlier_version_made_and_show_prints_what_a_key_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path))
    store = FileStore(tmp_path / "store")
    stage = build(toy_pair(), data_identity()).stages[0]
    made, _ = execute(stage, store, "first", StageContext())
    assert main(["show", stage.key]) == 0
    shown = capsys.readouterr().out
    assert hashlib.sha256(yaml.safe_load(shown)["identity"].encode()).hexdigest() == stage.sha256
    main(["cache", "list"])
    assert "earlier version" not in capsys.readouterr().out
    record = {name: value for name, value in made.record.items() if name != "key_format"}
    (made.directory / "record.json").write_text(json.dumps(record))
    for action in ("list", "verify"):
        assert main(["cache", action]) == 0
        assert "not used any more (they changed in 0.2): 1 artifact;" in capsys.readouterr().out
    main(["show", stage.key])
    assert "not used any more" in capsys.readouterr().out


if __name__ == "__main__":
    DOCS.write_text(example(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
