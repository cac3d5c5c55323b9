"""The runs of one study in MLflow: found by their tags before they are created, so that a replay makes none twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktray.tracking import pages
from ktray.tracking.connection import Connection
from ktray.tracking.mlflow_names import EXPERIMENT_TAG_LENGTH, METRICS_PER_BATCH, PARAMS_PER_BATCH, TAG_LENGTH, quoted, text_of

SEARCH = "search"
_TAG_OF_ROLE = {"trial": "ktray.trial", "stage": "ktray.key"}


@dataclass
class _Pending:
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class MlflowRuns:
    """Slots ("search", "trial/42", "stage/KEY") and the runs behind them. Logged values wait until `flush`.

    Args:
        connection: an open tracker.
        identity: tags that every run of this study has and no run of another study.
        known: slot -> (run id, start in ms), changed in place; the caller saves it.
    """

    def __init__(self, connection: Connection, identity: Mapping[str, str], known: dict[str, tuple[str, int]]) -> None:
        self.local = connection.local
        self.known = known
        self._client, self._experiment = connection.client, connection.experiment
        self._identity = dict(identity)
        self._pending: dict[str, _Pending] = {}
        self._unlinked: dict[str, tuple[str, bool]] = {}  # descriptions that name runs which may still come

    def ensure(self, slot: str, name: str, start: int) -> bool:
        """Finds or creates the run of `slot`; True if it was there before. `start` is in ms."""
        if slot in self.known:
            return True
        tags = self._tags_of(slot)
        found = next(self._search(tags), None)
        if found is None:
            parent = {} if slot == SEARCH else {"mlflow.parentRunId": self._parent(start)}
            run = self._client.create_run(self._experiment, start_time=start, tags={**tags, **parent}, run_name=name)
            self.known[slot] = (run.info.run_id, start)
            self._link_again(slot)
            return False
        self.known[slot] = (found.info.run_id, found.info.start_time)
        return True

    def reopen(self, slot: str, name: str) -> dict[str, str]:
        """Sets a run back to RUNNING under its new name; its params, which MLflow will not change any more."""
        run_id, _ = self.known[slot]
        self._client.update_run(run_id, status="RUNNING", name=name)
        return dict(self._client.get_run(run_id).data.params)

    def start_of(self, slot: str) -> int:
        """When the run of `slot` began, in ms."""
        return self.known[slot][1]

    def log(
        self,
        slot: str,
        *,
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
        time: int = 0,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Adds to what the next `flush` writes; `time` in ms. The last tag of a name wins."""
        pending = self._pending.setdefault(slot, _Pending())
        pending.metrics += [(key, value, time, step) for key, value in (metrics or {}).items()]
        pending.params.update(params or {})
        pending.tags.update(tags or {})

    def describe(self, slot: str, text: str, images: bool) -> None:
        """Sets a run's description, Markdown with links as `pages.with_links` reads them; those to runs that come later, later.

        Args:
            images: whether this tracker has the stages' images, so that links lead to them.
        """
        missing: set[str] = set()

        def address(target: str) -> str | None:
            page = self._page(target, images)
            missing.update(() if page else {target})
            return page

        description = pages.with_links(text_of(text), address)
        self.log(slot, tags={pages.DESCRIPTION: description[:TAG_LENGTH]})
        self._unlinked.pop(slot, None)
        if missing:
            self._unlinked[slot] = (text, images)

    def _link_again(self, slot: str) -> None:
        for other, (text, images) in list(self._unlinked.items()):
            if f"({slot})" in text or f"({slot}/" in text:
                self.describe(other, text, images)

    def flush(self, slot: str) -> None:
        """Writes what `log` collected for one run. Metrics with equal step and time are stored once, however often sent."""
        from mlflow.entities import Metric, Param, RunTag

        run_id, _ = self.known[slot]
        pending = self._pending.get(slot, _Pending())
        for params in _batches(list(pending.params.items()), PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=[Param(*param) for param in params])
        for tags in _batches(list(pending.tags.items()), PARAMS_PER_BATCH):
            self._client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags])
        for metrics in _batches(pending.metrics, METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=[Metric(*metric) for metric in metrics])
        self._pending.pop(slot, None)

    def flush_all(self) -> None:
        """Writes what `log` collected for all runs."""
        for slot in list(self._pending):
            self.flush(slot)

    def discard(self) -> None:
        """Forgets what was collected and not written: the events it came from will be applied again."""
        self._pending.clear()

    def end(self, slot: str, status: str, time: int) -> None:
        """Writes what is collected for `slot` and gives its run an end; `time` in ms, for a run that has none yet."""
        self.flush(slot)
        run_id, _ = self.known[slot]
        info = self._client.get_run(run_id).info
        ended = info.end_time if info.status != "RUNNING" else None
        self._client.set_terminated(run_id, status=status, end_time=ended or time)

    def kill_orphans(self, time: int) -> None:
        """Ends as KILLED what a killed process left RUNNING under the parent."""
        parent = self.known[SEARCH][0]
        for run in list(self._search(self._identity, "attributes.status = 'RUNNING'")):
            if run.info.run_id != parent:
                self._client.set_terminated(run.info.run_id, status="KILLED", end_time=time)

    def attach(self, slot: str, image: Path, folder: str) -> None:
        """Uploads one file; an upload that is repeated replaces itself."""
        self._client.log_artifact(self.known[slot][0], str(image), folder)

    def _page(self, target: str, images: bool = True) -> str | None:
        """Link to ``trial/7``, ``stage/KEY``, ``stage/KEY/images/NAME.png``, ``search``, ``view``; None without such a run."""
        if target == "view":
            return pages.view_page(self._experiment)
        role, _, rest = target.partition("/")
        name, _, artifact = rest.partition("/")
        run = self.known.get(f"{role}/{name}" if name else role)
        return pages.run_page(self._experiment, run[0], artifact if images else "") if run else None

    def tag_experiment(self, tags: Mapping[str, str]) -> None:
        """Sets those tags of the experiment that it does not have: what a person has changed since stays."""
        known = self._client.get_experiment(self._experiment).tags
        for name, text in tags.items():
            linked = pages.with_links(text, self._page)
            if name not in known and len(linked) <= EXPERIMENT_TAG_LENGTH:
                self._client.set_experiment_tag(self._experiment, name, linked)

    def touch(self, time: int) -> None:
        """A write that can only fail if no write succeeds."""
        self._client.set_experiment_tag(self._experiment, "ktray.written", str(time))

    def _parent(self, start: int) -> str:
        self.ensure(SEARCH, self._identity["ktray.study"], start)
        return self.known[SEARCH][0]

    def _tags_of(self, slot: str) -> dict[str, str]:
        role, _, name = slot.partition("/")
        return {**self._identity, "ktray.role": role, **({_TAG_OF_ROLE[role]: name} if name else {})}

    def _search(self, tags: Mapping[str, str], *conditions: str) -> Iterator[Any]:
        wanted = [f"tags.`{key}` = {quoted(value)}" for key, value in tags.items()]
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], " and ".join([*wanted, *conditions]), max_results=200, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
