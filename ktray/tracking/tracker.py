"""What a search calls to log to MLflow. Every call appends an event to the spool; a thread writes it when MLflow answers."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

from ktray.errors import UserError
from ktray.fingerprint import fingerprint
from ktray.redaction import without_secrets
from ktray.tracking.connection import validated_uri
from ktray.tracking.mlflow_names import experiment_tags, key_of, metrics_of, params_of, run_name, tags_of
from ktray.tracking.spool import Spool
from ktray.tracking.writer import Writer

Status = Literal["FINISHED", "FAILED", "KILLED"]

P = ParamSpec("P")

log = logging.getLogger("ktray.tracking")


@dataclass(frozen=True)
class StageRun:
    """What `Tracker.log_stage` logs of a stage that was computed.

    Attributes:
        key: of the artifact.
        name: of the run.
        metrics: without a step. Those that are also in `curve` are taken from there.
        tags: ``ktray.*``.
        curve: rows with ``epoch`` and metrics.
        images: files, stored under ``images/``.
        params: dotted spec path -> value.
        note: description in Markdown, with links as in `Tracker.log_summary`.
        span: when the stage began and ended, in seconds since 1970; None means now.
    """

    key: str
    name: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    curve: Sequence[Mapping[str, float]] = ()
    images: Sequence[Path] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Unwritten:
    """What MLflow has not got of a session.

    Attributes:
        waiting: events in the spool, which the next session writes.
        refused: events that MLflow refuses, kept in ``rejected.jsonl``.
        lost: calls that could not even be kept, such as on a full disk.
    """

    waiting: int = 0
    refused: int = 0
    lost: int = 0


def _never_raises(method: Callable[Concatenate[Tracker, P], None]) -> Callable[Concatenate[Tracker, P], None]:
    @wraps(method)
    def call(self: Tracker, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the boundary to the search: a failure to log must not cost a trial
            self._lose(method.__name__, error)

    return call


class Tracker:
    """Logs one study to MLflow. Only the constructor raises, and only `close` waits for MLflow.

    Args:
        uri: sqlite path or server, such as `default_uri` returns.
        home: holds the spool in ``studies/STUDY/tracking``, and the artifacts of a sqlite tracker in ``mlartifacts``.
        study: name of the experiment, [A-Za-z0-9._-].
        share_images: also send images to a tracker that is not a local sqlite database; they are the user's data.
        version_tags: tags of the search's run, such as ``{"ktray.version": "0.1.0"}``.
        spool: another folder for the spool, for a study that is sent to a second tracker.
        clock: seconds since 1970 of what is logged.

    Raises:
        UserError: the URI is one that MLflow or ktray does not support, or `study` has other characters.
    """

    def __init__(
        self,
        uri: str,
        home: Path,
        study: str,
        *,
        share_images: bool = False,
        version_tags: Mapping[str, str] | None = None,
        spool: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", study):
            raise UserError(f"{study!r} cannot name a study", "study", "Use letters, digits, '.', '_' and '-'.")
        self._uri, self._home, self._study = validated_uri(uri), home, study
        self._share_images = share_images
        self._version_tags = dict(version_tags or {})
        self._spool_folder, self._clock = spool or home / "studies" / study / "tracking", clock
        self._spool: Spool | None = None
        self._writer: Writer | None = None
        self._logged_stages: set[str] = set()
        self._lost = 0  # calls that could not be appended to the spool

    @_never_raises
    def start(self, hold_seconds: float = 0.0) -> None:
        """Begin a session: write what earlier ones left in the spool, reopen the search's run, end orphans as KILLED.

        Args:
            hold_seconds: for which events only gather in the spool, unless `write_now` is called: importing MLflow and creating
                its database takes seconds, which a search that is just starting needs for its first stage.
        """
        if self._writer:
            return
        spool = self._spool = Spool(self._spool_folder)
        self._logged_stages = logged_stages(spool, fingerprint(self._uri))
        is_only_session = spool.claim()  # if another process has the claim, runs that are RUNNING are its own and no orphans
        writer = Writer(spool, self._uri, self._home, self._study)
        self._append("open", name=self._study, tags=tags_of(self._version_tags), alone=is_only_session)
        writer.start(hold_seconds)
        self._writer = writer

    @_never_raises
    def write_now(self) -> None:
        """Write from now on what gathers in the spool."""
        if self._writer is not None:
            self._writer.begin()

    @_never_raises
    def describe_study(
        self, objectives: Sequence[tuple[str, str]], metrics: Sequence[str], params: Sequence[str], description: str
    ) -> None:
        """Describe the study once, so that MLflow's pages open on its trials, best first.

        Args:
            objectives: (metric, "max" or "min"), the most important first.
            metrics, params: further columns of the table of trials.
            description: Markdown; ``[label](view)`` becomes a link to that table.
        """
        now = round(time.time() * 1000)
        keys = [(key_of(metric), mode) for metric, mode in objectives]
        tags = experiment_tags(keys, [key_of(name) for name in metrics], [key_of(name) for name in params], description, now)
        self._append("describe", tags=tags)

    @_never_raises
    def log_summary(self, note: str, metrics: Mapping[str, float]) -> None:
        """Log the result of the search so far on its own run.

        Args:
            note: Markdown; ``[label](trial/7)`` and ``[label](stage/KEY)`` become links to runs.
            metrics: without a step.
        """
        finite, nonfinite = metrics_of(metrics, 0)
        self._append("summary", name=self._study, metrics=finite, tags=nonfinite, note=note, share=self._share_images)

    @_never_raises
    def attach(self, files: Mapping[str, str], tables: Sequence[str] = ()) -> None:
        """Put text files on the run of the search, in place of those of the same names.

        Args:
            files: name -> content.
            tables: names of those that are tables as ``mlflow.log_table`` writes them.
        """
        folder = self._spool_folder / "files"
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        paths = [str((folder / name).absolute().relative_to(self._home.absolute())) for name in files]
        self._append("attach", name=self._study, files=paths, tables=list(tables))

    @_never_raises
    def begin_trial(self, number: int, name: str, params: Mapping[str, Any], tags: Mapping[str, str], note: str = "") -> None:
        """Create the run of a trial, or set it back to RUNNING if the trial continues.

        Args:
            number: of the trial in its study.
            name: readable, such as ``rotation-resnet18/layer3 k=500 -> alexnet``; the number is put in front.
            params: dotted spec path -> value.
            tags: ``ktray.*``.
            note: description of the run, with links as in `log_summary`.
        """
        texts, truncated = params_of(params)
        all_tags = {**tags_of(tags), **truncated}
        name = run_name(number, name)
        self._append("trial", number=number, name=name, params=texts, tags=all_tags, note=note, share=self._share_images)

    @_never_raises
    def log_metrics(self, number: int, values: Mapping[str, float], step: int) -> None:
        """Log metrics of a trial at an epoch. Values that are not finite become tags."""
        finite, nonfinite = metrics_of(values, step)
        self._append("metrics", number=number, metrics=finite, step=int(step), tags=nonfinite)

    @_never_raises
    def log_curve(self, number: int, rows: Sequence[Mapping[str, float]]) -> None:
        """Log rows with ``epoch`` and metrics. Rows that were logged before, as part of a shorter curve, are stored once."""
        self._append("curve", number=number, rows=_by_step(rows))

    @_never_raises
    def end_trial(
        self, number: int, status: Status, tags: Mapping[str, str], metrics: Mapping[str, float], note: str = ""
    ) -> None:
        """End the run of a trial, or of a segment that may be continued. A run that has ended keeps its end time.

        Args:
            metrics: without a step; MLflow compares them as bars.
            note: description of the run, with links as in `log_summary`; if empty, the description stays as it is.
        """
        finite, nonfinite = metrics_of(metrics, 0)
        all_tags = {**tags_of(tags), **nonfinite}
        self._append("finish", number=number, status=status, metrics=finite, tags=all_tags, note=note, share=self._share_images)

    @_never_raises
    def log_reference(self, name: str, metrics: Mapping[str, float], tags: Mapping[str, str], note: str = "") -> None:
        """Log what the best pair is compared with, such as the random student, as a finished run among the trials.

        Args:
            metrics: without a step; objectives as those of trials.
            note: description of the run, with links as in `log_summary`.
        """
        finite, nonfinite = metrics_of(metrics, 0)
        all_tags = {**tags_of(tags), **nonfinite}
        self._append("reference", name=name, metrics=finite, tags=all_tags, note=note, share=self._share_images)

    @_never_raises
    def log_stage(self, stage: StageRun) -> None:
        """Log a stage that was computed, as a finished run with its curve and its images."""
        rows = _by_step(stage.curve)
        on_curve = {metric for row in rows for metric in row["metrics"]}
        finite, nonfinite = metrics_of(stage.metrics, 0)
        single = {metric: value for metric, value in finite.items() if metric not in on_curve}
        params, truncated = params_of(stage.params)
        fields: dict[str, Any] = {"key": stage.key, "name": stage.name, "metrics": single, "rows": rows, "params": params}
        fields |= {"tags": {**tags_of(stage.tags), **nonfinite, **truncated}, "note": stage.note, "share": self._share_images}
        self._append("stage", **fields, span=[round(moment * 1000) for moment in stage.span or (time.time(), time.time())])
        self._logged_stages.add(stage.key)
        if stage.images:
            home = self._home.absolute()  # images in it are named relative to it, because it may be moved before they are sent
            images = [image.absolute() for image in stage.images]
            paths = [str(image.relative_to(home) if image.is_relative_to(home) else image) for image in images]
            self._append("images", key=stage.key, name=stage.name, images=paths, share=self._share_images)

    def has_stage(self, key: str) -> bool:
        """Return whether `log_stage` was called for this key, in this session or an earlier one."""
        return key in self._logged_stages

    def close(self, status: Status, timeout: float = 20, give_up: Callable[[], bool] = lambda: False) -> bool:
        """End the search's run and write what is left, for at most `timeout` seconds.

        Args:
            give_up: asked again and again whether to wait no longer.

        Returns:
            Whether everything was written. What was not stays in the spool for the next session.
        """
        if not self._writer:
            return False
        self._end(status)
        return self._writer.stop(timeout, give_up) and not self._lost

    def unwritten(self) -> Unwritten:
        """Return what MLflow has not got, once the tracker is closed."""
        waiting = 0
        with contextlib.suppress(OSError):
            waiting = self._spool.count_waiting() if self._spool is not None else 0
        return Unwritten(waiting, self._writer.rejected if self._writer else 0, self._lost)

    def trials_written(self) -> set[int]:
        """Return the numbers of the trials that this tracker has got, in this session or an earlier one."""
        if self._spool is None:
            return set()
        runs = self._spool.load_position().written_to(fingerprint(self._uri)).runs
        return {int(ref.removeprefix("trial/")) for ref in runs if ref.startswith("trial/")}

    @_never_raises
    def _end(self, status: Status) -> None:
        self._append("close", name=self._study, status=status)

    def _append(self, kind: str, **fields: Any) -> None:
        if self._spool is not None:
            self._spool.append({"do": kind, "time": round(self._clock() * 1000), **fields})

    def _lose(self, call: str, error: Exception) -> None:
        self._lost += 1
        if self._lost == 1:
            log.warning(
                "tracking: %s failed (%s: %s); the search continues", call, type(error).__name__, without_secrets(str(error))
            )


def logged_stages(spool: Spool, tracker: str) -> set[str]:
    """Return the keys of stages that were written to the tracker or that wait in the spool.

    Args:
        tracker: fingerprint of its URI. What was written to another tracker does not count.
    """
    position = spool.load_position().written_to(tracker)
    offset = position.offset
    keys = {ref.removeprefix("stage/") for ref in position.runs if ref.startswith("stage/")}
    while entries := spool.read(offset):
        keys |= {event["key"] for event, _ in entries if event.get("do") == "stage"}
        offset = entries[-1][1]
    return keys


def _by_step(rows: Iterable[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Turn rows with ``epoch`` into steps with metrics; rows without an epoch are left out."""
    steps = []
    for row in rows:
        if "epoch" in row:
            step = int(row["epoch"])
            metrics, tags = metrics_of({name: value for name, value in row.items() if name != "epoch"}, step)
            steps.append({"step": step, "metrics": metrics, "tags": tags})
    return steps
