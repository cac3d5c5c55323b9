"""Stages that really ran, as runs of the tracker: each with its curve and its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from ktray.artifact import Artifact
from ktray.fingerprint import flat
from ktray.pipeline import pair_metrics
from ktray.pipeline.naming import stage_name
from ktray.stores import Store
from ktray.tracking import StageRun, Tracker


def track_missed(tracker: Tracker, store: Store, keys: Iterable[str], since: float) -> None:
    """Tell of artifacts that nobody has told of: their search was killed between their last byte and the next second.

    Args:
        keys: what the trials of the study rest on.
        since: when the study began, in seconds since 1970; what is older was computed for another one.
    """
    for key in keys:
        artifact = None if tracker.has_stage(key) else store.find(key)
        if artifact is not None and _ended(artifact) >= int(since):
            track_stage(tracker, artifact)


def track_stage(tracker: Tracker, artifact: Artifact) -> None:
    """A stage that really ran becomes a run of its own, with its curve and its pictures."""
    record = artifact.record
    spec, stage = record["spec"], record["stage"]
    prefix = spec["kind"] if stage == "evaluation" else stage  # as in trials: a chart of top1 of everything says nothing
    numbers = {f"{prefix}/{name}": value for name, value in artifact.metrics.items()}
    numbers |= {f"cost/{name}": record[name] for name in ("seconds", "peak_bytes")}
    tags = {"ktray.stage": stage, "ktray.device": record["device"], "ktray.commit": record["commit"] or "not a checkout"}
    rows = [_prefixed(row, prefix) for row in pair_metrics.curve(artifact)]
    ended = _ended(artifact)
    tracker.log_stage(
        StageRun(
            key=artifact.key,
            name=f"{stage_name(stage, spec)} {artifact.key[-12:][:6]}",
            metrics=numbers,
            tags=tags,
            curve=rows,
            images=sorted(artifact.directory.glob("*.png")),
            params=flat(spec),
            note=_note(artifact),
            span=(ended - record["seconds"], ended),
        )
    )


def _ended(artifact: Artifact) -> float:
    return datetime.fromisoformat(artifact.record["published"]).timestamp()


def _prefixed(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name if name == "epoch" else f"{prefix}/{name}": value for name, value in row.items()}


def _note(artifact: Artifact) -> str:
    reads = [f"[{role}](stage/{read})" for role, read in artifact.record["inputs"].items()]
    began = artifact.record["started_from"]
    reads += [f"[an earlier epoch](stage/{began})"] if began else []
    return "\n\n".join([f"Artifact `{artifact.key}`", *([f"Reads {' · '.join(reads)}"] if reads else [])])
