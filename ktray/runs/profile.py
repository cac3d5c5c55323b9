"""The profile of a search or run (`--profile`): its phases, what each worker did when, how busy CPUs and GPUs were.

Traces of single stages come from `pipeline/stage_trace.py`; this is the view from the driver. GPUs and CPUs are those of the
driver's machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ktray.errors import UserError
from ktray.runs.settings import Settings
from ktray.scheduler.messages import PUBLISHED, STARTED, StageFunction

SAMPLE_SECONDS = 0.25
FOUND = "found"  # the event of a stage that a local scheduler did not have to run
_QUERY = "--query-gpu=index,utilization.gpu,memory.used"


class Profile:
    """Collects what happens; `write` makes files of it.

    Args:
        folder: new; for the timeline and the traces.
        title: such as the command.
        began: when the command was given, in seconds since 1970.
        with_traces: whether stages are traced, too, which makes some of them slower.
    """

    def __init__(self, folder: Path, title: str, began: float, with_traces: bool) -> None:
        self.folder, self.title, self.began, self.with_traces = folder, title, began, with_traces
        self._phases: list[tuple[str, float]] = [("command", began)]
        self._workers: dict[str, dict[str, Any]] = {}
        self._running: dict[str, tuple[str, float]] = {}
        self._stages: list[dict[str, Any]] = []
        self._gpus: dict[int, list[tuple[float, float, float]]] = {}
        self._cpu: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._smi: subprocess.Popen[str] | None = None
        for target in (self._sample_cpus, self._sample_gpus):
            threading.Thread(target=target, daemon=True).start()

    def stage_function(self) -> StageFunction:
        """What workers run, with or without traces."""
        from ktray.pipeline import stage_trace, worker_entry

        traced = partial(stage_trace.run_traced_stage, folder=str(self.folder))
        return traced if self.with_traces else worker_entry.run_stage

    def mark(self, phase: str) -> None:
        """A phase ends now."""
        self._phases.append((phase, time.time()))

    def observe(self, events: Iterable[Mapping[str, Any]], status: Mapping[str, Any]) -> None:
        """New events of the scheduler, and its status."""
        for worker in status["workers"]:
            self._workers[worker["name"]] = {name: worker[name] for name in ("node", "pid", "cpus", "gpus", "gpu_ids")}
        for event in events:
            key = event["key"]
            if event["event"] == STARTED:
                self._running[key] = (event["worker"], event["time"])
            elif key in self._running and event["event"] != FOUND:
                worker, began = self._running.pop(key)
                outcome = "" if event["event"] == PUBLISHED else event["event"]
                entry = {"key": key, "stage": event["stage"], "worker": worker, "began": began, "ended": event["time"]}
                self._stages.append({**entry, "outcome": outcome})

    def _sample_cpus(self) -> None:
        import psutil

        psutil.cpu_percent()
        while not self._over.wait(SAMPLE_SECONDS):
            self._cpu.append((time.time(), psutil.cpu_percent()))

    def _sample_gpus(self) -> None:
        """Read what nvidia-smi, which comes with every driver of NVIDIA, says a few times a second; without it do nothing."""
        program = shutil.which("nvidia-smi")
        if program is None:
            return
        command = [program, _QUERY, "--format=csv,noheader,nounits", f"-lms={round(1000 * SAMPLE_SECONDS)}"]
        with suppress(OSError):
            self._smi = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert self._smi.stdout is not None
            for line in self._smi.stdout:
                with suppress(ValueError):
                    index, used, memory = (float(part) for part in line.split(","))
                    self._gpus.setdefault(int(index), []).append((time.time(), used, memory))

    def data(self) -> dict[str, Any]:
        """All of it as JSON values; times in seconds since the command."""

        def at(moment: float) -> float:
            return round(moment - self.began, 3)

        stages = sorted(self._stages, key=lambda entry: float(entry["began"]))
        stages = [{**entry, "began": at(entry["began"]), "ended": at(entry["ended"])} for entry in stages]
        gpus = {str(index): [[at(moment), *rest] for moment, *rest in samples] for index, samples in self._gpus.items()}
        cpu = [[at(moment), used] for moment, used in self._cpu]
        found = {
            "title": self.title,
            "began": self.began,
            "phases": [{"name": name, "at": at(moment)} for name, moment in sorted(self._phases, key=lambda phase: phase[1])],
            "workers": self._workers,
            "stages": stages,
            "gpus": gpus,
            "cpu": cpu,
        }
        return {**found, "summary": summary(found)}

    def write(self) -> Path:
        """Write ``timeline.json`` and ``timeline.html``; the latter's path.

        Raises:
            OSError: the folder cannot be written.
        """
        from ktray.report.timeline import timeline_page

        self.close()
        data = self.data()
        (self.folder / "timeline.json").write_text(json.dumps(data, indent=1))
        traces = sorted(path.name for path in self.folder.glob("trace-*") if path.stat().st_size)
        page = self.folder / "timeline.html"
        page.write_text(timeline_page(data, traces), encoding="utf-8")
        return page

    def close(self) -> None:
        """Sample no more."""
        self._over.set()
        if self._smi is not None:
            self._smi.kill()
            self._smi.wait()
            self._smi = None


def open_profile(settings: Settings, title: str, began: float, with_traces: bool) -> Profile:
    """A profile in a new folder of this home.

    Raises:
        UserError: the folder cannot be made.
    """
    folder = settings.home / "profiles" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror}", "--profile") from error
    return Profile(folder, title, began, with_traces)


def summary(data: Mapping[str, Any]) -> dict[str, Any]:
    """When the first stage began and the last one ended, how busy the GPUs were between them, and seconds by kind of stage.

    Args:
        data: as `Profile.data` returns it.
    """
    stages = data["stages"]
    first = min((entry["began"] for entry in stages), default=None)
    last = max((entry["ended"] for entry in stages), default=None)
    by_kind: dict[str, dict[str, float]] = {}
    for entry in stages:
        kind = by_kind.setdefault(entry["stage"], {"stages": 0, "seconds": 0.0, "longest": 0.0})
        seconds = entry["ended"] - entry["began"]
        kind["stages"] += 1
        kind["seconds"] = round(kind["seconds"] + seconds, 3)
        kind["longest"] = round(max(kind["longest"], seconds), 3)
    used = {
        index: [sample[1] for sample in samples if first is not None and first <= sample[0] <= last]
        for index, samples in data["gpus"].items()
    }
    return {
        "first_stage": first,
        "last_stage": last,
        "gpu_percent": {index: round(sum(values) / len(values), 1) for index, values in used.items() if values},
        "gpu_idle_samples": {index: sum(value == 0 for value in values) for index, values in used.items() if values},
        "gpu_samples": {index: len(values) for index, values in used.items() if values},
        "stages": by_kind,
    }
