"""Before anything expensive: a few images through every stage of every branch, and nothing of it under a real key."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from ktray.artifact import Stage
from ktray.cli.source import load_space
from ktray.crew.needs import Needs, Runtime
from ktray.drivers.rehearsal import measured, rehearsal_store, rehearse
from ktray.errors import StageFailed
from ktray.images import open_split, write, write_sample
from ktray.pipeline import graph
from ktray.pipeline.execute import execute
from ktray.pipeline.sample import sample_size, sample_stages
from ktray.pool import LocalPool, Means
from ktray.spec import PairSpec
from ktray.stores.file import FileStore
from tests.searches import Home, toy_space
from tests.toys import ROTATION, toy_pair

SPACES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem == "cifar10_full" else [])
    for path in sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))
]


def identity(spec: object) -> str:
    return "0" * 64


class Here:
    """A crew of this process, for stages that all are published or raise."""

    def __init__(self, store: FileStore, broken: str = "") -> None:
        self.store, self.broken, self.alone = store, broken, threading.Lock()

    def obtain(self, stages: list[Stage], waiter: str, priority: int = 0) -> list[dict[str, object]]:
        for stage in stages:
            if stage.name == self.broken:
                raise StageFailed(stage.key, "OutOfMemoryError: no room")
            with self.alone:  # one computation per key
                execute(stage, self.store, waiter.replace(" ", "-"), Means())
        return []


def pairs() -> dict[str, PairSpec]:
    rotation = {**ROTATION, "schedule": {"epochs": 50, "lr": 0.02, "warmup": 5.0, "batch_size": 32}}
    transfer = {"kind": "clusters", "k": 200, "iterations": 3, "pca": 8, "min_size": 5}
    return {"hog": toy_pair(), "rotation": toy_pair(teacher=rotation, transfer=transfer)}


@pytest.mark.parametrize("path", SPACES)
def test_every_draw_of_a_space_has_a_small_form_and_none_of_its_keys_is_a_real_one(path: Path) -> None:
    space = load_space(path, [])
    for _, params in space.corners():
        pair = space.pair(params)
        real = {stage.key for stage in graph.build(pair, identity).stages}
        small = sample_stages(pair, identity)
        assert [stage.name for stage in small] == [stage.name for stage in graph.build(pair, identity).stages]
        assert not real & {stage.key for stage in small}
        made: set[str] = set()
        for stage in small:
            assert set(stage.inputs.values()) <= made  # of a small pair, all of them
            made.add(stage.key)


def test_a_sample_is_a_part_of_what_is_written_whole(tmp_path: Path) -> None:
    spec = toy_pair().data.target
    write(spec, tmp_path / "whole", LocalPool())
    (tmp_path / "few").mkdir()
    assert write_sample(spec, tmp_path / "few", 20) == {"count": 60.0, "unreadable": 0.0}
    for split in ("train", "val", "test"):
        whole, few = open_split(tmp_path / "whole", split, spec), open_split(tmp_path / "few", split, spec)
        places = [whole.names.index(name) for name in few.names]
        assert len(set(places)) == 20
        assert np.array_equal(few.read(np.arange(20)), whole.read(np.array(places)))
        assert whole.labels is not None
        assert np.array_equal(few.labels, whole.labels[places])


def test_a_rehearsal_runs_every_stage_of_every_draw_leaves_nothing_and_measures(tmp_path: Path) -> None:
    real = FileStore(tmp_path / "store")
    draws = {name: sample_stages(pair, identity) for name, pair in pairs().items()}
    with rehearsal_store(real) as store:
        assert rehearse(Here(store), draws, store, real) == []  # type: ignore[arg-type]
        found, notes = measured(draws, store, Runtime(stages={"student": Needs(memory_bytes=1 << 20)}))
        assert list(real.keys()) == []
    assert set(found) == {"images", "teacher", "features", "clusters", "pseudo_labels", "student", "evaluation"}
    assert all(entry["peak_bytes"] > 1 << 20 for entry in found.values())
    assert len(notes) == 1
    assert notes[0].startswith("student used ")
    assert list(real.root.iterdir()) == []


def test_what_fails_is_said_once_with_the_draw_that_showed_it(tmp_path: Path) -> None:
    real = FileStore(tmp_path / "store")
    draws = {name: sample_stages(pair, identity) for name, pair in pairs().items()}
    with rehearsal_store(real) as store:
        said = rehearse(Here(store, broken="clusters"), draws, store, real)  # type: ignore[arg-type]
    assert len(said) == 1
    assert said[0].endswith("the stage clusters fails: OutOfMemoryError: no room.")
    assert list(real.root.iterdir()) == []


def test_a_sample_is_as_large_as_a_batch_and_as_its_pca_needs() -> None:
    assert sample_size(toy_pair()) == 256
    large = {**ROTATION, "schedule": {"epochs": 2, "lr": 0.02, "batch_size": 1024}}
    assert sample_size(toy_pair(teacher=large)) == 1024
    assert sample_size(toy_pair(transfer={"kind": "clusters", "k": 5, "pca": 300})) == 600


@pytest.mark.slow
def test_plan_preflight_rehearses_on_ray_publishes_nothing_and_the_search_goes_on_from_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    done = home.run("plan", toy_space(tmp_path), "--preflight", "--json")
    assert done.code == 0, done.err
    found = done.answer["preflight"]
    assert found["nodes"] == 1
    assert set(found["stages"]) >= {"images", "teacher", "features", "clusters", "pseudo_labels", "student", "evaluation"}
    assert all(entry["peak_bytes"] > 100 << 20 for entry in found["stages"].values())
    assert 0 < found["pair_bytes"] < found["free_bytes"]
    assert home.artifacts() == {}
    assert list(home.store.iterdir()) == []
    assert json.loads(home.run("plan", toy_space(tmp_path), "--json").out)["stages"][0]["state"] == "run"


@pytest.mark.slow
def test_plan_preflight_refuses_in_one_paragraph_with_exit_4_what_only_the_data_show(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(400):
        (photos / f"{number}.png").write_bytes(b"not an image")
    home = Home(tmp_path / "home")
    space = toy_space(
        tmp_path,
        pair__data={"kind": "folder", "path": str(photos), "size": 28},
        pair__evals=[{"kind": "effective_rank"}],
        objectives=[{"metric": "effective_rank/rank", "mode": "max"}],
        early_stop=None,
    )
    done = home.run("plan", space, "--preflight")
    assert done.code == 4, done.err
    assert "the stage images fails: ValueError: of 256 images of the train split none can be read" in done.err
    assert len([line for line in done.err.splitlines() if "fails" in line]) == 1
    assert "Traceback" not in done.err
    assert list(home.store.iterdir()) == []
