"""Starts, kills and inspects real `ktray search` processes, each with its own home."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import yaml

from ktray.search.history import StudySnapshot, read_study
from tests.toys import DATA, HOG, ROTATION

TIMEOUT_SECONDS = 150.0
USER_VARIABLES = ("KTRAY_HOME", "MLFLOW_TRACKING_URI", "PYTHONWARNINGS")
# Four trials that begin at once and need one teacher first, then a teacher that needs no training.
SPACE: dict[str, Any] = {
    "study": "toy",
    "objectives": [{"metric": "knn/top1", "mode": "max"}],
    "budget": {"trials": 6, "concurrent": 4},
    "early_stop": {"metric": "knn/top1", "rungs": [1, 2, 4], "reduction": 2},
    "pair": {
        "data": {**DATA, "count": 300},
        "teacher": {"one_of": {"hog": HOG, "rotation": {**ROTATION, "layer": {"choice": ["conv3", "conv5"]}}}},
        "transfer": {"kind": "clusters", "k": {"choice": [5, 10]}, "iterations": 5},
        "student": {
            "backbone": {"kind": "alexnet", "width": 0.125},
            "schedule": {"epochs": 4, "lr": {"choice": [0.01, 0.02, 0.05]}, "batch_size": 32},
        },
        "evals": [{"kind": "knn"}],
    },
    "start_with": [
        {"teacher": "rotation", "teacher.rotation.layer": "conv3", "transfer.k": 5},
        {"teacher": "rotation", "teacher.rotation.layer": "conv3", "transfer.k": 10},
        {"teacher": "rotation", "teacher.rotation.layer": "conv5", "transfer.k": 5},
        {"teacher": "rotation", "teacher.rotation.layer": "conv5", "transfer.k": 10},
        {"teacher": "hog", "transfer.k": 5},
    ],
}


def toy_space(folder: Path, **changes: Any) -> Path:
    """The space as a file; a change is named by its dotted path with ``__`` for the dots."""
    content = copy.deepcopy(SPACE)
    for name, value in changes.items():
        *places, last = name.split("__")
        entry = content
        for place in places:
            entry = entry[place]
        entry[last] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['study']}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def until(condition: Callable[[], Any], seconds: float = TIMEOUT_SECONDS) -> Any:
    """What `condition` returns once that is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"it did not happen in {seconds:g} s"
        time.sleep(0.05)
    return found


@dataclass(frozen=True)
class CommandResult:
    """A command that has ended."""

    code: int
    out: str
    err: str
    seconds: float

    @cached_property
    def answer(self) -> Any:
        """What --json printed; nothing else may be on stdout."""
        return json.loads(self.out)


@dataclass
class Running:
    """A command that runs in a session of its own, as if typed in a terminal; what it starts belongs to that session."""

    process: subprocess.Popen[bytes]
    files: tuple[Path, Path]
    began: float = field(default_factory=time.monotonic)

    @property
    def err(self) -> str:
        return self.files[1].read_text()

    def processes(self) -> dict[int, str]:
        """Process id -> command line of all that it started and that lives."""
        found = {}
        for pid in psutil.pids():
            with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                if os.getsid(pid) == self.process.pid and pid != self.process.pid:
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found[pid] = " ".join(process.cmdline())
        return found

    def actors(self, title: str) -> list[int]:
        """Process ids of its Ray actors whose title begins with this, such as ``Worker``."""
        return [pid for pid, line in self.processes().items() if line.startswith(f"ray::{title}")]

    def until(self, condition: Callable[[], Any]) -> Any:
        """Wait for something that happens while it runs."""

        def check() -> Any:
            found = condition()
            assert found or self.process.poll() is None, f"it ended before: {self.err}"
            return found

        return until(check)

    def signal(self, number: int) -> CommandResult:
        """Send SIGINT to its process group, as Ctrl-C does, or another signal to it alone; `seconds` counts from the signal."""
        began = time.monotonic()
        (os.killpg if number == signal.SIGINT else os.kill)(self.process.pid, number)
        return self._result(began)

    def kill(self) -> None:
        """kill -9 the command alone; what it started must end."""
        self.process.kill()
        self.process.wait()
        until(lambda: not self.processes(), 15)

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> CommandResult:
        return self._result(self.began, timeout)

    def _result(self, began: float, timeout: float = TIMEOUT_SECONDS) -> CommandResult:
        code = self.process.wait(timeout)
        seconds = time.monotonic() - began
        out, err = (path.read_text() for path in self.files)
        return CommandResult(code, out, err, seconds)

    def clean(self) -> None:
        """Kill the command and everything that it started."""
        for pid in [self.process.pid, *self.processes()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _reset_sigint() -> None:
    """A test run in a script's background ignores SIGINT, and so would the processes that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Home:
    """A ktray home, and the commands that use it."""

    path: Path

    @contextmanager
    def start(
        self, *arguments: object, cwd: Path | None = None, clean: bool = True, files: Path | None = None
    ) -> Iterator[Running]:
        """Run `ktray` with these arguments and this home; without `clean`, what it started must end by itself.

        Args:
            files: folder for what it writes; that of the home by default.
        """
        place = files or self.path.parent
        place.mkdir(parents=True, exist_ok=True)
        number = len(list(place.glob("*.err")))
        outputs = (place / f"{number}.out", place / f"{number}.err")
        environment = {name: value for name, value in os.environ.items() if name not in USER_VARIABLES}
        with open(outputs[0], "wb") as out, open(outputs[1], "wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "ktray", *map(str, arguments), "--home", str(self.path)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env=environment,
                start_new_session=True,
                preexec_fn=_reset_sigint,
            )
        running = Running(process, outputs)
        try:
            yield running
        finally:
            if clean or process.poll() is None:
                running.clean()

    def run(self, *arguments: object, timeout: float = TIMEOUT_SECONDS, files: Path | None = None) -> CommandResult:
        with self.start(*arguments, files=files) as running:
            return running.wait(timeout)

    @property
    def store(self) -> Path:
        return self.path / "store"

    def artifacts(self) -> dict[str, int]:
        """Key -> when its record was written, in nanoseconds: another number means that it was computed again."""
        return {path.parent.name: path.stat().st_mtime_ns for path in self.store.glob("*/record.json")}

    def record(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.store / key / "record.json").read_text())
        return found

    def keys(self, stage: str) -> list[str]:
        """Keys of the artifacts of one stage."""
        return sorted(key for key in self.artifacts() if key.startswith(f"{stage}-"))

    def study(self, name: str = "toy") -> StudySnapshot:
        return read_study(self.path, name)

    def states(self, name: str = "toy") -> list[str]:
        """States of all trials; empty before the first."""
        try:
            return [trial.state for trial in self.study(name).trials]
        except Exception:  # noqa: BLE001 - a journal that is just being begun: of no interest here
            return []

    def experiment(self, name: str = "toy") -> Any:
        """The study's experiment in MLflow."""
        return self._mlflow().get_experiment_by_name(name)

    def runs(self, name: str = "toy") -> list[Any]:
        """The study's runs in MLflow."""
        found: list[Any] = self._mlflow().search_runs([self.experiment(name).experiment_id], max_results=1000)
        return found

    def _mlflow(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(f"sqlite:///{self.path / 'mlflow.db'}")
