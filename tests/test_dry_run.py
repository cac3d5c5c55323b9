"""Before anything expensive: a few images through every stage of every branch, and nothing of it under a real key."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ktray.artifact import Stage
from ktray.cost_model.dry_run_forecast import FullSizeStages
from ktray.errors import StageFailed
from ktray.images import open_split, write, write_sample
from ktray.pipeline import pair_graph
from ktray.pipeline.execute import execute
from ktray.pool import LocalPool, StageContext
from ktray.runs.dry_run import dry_run, dry_run_on, dry_run_stages, dry_run_store, measured, sample_size
from ktray.runs.interruption import Interruption
from ktray.runs.spec_files import load_space
from ktray.scheduler.client import WaitCancelled
from ktray.scheduler.resources import ResourceRequest, RuntimeSettings
from ktray.spec import PairSpec
from ktray.stores.file import FileStore
from tests.searches import Home, toy_space
from tests.test_dry_run_forecast import publish
from tests.toys import HOG, ROTATION, STUDENT, toy_pair

SPACES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem == "cifar10_full" else [])
    for path in sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))
]


def identity(spec: object) -> str:
    return "0" * 64


class Here:
    """A scheduler of this process, for stages that all are published or raise."""

    def __init__(self, store: FileStore, broken: str = "") -> None:
        self.store, self.broken, self.alone = store, broken, threading.Lock()

    def obtain(self, stages: list[Stage], waiter: str, priority: int = 0) -> list[dict[str, object]]:
        for stage in stages:
            if stage.name == self.broken:
                raise StageFailed(stage.key, "OutOfMemoryError: no room")
            with self.alone:  # one computation per key
                execute(stage, self.store, waiter.replace(" ", "-"), StageContext())
        return []

    def cancel_requests(self, waiter: str) -> None:
        """Nothing here waits for anybody else."""


class Standing:
    """A scheduler whose stages never end, until who waits for them is released."""

    def __init__(self) -> None:
        self.waits: dict[str, threading.Event] = defaultdict(threading.Event)

    def obtain(self, stages: list[Stage], waiter: str, priority: int = 0) -> list[dict[str, object]]:
        assert self.waits[waiter].wait(20)
        raise WaitCancelled(waiter)

    def cancel_requests(self, waiter: str) -> None:
        self.waits[waiter].set()


def pairs() -> dict[str, PairSpec]:
    rotation = {**ROTATION, "schedule": {"epochs": 50, "lr": 0.02, "warmup": 5.0, "batch_size": 32}}
    transfer = {"kind": "clusters", "k": 200, "iterations": 3, "pca": 8, "min_size": 5}
    return {"hog": toy_pair(), "rotation": toy_pair(teacher=rotation, transfer=transfer)}


@pytest.mark.parametrize("path", SPACES)
def test_every_draw_of_a_space_has_a_small_form_and_none_of_its_keys_is_a_real_one(path: Path) -> None:
    space = load_space(path, [])
    for _, params in space.boundary_draws():
        pair = space.pair(params)
        real = {stage.key for stage in pair_graph.build(pair, identity).stages}
        small = dry_run_stages(pair, identity)
        assert [stage.name for stage in small] == [stage.name for stage in pair_graph.build(pair, identity).stages]
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


def test_a_dry_run_runs_every_stage_of_every_draw_leaves_nothing_and_measures(tmp_path: Path) -> None:
    real = FileStore(tmp_path / "store")
    draws = {name: dry_run_stages(pair, identity) for name, pair in pairs().items()}
    with dry_run_store(real) as store:
        assert dry_run(Here(store), draws, store, real) == []
        found, notes = measured(draws, store, RuntimeSettings(stages={"student": ResourceRequest(memory_bytes=1 << 20)}))
        assert list(real.keys()) == []
    assert set(found) == {"images", "teacher", "features", "clusters", "pseudo_labels", "student", "evaluation"}
    assert all(entry["peak_bytes"] > 1 << 20 for entry in found.values())
    assert len(notes) == 1
    assert notes[0].startswith("student used ")
    assert list(real.root.iterdir()) == []


def test_what_fails_is_said_once_with_the_draw_that_showed_it(tmp_path: Path) -> None:
    real = FileStore(tmp_path / "store")
    draws = {name: dry_run_stages(pair, identity) for name, pair in pairs().items()}
    with dry_run_store(real) as store:
        said = dry_run(Here(store, broken="clusters"), draws, store, real)
    assert len(said) == 1
    assert said[0].endswith("the stage clusters fails: OutOfMemoryError: no room.")
    assert list(real.root.iterdir()) == []


def test_a_dry_run_that_is_interrupted_while_it_waits_ends_at_once_with_every_wait(tmp_path: Path) -> None:
    real, scheduler, interruption = FileStore(tmp_path / "store"), Standing(), Interruption()
    interruption.needs_cleanup = True
    draws = {name: dry_run_stages(pair, identity) for name, pair in pairs().items()}
    threading.Timer(0.3, interruption.request).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), dry_run_store(real) as store:
        dry_run(scheduler, draws, store, real, interruption)
    assert time.monotonic() - began < 2.5
    assert [waiter for waiter, wait in scheduler.waits.items() if not wait.is_set()] == []
    assert list(real.root.iterdir()) == []


def test_the_scheduler_of_an_interrupted_dry_run_ends_before_its_store_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, interruption, ended = FileStore(tmp_path / "store"), Interruption(), []

    def connect(session: SimpleNamespace, url: str, stage_function: object) -> Standing:
        session.on_stop.append(FileStore(Path(url.removeprefix("file://"))))
        threading.Timer(0.1, interruption.request).start()
        return Standing()

    def stop(session: SimpleNamespace) -> None:
        for store in session.on_stop:  # a stage that runs to the end of its scheduler may fail, which the broker writes down
            store.record_failure("images-1", {"cause": "FileNotFoundError: its folder"})
        ended.append(session)

    monkeypatch.setattr("ktray.scheduler.ray_session.start", lambda *given: SimpleNamespace(warnings=[], on_stop=[]))
    monkeypatch.setattr("ktray.scheduler.ray_session.stop", stop)
    monkeypatch.setattr("ktray.scheduler.client.connect", connect)
    monkeypatch.setattr("ktray.runs.dry_run.preflight", lambda *given: None)
    monkeypatch.setattr("ray.nodes", list)
    draws = {name: dry_run_stages(pair, identity) for name, pair in pairs().items()}
    with pytest.raises(KeyboardInterrupt):
        dry_run_on(tmp_path, real, None, RuntimeSettings(), draws, FullSizeStages({}, {}, {}), lambda text: None, interruption)
    assert len(ended) == 1
    assert list(real.root.iterdir()) == []


def test_a_dry_run_removes_what_a_dead_one_left_and_nothing_of_one_that_runs(tmp_path: Path) -> None:
    real = FileStore(tmp_path / "store")
    dead = real.root / ".dry-run-dead"
    (dead / "images-1").mkdir(parents=True)
    with dry_run_store(real) as one:
        assert not dead.exists()
        with dry_run_store(real) as other:
            assert one.root.is_dir()
            assert other.root != one.root
        assert one.root.is_dir()
    assert list(real.root.iterdir()) == []


def recorded(tmp_path: Path, **record: object) -> tuple[dict[str, list[Stage]], FileStore]:
    """One dry-run stage with this record."""
    (stage,) = [each for each in dry_run_stages(pairs()["rotation"], identity) if each.name == "teacher"]
    store = FileStore(tmp_path / "store")
    publish(store, stage, **record)
    return {"rotation": [stage]}, store


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0.0, "and gets a share of 0.25 at first; set stages.teacher.gpus: 0.5"),
        (0.25, "which takes a share of 0.5, and stages.teacher.gpus gives it 0.25"),
        (0.5, None),
        (1.0, None),
    ],
)
def test_gpu_memory_beyond_a_stage_s_share_of_the_card_is_named(tmp_path: Path, given: float, said: str | None) -> None:
    draws, store = recorded(tmp_path, peak_bytes=3 << 30, device_peak_bytes=30 << 30, device_bytes=80 << 30)
    found, notes = measured(draws, store, RuntimeSettings(stages={"teacher": ResourceRequest(gpus=given)} if given else {}))
    assert found["teacher"]["device_peak_bytes"] == 30 << 30
    assert found["teacher"]["peak_bytes"] == 3 << 30
    assert [note.startswith("teacher used 30.0 of the 80.0 GiB of its GPU, ") for note in notes] == [True] * bool(said)
    assert said is None or notes[0].endswith(said)


def test_host_memory_beyond_what_is_reserved_is_named_of_a_stage_on_a_gpu_too(tmp_path: Path) -> None:
    draws, store = recorded(tmp_path, peak_bytes=3 << 30, device_peak_bytes=1 << 30, device_bytes=80 << 30)
    _, notes = measured(draws, store, RuntimeSettings(stages={"teacher": ResourceRequest(gpus=0.5, memory_bytes=1 << 30)}))
    assert notes == ["teacher used 3.0 GiB on a few images, and stages.teacher.memory_bytes reserves 1.0"]


@pytest.mark.parametrize(
    "changes",
    [
        {"transfer": {"kind": "clusters", "k": [1000, 500, 63], "iterations": 3}},
        {"transfer": {"kind": "soft_clusters", "k": 500, "neighbours": 100}},
        {"transfer": {"kind": "similarity", "anchors": 4096}},
        {"teacher": {"pair": {"teacher": HOG, "transfer": {"kind": "clusters", "k": 1000}, "student": STUDENT}}},
    ],
    ids=["several-k", "neighbours", "anchors", "chain"],
)
def test_a_sample_has_images_for_whatever_a_pair_asks_of_them(tmp_path: Path, changes: dict[str, object]) -> None:
    pair, real = toy_pair(**changes), FileStore(tmp_path / "store")
    small = dry_run_stages(pair, identity)
    assert [stage.name for stage in small] == [stage.name for stage in pair_graph.build(pair, identity).stages]
    assert {stage.spec["epoch"] for stage in small if stage.name == "student"} == {1}
    with dry_run_store(real) as store:
        assert dry_run(Here(store), {"pair": small}, store, real) == []


def test_a_sample_is_as_large_as_a_batch_and_as_its_pca_needs() -> None:
    assert sample_size(toy_pair()) == 256
    large = {**ROTATION, "schedule": {"epochs": 2, "lr": 0.02, "batch_size": 1024}}
    assert sample_size(toy_pair(teacher=large)) == 1024
    assert sample_size(toy_pair(transfer={"kind": "clusters", "k": 5, "pca": 300})) == 600


@pytest.mark.slow
def test_plan_preflight_runs_in_small_on_ray_publishes_nothing_and_the_search_goes_on_from_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    done = home.run("plan", toy_space(tmp_path), "--preflight", "--json")
    assert done.code == 0, done.err
    found = done.answer["preflight"]
    assert found["nodes"] == 1
    assert set(found["stages"]) >= {"images", "teacher", "features", "clusters", "pseudo_labels", "student", "evaluation"}
    assert all(entry["peak_bytes"] > 100 << 20 for entry in found["stages"].values())
    assert 0 < found["pair_bytes"] < found["bytes"] < found["free_bytes"]
    assert found["seconds"] == pytest.approx(sum(e["expected"] * e["whole_seconds"] for e in found["stages"].values()), abs=0.1)
    assert found["seconds"] > found["stages"]["student"]["seconds"]
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
    assert "the stage images fails: none of 256 images of the train split can be read" in done.err
    assert len([line for line in done.err.splitlines() if "fails" in line]) == 1
    assert "Traceback" not in done.err
    assert list(home.store.iterdir()) == []
