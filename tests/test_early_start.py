"""Ray that starts before its command has read everything: when it may, and what signals do meanwhile."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ktray.runs.early_start import early_start, surely_computes
from ktray.runs.interruption import Interruption
from ktray.runs.settings import make_settings
from ktray.scheduler.ray_session import signal_actions_kept
from ktray.stores.locks import lock_home

SPACE = "study: digits\nbudget: {trials: 2}\npair: {data: nonsense}\n"


@pytest.mark.parametrize(
    ("text", "overrides", "trials", "evaluations", "expected"),
    [
        (SPACE, [], None, 0, True),
        (SPACE, [], None, 1, True),
        (SPACE, [], None, 2, False),
        (SPACE, ["budget.trials=9"], None, 2, True),
        (SPACE, [], "9", 2, True),
        (SPACE, ["study=other"], None, 0, True),
        (SPACE, ["study=known"], None, 0, False),
        ("study: known\n", [], None, 0, False),
        ("pair: {}\n", [], None, 0, False),
        ("[1, 2]\n", [], None, 0, False),
        ("study: [\n", [], None, 0, False),
        ("study: digits\nbudget: 7\n", [], "+50", 0, True),
    ],
)
def test_ray_starts_early_for_a_new_study_with_more_trials_than_the_store_has_evaluations(
    text: str, overrides: list[str], trials: str | None, evaluations: int, expected: bool, tmp_path: Path
) -> None:
    settings = make_settings(tmp_path / "home")
    (settings.home / "studies" / "known").mkdir(parents=True)
    for number in range(evaluations):
        folder = settings.open_store().root / f"evaluation-{number:012x}"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text("{}")
    space = tmp_path / "space.yaml"
    space.write_text(text)
    assert surely_computes(space, overrides, None, trials, settings) is expected


def test_what_is_no_file_is_not_read_twice(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert not surely_computes(tmp_path / "pipe", [], "digits", "3", make_settings(tmp_path / "home"))
    assert not surely_computes(tmp_path / "absent.yaml", [], "digits", "3", make_settings(tmp_path / "home"))


def test_nothing_starts_in_a_python_session_nor_on_two_cpus_nor_in_a_home_that_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    with early_start(make_settings(tmp_path / "small"), Interruption(lambda: None), is_wanted=True) as early:
        assert early is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    settings = make_settings(tmp_path / "home")
    with early_start(settings, Interruption(), is_wanted=True) as early:
        assert early is None
    with lock_home(settings.home), early_start(settings, Interruption(lambda: None), is_wanted=True) as early:
        assert early is None


def test_a_worker_that_decodes_images_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from ktray.pipeline import execute, record, worker_entry; from ktray import images; "
        "from ktray.datasets import cifar10, imagefolder; from ktray.stages import work_of; "
        "work_of('images'); record.software(); print('torch' in sys.modules); "
        "work_of('features'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_images_are_decoded_while_the_same_process_still_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from ktray.artifact import Stage; from ktray.pipeline import worker_entry; "
        "from ktray.pool import StageContext; from ktray.stores import open_store; "
        "spec = {'kind': 'synthetic', 'count': 60, 'size': 28, 'content': ''}; "
        "local = {'data': {'images': {}}, 'max_unreadable': 0.01}; "
        "stage = Stage('images', spec, {}, local=local); "
        "worker_entry.prepare('cpu'); store = open_store('file://' + sys.argv[1]); "
        "print(worker_entry.run_stage(stage, store, 'first', StageContext())[0].metrics['count'])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert float(done.stdout) >= 60, done.stderr  # the test split is in addition to these


def test_signals_keep_their_handlers_whatever_c_code_does_in_another_thread() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))

    def meddle() -> None:
        with signal_actions_kept():
            ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(1))  # SIG_IGN, below Python

    try:
        thread = threading.Thread(target=meddle)
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
