"""An attempt that was frozen, fenced and wakes up can neither write nor publish, at any point of its work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from ktray.artifact import Stage
from ktray.pipeline import pair_graph
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pool import StageContext
from ktray.stores.file import FileStore
from tests.toys import ROTATION, toy_pair

# A process that stops itself at exactly one place of one attempt.
TOY = """
import os, signal, sys
from pathlib import Path
from ktray.pool import StageContext
from ktray.stores.file import FileStore
from toy_work import toy, work
where, store = sys.argv[1], FileStore(Path(sys.argv[2]))

def stopping(function, place):
    def stopped(*arguments, **named):
        if where == place:
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*arguments, **named)
    return stopped

store.scratch = stopping(store.scratch, "before it has a directory")
store.publish = stopping(store.publish, "before it publishes")
rename = Path.rename
def renaming(self, target):
    if where == "before the last rename" and self.parent.name == ".scratch":
        os.kill(os.getpid(), signal.SIGSTOP)
    return rename(self, target)
Path.rename = renaming
work(toy("slow", {"steps": 2, "sleep": 0.01, "test": "fenced"}), store, "late", StageContext())
"""
REAL = """
import sys
from pathlib import Path
from ktray.pipeline.execute import execute
from ktray.pool import StageContext
from ktray.stores.file import FileStore
from tests.test_fenced import teacher_stage
store = FileStore(Path(sys.argv[1]))
execute(teacher_stage(store.root.parent), store, "late", StageContext(checkpoint_seconds=0.2))
"""


def teacher_stage(folder: Path) -> Stage:
    """A training of some seconds; its images are computed where `folder` lacks them."""
    teacher = {**ROTATION, "schedule": {"epochs": 30, "lr": 0.02, "batch_size": 32}}
    stages = pair_graph.build(toy_pair(teacher=teacher), data_identity(folder / "cache")).stages
    store = FileStore(folder / "store")
    for stage in stages:
        if stage.name == "images":
            execute(stage, store, "images", StageContext())
    return next(stage for stage in stages if stage.name == "teacher")


@contextmanager
def frozen(script: str, *arguments: object, when: Callable[[], Any] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that has stopped itself, or is stopped by us once `when` is true."""
    root = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root.parent), str(root)])}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        end = time.monotonic() + 120
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()[1]
            if when and when():
                process.send_signal(signal.SIGSTOP)
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


def revive(process: subprocess.Popen[str]) -> str:
    """What it says when it fails."""
    process.send_signal(signal.SIGCONT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1, error
    return error


def contents(store: FileStore) -> dict[str, tuple[int, int]]:
    """Path -> (size, modification time in ns) of all that is published."""
    files = (path for path in store.root.rglob("*") if path.is_file() and "/." not in str(path))
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


PLACES = ["before it has a directory", "before it publishes", "before the last rename"]


@pytest.mark.parametrize("place", PLACES)
def test_a_fenced_attempt_publishes_nothing_even_if_no_other_attempt_has(place: str, tmp_path: Path) -> None:
    from toy_work import toy

    store, key = FileStore(tmp_path / "store"), toy("slow", {"steps": 2, "sleep": 0.01, "test": "fenced"}).key
    with frozen(TOY, place, store.root) as process:
        store.fence(key, "late")
        assert "FileNotFoundError" in revive(process)
    assert store.find(key) is None
    assert list(store.keys()) == []
    assert not list((store.root / ".scratch").iterdir())


@pytest.mark.parametrize("place", PLACES)
def test_a_fenced_attempt_changes_nothing_of_what_its_successor_has_published(place: str, tmp_path: Path) -> None:
    from toy_work import toy, work

    store, stage = FileStore(tmp_path / "store"), toy("slow", {"steps": 2, "sleep": 0.01, "test": "fenced"})
    with frozen(TOY, place, store.root) as process:
        store.fence(stage.key, "late")
        assert work(stage, store, "second", StageContext())[1]
        before = contents(store)
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
    assert contents(store) == before
    assert [list((store.root / place).iterdir()) for place in (".scratch", ".fenced")] == [[], []]


@pytest.mark.parametrize("place", PLACES)
def test_an_attempt_that_is_fenced_after_its_successor_has_published_leaves_nothing(place: str, tmp_path: Path) -> None:
    from toy_work import toy, work

    store, stage = FileStore(tmp_path / "store"), toy("slow", {"steps": 2, "sleep": 0.01, "test": "fenced"})
    with frozen(TOY, place, store.root) as process:
        assert work(stage, store, "second", StageContext())[1]
        before = contents(store)
        store.fence(stage.key, "late")
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
    assert contents(store) == before
    assert [list((store.root / place).iterdir()) for place in (".scratch", ".fenced")] == [[], []]


def test_fencing_removes_what_a_worker_left_when_it_died_right_after_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toy_work import toy, work

    store, stage = FileStore(tmp_path / "store"), toy("slow", {"steps": 2, "sleep": 0.01, "test": "fenced"})
    (store.scratch(stage.key, "earlier") / "checkpoint-1").mkdir()
    store.fence(stage.key, "earlier")

    def dies(key: str) -> None:
        raise InterruptedError(key)

    with monkeypatch.context() as last_moment:
        last_moment.setattr(store, "_remove_attempts", dies)
        with pytest.raises(InterruptedError):
            work(stage, store, "second", StageContext())
    assert list((store.root / ".fenced").iterdir())
    store.fence(stage.key, "second")
    assert store.find(stage.key) is not None
    assert [list((store.root / place).iterdir()) for place in (".scratch", ".fenced")] == [[], []]


@pytest.mark.slow
def test_a_training_that_is_frozen_and_fenced_is_continued_by_another_and_dies_when_it_wakes(tmp_path: Path) -> None:
    store, stage = FileStore(tmp_path / "store"), teacher_stage(tmp_path)
    scratch = store.root / ".scratch" / f"{stage.key}.late"
    with frozen(REAL, store.root, when=lambda: list(scratch.glob("checkpoint-0*"))) as process:
        assert store.fence(stage.key, "late")
        artifact, published = execute(stage, store, "second", StageContext())
        before = contents(store)
        assert published
        assert "FileNotFoundError" in revive(process)
    assert artifact.record["started_from"].startswith("checkpoint-")
    assert contents(store) == before
    assert store.verify(stage.key) == ""
    assert [list((store.root / place).iterdir()) for place in (".scratch", ".fenced")] == [[], []]
