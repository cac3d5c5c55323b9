"""A study in MLflow: one experiment, a run for the search, under it a run per trial and per stage that really ran.

Every call appends to a spool in the home and returns; a thread writes to MLflow when MLflow answers. A tracker that is
slow, down or full costs no trial, and what it missed appears once it is back, if need be in a later session.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

from ktray.errors import UserError
from ktray.fingerprint import fingerprint
from ktray.tracking.connection import checked, default_uri
from ktray.tracking.mlflow_names import key_of, metrics_of, params_of, run_name, tags_of
from ktray.tracking.pages import experiment_tags
from ktray.tracking.spool import Spool
from ktray.tracking.ui_server import serve
from ktray.tracking.writer import Writer

__all__ = ["Tracker", "default_uri", "replay", "serve"]

Status = Literal["FINISHED", "FAILED", "KILLED"]

P = ParamSpec("P")

log = logging.getLogger("ktray.tracking")


def _quiet(method: Callable[Concatenate[Tracker, P], None]) -> Callable[Concatenate[Tracker, P], None]:
    @wraps(method)
    def call(self: Tracker, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the boundary to the search: no bookkeeping is worth a trial
            self._lose(method.__name__, error)

    return call


class Tracker:
    """Tells MLflow about one study. No method but the constructor raises, and none waits for the tracker but `close`.

    Args:
        uri: sqlite path or server, such as `default_uri` gives.
        home: the spool lives in its ``studies/STUDY/tracking``, artifacts of a sqlite tracker in its ``mlartifacts``.
        study: [A-Za-z0-9._-], the name of the experiment.
        share_images: also send images to a tracker that is not a local sqlite database; they are the user's data.
        version_tags: tags of the search's run, such as ``{"ktray.version": "0.1.0"}``.

    Raises:
        UserError: the URI is one that MLflow or we no longer serve, or the name is not a study's.
    """

    def __init__(
        self,
        uri: str,
        home: Path,
        study: str,
        *,
        share_images: bool = False,
        version_tags: Mapping[str, str] | None = None,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", study):
            raise UserError(f"{study!r} is no name for a study", "study", "Use letters, digits, '.', '_' and '-'.")
        self._uri, self._home, self._study = checked(uri), home, study
        self._share_images = share_images
        self._version_tags = dict(version_tags or {})
        self._spool: Spool | None = None
        self._writer: Writer | None = None
        self._stages: set[str] = set()
        self._lost = 0  # events that could not even be kept

    @_quiet
    def start(self) -> None:
        """Begins a session: replays what an earlier one left, reopens the search's run, closes orphans as KILLED."""
        if self._writer:
            return
        self._spool = Spool(_spool_of(self._home, self._study))
        self._stages = _told_stages(self._spool, fingerprint(self._uri))
        alone = self._spool.claim()  # if another process has it, the RUNNING runs are its, and no orphans
        writer = _writer(self._spool, self._uri, self._home, self._study)
        self._add("open", name=self._study, tags=tags_of(self._version_tags), alone=alone)
        writer.start()
        self._writer = writer

    @_quiet
    def describe(
        self, goals: Sequence[tuple[str, str]], metrics: Sequence[str], params: Sequence[str], description: str
    ) -> None:
        """Says what the study is about, once in its life: MLflow's pages then open on its trials, best first.

        Args:
            goals: (metric, "max" or "min"), the most important first.
            metrics, params: more columns of the table of trials.
            description: Markdown; ``[label](view)`` becomes a link to that table.
        """
        now = round(time.time() * 1000)
        keys = [(key_of(metric), mode) for metric, mode in goals]
        tags = experiment_tags(keys, [key_of(name) for name in metrics], [key_of(name) for name in params], description, now)
        self._add("describe", tags=tags)

    @_quiet
    def summary(self, note: str, metrics: dict[str, float]) -> None:
        """What came of the search so far, on its own run.

        Args:
            note: Markdown; ``[label](trial/7)`` and ``[label](stage/KEY)`` become links to runs.
            metrics: without a step.
        """
        finite, more = metrics_of(metrics, 0)
        self._add("summary", name=self._study, metrics=finite, tags=more, note=note, share=self._share_images)

    @_quiet
    def trial(self, number: int, name: str, params: dict[str, Any], tags: dict[str, str], note: str = "") -> None:
        """Begins trial `number`, or continues it: then its run is set back to RUNNING.

        Args:
            number: of the study's trial.
            name: readable, such as ``rotation-resnet18/layer3 k=500 -> alexnet``; the number is put before it.
            params: dotted spec path -> value.
            tags: ``ktray.*``.
            note: the run's description, with links as in `summary`.
        """
        texts, cut = params_of(params)
        all_tags = {**tags_of(tags), **cut}
        name = run_name(number, name)
        self._add("trial", number=number, name=name, params=texts, tags=all_tags, note=note, share=self._share_images)

    @_quiet
    def metrics(self, number: int, values: dict[str, float], step: int) -> None:
        """Metrics of a trial at an epoch. Values that are not finite are left out and named in a tag."""
        finite, tags = metrics_of(values, step)
        self._add("metrics", number=number, metrics=finite, step=int(step), tags=tags)

    @_quiet
    def curve(self, number: int, rows: list[dict[str, float]]) -> None:
        """Rows with ``epoch`` and metrics. Rows that come again, with a longer curve, are stored once."""
        self._add("curve", number=number, rows=_by_step(rows))

    @_quiet
    def finish(self, number: int, status: Status, tags: dict[str, str], metrics: dict[str, float], note: str = "") -> None:
        """Ends a trial, or a leg of one that may be continued. A trial that has ended keeps the time when it did.

        Args:
            metrics: without a step; MLflow compares them as bars.
            note: the run's description, with links as in `summary`; empty leaves it as it is.
        """
        finite, more = metrics_of(metrics, 0)
        all_tags = {**tags_of(tags), **more}
        self._add("finish", number=number, status=status, metrics=finite, tags=all_tags, note=note, share=self._share_images)

    @_quiet
    def stage(
        self,
        key: str,
        name: str,
        metrics: dict[str, float],
        tags: dict[str, str],
        rows: list[dict[str, float]],
        images: list[Path],
        params: Mapping[str, Any] | None = None,
        note: str = "",
        span: tuple[float, float] | None = None,
    ) -> None:
        """A stage that really ran, as a finished run with its key, its training curve and its images.

        Args:
            metrics: without a step; those that the curve has are left to it.
            rows: the curve, with ``epoch`` and metrics.
            images: files that are stored under ``images/``.
            params: dotted spec path -> value.
            note: the run's description, with links as in `summary`.
            span: when the stage began and ended, in seconds since 1970; now, if it is not told.
        """
        curve = _by_step(rows)
        plotted = {metric for row in curve for metric in row["metrics"]}
        finite, more = metrics_of(metrics, 0)
        single = {metric: value for metric, value in finite.items() if metric not in plotted}
        texts, cut = params_of(params or {})
        fields: dict[str, Any] = {"key": key, "name": name, "metrics": single, "rows": curve, "params": texts, "note": note}
        fields |= {"tags": {**tags_of(tags), **more, **cut}, "share": self._share_images}
        self._add("stage", **fields, span=[round(moment * 1000) for moment in span or (time.time(), time.time())])
        self._stages.add(key)
        if images:
            paths = [str(Path(image).absolute()) for image in images]
            self._add("images", key=key, name=name, images=paths, share=self._share_images)

    def knows_stage(self, key: str) -> bool:
        """Whether `stage` was called for this key, by this session or by an earlier one."""
        return key in self._stages

    def close(self, status: Status, timeout: float = 20) -> bool:
        """Ends the search's run and writes what is left, for `timeout` seconds at most.

        Returns:
            Whether everything was written; what was not stays in the spool for the next session.
        """
        if not self._writer:
            return False
        self._end(status)
        return self._writer.stop(timeout) and not self._lost

    @_quiet
    def _end(self, status: Status) -> None:
        self._add("close", name=self._study, status=status)

    def _add(self, do: str, **fields: Any) -> None:
        if self._spool is not None:
            self._spool.append({"do": do, "time": round(time.time() * 1000), **fields})

    def _lose(self, what: str, error: Exception) -> None:
        self._lost += 1
        if self._lost == 1:
            log.warning("tracking of %s failed (%s: %s); the search goes on", what, type(error).__name__, error)


def replay(uri: str, home: Path, study: str, timeout: float = 20) -> bool:
    """Writes what earlier sessions of `study` left in the spool; whether nothing is left. Opens no new session."""
    spool = Spool(_spool_of(home, study))
    writer = _writer(spool, checked(uri), home, study)
    writer.start()
    return writer.stop(timeout)


def _told_stages(spool: Spool, tracker: str) -> set[str]:
    """Keys of the stages that the tracker has or that wait for it."""
    position = spool.load()
    applied = position.runs if position.tracker == tracker else {}
    known = {slot.removeprefix("stage/") for slot in applied if slot.startswith("stage/")}
    offset = position.offset if position.tracker == tracker else 0
    while entries := spool.read(offset):
        known |= {event["key"] for event, _ in entries if event.get("do") == "stage"}
        offset = entries[-1][1]
    return known


def _spool_of(home: Path, study: str) -> Path:
    return home / "studies" / study / "tracking"


def _writer(spool: Spool, uri: str, home: Path, study: str) -> Writer:
    return Writer(spool, uri, home, study, {"ktray.study": study, "ktray.study_id": spool.identity()})


def _by_step(rows: Iterable[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Rows with ``epoch`` as steps with metrics; a row without one has no place on a curve."""
    steps = []
    for row in rows:
        if "epoch" in row:
            step = int(row["epoch"])
            metrics, tags = metrics_of({name: value for name, value in row.items() if name != "epoch"}, step)
            steps.append({"step": step, "metrics": metrics, "tags": tags})
    return steps
