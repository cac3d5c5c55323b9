"""What a dry run says of the whole: seconds and bytes grow with images, epochs and clusters, and with what is not shared."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ktray.artifact import Artifact, Stage
from ktray.cli.plan_command import _dry_run_text
from ktray.cost_model.dry_run_forecast import Forecast, FullSizeStages, forecast
from ktray.pipeline import pair_graph
from ktray.runs.dry_run import _result, dry_run_stages
from ktray.runs.plan import stages_and_estimate
from ktray.stores.file import FileStore
from tests.toys import ROTATION, STUDENT, toy_pair

TRAIN, ALL = 25_600, 76_800  # a hundred times what is run in small
PAIR = toy_pair(
    teacher={**ROTATION, "schedule": {"epochs": 50, "batch_size": 32}},
    transfer={"kind": "clusters", "k": 640, "iterations": 20},
    student=STUDENT,
)


def identity(spec: object) -> str:
    return "0" * 64


def publish(store: FileStore, stage: Stage, **record: Any) -> None:
    """An artifact of 1,000 numbers that took a second, with whatever else its record shall say."""
    scratch = store.scratch(stage.key, "a1")
    np.save(scratch / ("centroids.npy" if stage.name == "clusters" else "made.npy"), np.zeros(1000))
    (scratch / "sheet.png").write_bytes(b"0" * 100)
    peaks = {"peak_bytes": 1, "device_peak_bytes": 0, "device_bytes": 0}
    metrics = {"count": 768.0, "iterations": 2.0}
    known = {"stage": stage.name, "spec": dict(stage.spec), "inputs": dict(stage.inputs), "metrics": metrics, "seconds": 1.0}
    store.publish(scratch, stage.key, {"attempt": "a1", **known, **peaks, **record})


def dry_run(folder: Path, expected: dict[str, float]) -> tuple[Forecast, FileStore, Any]:
    """The forecast from a dry run in which every stage took a second; the real store; and how to ask again."""
    store, real = FileStore(folder / "small"), FileStore(folder / "real")
    small, full = dry_run_stages(PAIR, identity), list(pair_graph.build(PAIR, identity).stages)
    for stage in small:
        publish(store, stage)
    wanted = FullSizeStages({"pair": full}, {stage.key: (TRAIN, ALL) for stage in full if stage.name == "images"}, expected)
    again = lambda: forecast({"pair": small}, wanted, store, real)  # noqa: E731
    return again(), real, again


def test_each_stage_grows_with_its_images_epochs_and_clusters(tmp_path: Path) -> None:
    found, _, _ = dry_run(tmp_path, {})
    seconds = {name: row["whole_seconds"] for name, row in found.stages.items()}
    assert seconds == pytest.approx(
        {
            "images": 100,
            "teacher": 100 * 50,
            "features": 100,
            "clusters": 100 * 10 * 10,  # ten times the k and, as the few images converged at once, the iterations
            "pseudo_labels": 100 * 10,
            "student": 100 * STUDENT["schedule"]["epochs"],
            "evaluation": 100,
        }
    )
    size = {name: row["whole_bytes"] for name, row in found.stages.items()}
    assert size["images"] == size["features"] == size["pseudo_labels"] == 100 * 8128 + 100
    assert size["clusters"] == 10 * 8128 + 100
    assert size["teacher"] == size["student"] == 8228
    assert found.seconds == pytest.approx(sum(seconds.values()))
    assert found.bytes == found.pair_bytes == sum(size.values())


def test_what_draws_share_counts_as_often_as_it_is_expected(tmp_path: Path) -> None:
    one, _, _ = dry_run(tmp_path / "one", {})
    expected = {name: 1.0 for name in one.stages} | {"teacher": 4.0, "student": 40.0}
    many, _, _ = dry_run(tmp_path / "many", expected)
    assert many.seconds == pytest.approx(one.seconds + 3 * 5000 + 39 * 300)
    assert many.bytes == one.bytes + 42 * 8228
    assert many.pair_bytes == one.pair_bytes


def test_records_of_the_store_replace_what_was_scaled_and_what_is_there_takes_nothing(tmp_path: Path) -> None:
    before, real, again = dry_run(tmp_path, {})
    full = {stage.name: stage for stage in pair_graph.build(PAIR, identity).stages}
    publish(real, full["images"])
    other = Stage("teacher", {**full["teacher"].spec, "seed": 7}, {}, full["teacher"].inputs)
    publish(real, other, seconds=7.0, seconds_alone=7.0)
    found = again()
    assert found.stages["images"]["whole_seconds"] == found.stages["images"]["whole_bytes"] == 0
    assert found.stages["teacher"]["whole_seconds"] == pytest.approx(7.0, rel=0.01)
    assert found.stages["student"] == before.stages["student"]
    assert found.pair_bytes == before.pair_bytes


class Counting(FileStore):
    """A store that counts how often each artifact is looked at."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.looked: Counter[str] = Counter()

    def find(self, key: str) -> Artifact | None:
        self.looked[key] += 1
        return super().find(key)


def test_of_a_large_store_only_as_many_records_are_read_as_are_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, real, _ = dry_run(tmp_path, {})
    full = {stage.name: stage for stage in pair_graph.build(PAIR, identity).stages}
    for seed in range(100, 108):
        publish(real, Stage("teacher", {**full["teacher"].spec, "seed": seed}, {}, full["teacher"].inputs))
    monkeypatch.setattr("ktray.cost_model.stage_costs.MOST_RECORDS", 3)
    store = Counting(real.root)
    forecast({}, FullSizeStages({}, {}, {}), FileStore(tmp_path / "small"), store)
    assert store.looked.total() == 3
    planned = stages_and_estimate([], SimpleNamespace(open_store=lambda: store))  # type: ignore[arg-type]
    assert planned["estimate"]["bytes"] == 0
    assert store.looked.total() == 6


def entry(**changes: Any) -> dict[str, Any]:
    return {"runs": 2, "seconds": 1.5, "peak_bytes": 1 << 30, "device_peak_bytes": 0, "device_bytes": 0, **changes}


def test_hours_and_disk_are_reported_and_a_disk_that_is_too_small_for_all_of_it(tmp_path: Path) -> None:
    coming = dry_run(tmp_path, {"student": 40.0})[0]
    stages = {name: entry(**({"device_peak_bytes": 5 << 30} if name == "teacher" else {})) for name in coming.stages}
    found = _result(2, stages, coming, coming.bytes - 1, ["a note"])
    assert (found.seconds, found.bytes) == (coming.seconds, coming.bytes)
    assert found.notes[0] == "a note"
    assert found.notes[1].startswith("all of it would take roughly 0.0 GB of disk, and 0.0 GB are free; make room")
    assert _result(2, stages, coming, coming.bytes, []).notes == []
    lines = _dry_run_text(vars(found))
    assert "All of it takes roughly 7.9 h of work" in lines[-1]
    assert "0.0 GB of disk: scaled from one batch" in lines[-1]
    teacher, student = (
        next(line for line in lines[1].splitlines() if line.startswith(name)) for name in ("teacher", "student")
    )
    assert teacher.split() == ["teacher", "2", "1.50", "1024", "5120", "1", "83", "min", "0.0"]
    assert student.split() == ["student", "2", "1.50", "1024", "40", "5", "min", "0.0"]
