"""The runs of one study in MLflow. They are looked up by their tags before they are created, so none is created twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktray.tracking import mlflow_names
from ktray.tracking.connection import Connection
from ktray.tracking.mlflow_names import EXPERIMENT_TAG_LENGTH, METRICS_PER_BATCH, PARAMS_PER_BATCH, TAG_LENGTH, quoted, text_of

SEARCH = "search"
_TAG_OF_ROLE = {"trial": "ktray.trial", "stage": "ktray.key", "trial-reference": "ktray.reference"}


@dataclass
class _Buffer:
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)  # name, value, time in ms, step
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class MlflowRuns:
    """Creates, finds and writes the runs of a study. A reference ("search", "trial/42", "stage/KEY") says which run is meant.

    Logged values are buffered until `flush`.

    Args:
        connection: an open tracker.
        study_tags: tags that every run of this study has, and no run of another study.
        runs: reference -> (run id, start in ms). Changed in place; the caller saves it.
        home: where the images are whose paths are relative.
    """

    def __init__(
        self, connection: Connection, study_tags: Mapping[str, str], runs: dict[str, tuple[str, int]], home: Path
    ) -> None:
        self.local, self.home = connection.local, home
        self.runs = runs
        self._client, self._experiment = connection.client, connection.experiment
        self._study_tags = dict(study_tags)
        self._buffers: dict[str, _Buffer] = {}
        self._missing_links: dict[str, tuple[str, bool]] = {}  # reference -> arguments of `describe`, to repeat once they exist

    def find_or_create(self, ref: str, name: str, start: int) -> bool:
        """Find the run of `ref`, or create it with this name and start in ms. Return whether it existed."""
        if ref in self.runs:
            return True
        tags = self._tags_of(ref)
        found = next(self._search(tags), None)
        if found is not None:
            self.runs[ref] = (found.info.run_id, found.info.start_time)
            return True
        parent = {} if ref == SEARCH else {"mlflow.parentRunId": self._parent_id(start)}
        run = self._client.create_run(self._experiment, start_time=start, tags={**tags, **parent}, run_name=name)
        self.runs[ref] = (run.info.run_id, start)
        self._complete_links(ref)
        return False

    def reopen(self, ref: str, name: str) -> dict[str, str]:
        """Set a run back to RUNNING under this name. Return its params, which MLflow cannot change."""
        run_id, _ = self.runs[ref]
        self._client.update_run(run_id, status="RUNNING", name=name)
        return dict(self._client.get_run(run_id).data.params)

    def start_of(self, ref: str) -> int:
        """Return when a run began, in ms."""
        return self.runs[ref][1]

    def log(
        self,
        ref: str,
        *,
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
        time: int = 0,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Buffer values for the next `flush`; `time` in ms. The last tag of a name wins."""
        buffer = self._buffers.setdefault(ref, _Buffer())
        buffer.metrics += [(key, value, time, step) for key, value in (metrics or {}).items()]
        buffer.params.update(params or {})
        buffer.tags.update(tags or {})

    def describe(self, ref: str, text: str, images: bool) -> None:
        """Set a run's description. Links to runs that do not exist yet are added when those are created.

        Args:
            text: Markdown with links as `mlflow_names.with_links` reads them.
            images: whether this tracker has the stages' images, so that links may lead to them.
        """
        missing = False

        def link_or_none(target: str) -> str | None:
            nonlocal missing
            link = self._link(target, images)
            missing = missing or link is None
            return link

        description = mlflow_names.with_links(text_of(text), link_or_none)
        self.log(ref, tags={mlflow_names.DESCRIPTION: description[:TAG_LENGTH]})
        self._missing_links.pop(ref, None)
        if missing:
            self._missing_links[ref] = (text, images)

    def _complete_links(self, created: str) -> None:
        for ref, (text, images) in list(self._missing_links.items()):
            if f"({created})" in text or f"({created}/" in text:
                self.describe(ref, text, images)

    def flush(self, ref: str) -> None:
        """Write the buffer of one run. MLflow stores metrics with equal value, step and time once."""
        from mlflow.entities import Metric, Param, RunTag

        run_id, _ = self.runs[ref]
        buffer = self._buffers.get(ref, _Buffer())
        for params in _batches(list(buffer.params.items()), PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=[Param(*param) for param in params])
        for tags in _batches(list(buffer.tags.items()), PARAMS_PER_BATCH):
            self._client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags])
        for metrics in _batches(buffer.metrics, METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=[Metric(*metric) for metric in metrics])
        self._buffers.pop(ref, None)

    def flush_all(self) -> None:
        """Write the buffers of all runs."""
        for ref in list(self._buffers):
            self.flush(ref)

    def clear_buffers(self) -> None:
        """Discard what was buffered and not written; its events will be applied again."""
        self._buffers.clear()

    def end(self, ref: str, status: str, time: int) -> None:
        """Flush a run and end it; `time` in ms is used if it has no end yet."""
        self.flush(ref)
        run_id, _ = self.runs[ref]
        info = self._client.get_run(run_id).info
        ended = info.end_time if info.status != "RUNNING" else None
        self._client.set_terminated(run_id, status=status, end_time=ended or time)

    def end_orphans(self, time: int) -> None:
        """End as KILLED the trials and stages that a killed process left RUNNING."""
        search_id = self.runs[SEARCH][0]
        for run in list(self._search(self._study_tags, "attributes.status = 'RUNNING'")):
            if run.info.run_id != search_id:
                self._client.set_terminated(run.info.run_id, status="KILLED", end_time=time)

    def upload(self, ref: str, image: Path, folder: str) -> None:
        """Upload one file. A repeated upload replaces the file."""
        self._client.log_artifact(self.runs[ref][0], str(image), folder or None)

    def tag_experiment(self, tags: Mapping[str, str]) -> None:
        """Set the tags that the experiment does not have yet, so that edits by users stay."""
        known = self._client.get_experiment(self._experiment).tags
        for name, text in tags.items():
            linked = mlflow_names.with_links(text, self._link)
            if name not in known and len(linked) <= EXPERIMENT_TAG_LENGTH:
                self._client.set_experiment_tag(self._experiment, name, linked)

    def check_writable(self, time: int) -> None:
        """Write a tag; raises only if the tracker accepts no write at all."""
        self._client.set_experiment_tag(self._experiment, "ktray.written", str(time))

    def _link(self, target: str, images: bool = True) -> str | None:
        """Return the link to ``trial/7``, ``stage/KEY``, ``stage/KEY/images/NAME.png``, ``search`` or ``view``, or None."""
        if target == "view":
            return mlflow_names.view_link(self._experiment)
        if target.startswith(f"{SEARCH}/"):
            search = self.runs.get(SEARCH)
            return mlflow_names.run_link(self._experiment, search[0], target.partition("/")[2]) if search else None
        role, _, rest = target.partition("/")
        name, _, artifact = rest.partition("/")
        run = self.runs.get(f"{role}/{name}" if name else role)
        return mlflow_names.run_link(self._experiment, run[0], artifact if images else "") if run else None

    def _parent_id(self, start: int) -> str:
        self.find_or_create(SEARCH, self._study_tags["ktray.study"], start)
        return self.runs[SEARCH][0]

    def _tags_of(self, ref: str) -> dict[str, str]:
        role, _, name = ref.partition("/")
        return {**self._study_tags, "ktray.role": role, **({_TAG_OF_ROLE[role]: name} if name else {})}

    def _search(self, tags: Mapping[str, str], *conditions: str) -> Iterator[Any]:
        equal = [f"tags.`{key}` = {quoted(value)}" for key, value in tags.items()]
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], " and ".join([*equal, *conditions]), max_results=200, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
