"""Traces of stages for `--profile`: what a stage's process and its GPU did, in the format of Chrome's and Perfetto's viewers.

Bounded: of each kind of stage the first few, of each the first seconds of its work. A stage that is traced takes longer, and so
do the seconds in its record; its result is the same.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktray import progress
from ktray.artifact import Artifact, Stage
from ktray.pool import StageContext
from ktray.stores import Store

MAX_TRACES = 3  # of one kind of stage: the first of a fresh process, and some of warm ones
TRACED_SECONDS = 2.0  # from the start of a stage to the next step of its loop
MAX_TRACE_BYTES = 20 << 20  # of one compressed trace; a longer one is left out
TOP_ROWS = 40  # operations in the table beside a trace

log = logging.getLogger("ktray.trace")


def run_traced_stage(stage: Stage, store: Store, attempt: str, context: StageContext, folder: str) -> tuple[Artifact, bool]:
    """`execute.execute`, with a trace of the stage in `folder` if there are not enough of its kind yet."""
    from ktray.pipeline.execute import execute

    place = _free_place(Path(folder), stage.name)
    if place is None:
        return execute(stage, store, attempt, context)
    with _tracing(place, f"{stage.key} on {context.device}", context.device.startswith("cuda")):
        return execute(stage, store, attempt, context)


def _free_place(folder: Path, kind: str) -> Path | None:
    """A file that this process alone may write, or None if there are traces enough, or nobody can write there."""
    for number in range(1, MAX_TRACES + 1):
        place = folder / f"trace-{kind}-{number}.json.gz"
        try:
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        except OSError as error:
            log.warning("no trace of %s can be written: %s", kind, error)
            return None
        return place
    return None


@contextmanager
def _tracing(place: Path, title: str, on_gpu: bool) -> Iterator[None]:
    """Trace this thread until its stage has advanced after some seconds, or ends; a profiler that fails costs the trace."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's tracing library prints to the terminal when it starts and stops
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler, ends, running = profile(activities=activities), time.monotonic() + TRACED_SECONDS, False

    def stop() -> None:
        nonlocal running
        if running:
            running = False
            _try(lambda: _write(profiler, place, title, on_gpu), place)

    def stop_after_a_while() -> None:
        if time.monotonic() > ends:
            stop()

    def start() -> None:
        nonlocal running
        profiler.start()
        running = True

    _try(start, place)
    try:
        with progress.watching(stop_after_a_while):
            yield
    finally:
        stop()


def _try(action: Any, place: Path) -> None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - torch's profiler raises whatever its tracing library does; the stage goes on
        log.warning("no trace in %s: %s: %s", place.name, type(error).__name__, error)
        place.unlink(missing_ok=True)


def _write(profiler: Any, place: Path, title: str, on_gpu: bool) -> None:
    profiler.stop()
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(whole))
        with open(whole, "rb") as file, gzip.open(place, "wb", compresslevel=3) as packed:
            shutil.copyfileobj(file, packed)
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=TOP_ROWS, max_name_column_width=60)
    size = place.stat().st_size
    left_out = f"\nThe trace itself had {size >> 20} MB and was left out." if size > MAX_TRACE_BYTES else ""
    place.with_name(place.name.removesuffix(".json.gz") + ".txt").write_text(f"{title}\n\n{table}{left_out}\n")
    if left_out:
        place.write_bytes(b"")
