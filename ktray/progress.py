"""Progress of the running stage: loops deep inside it count work with `advance`, and `reporting` passes the counts on.

A loop needs no reference to whoever watches. Outside a stage, and for items that another worker does, `advance` does nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

# Seconds between two reports by loops. A stage's pace is the mean time between its reports, and it counts as stuck after many
# times that. If every batch reported, a healthy stage whose next step is slow, such as a probe, would look stuck.
REPORT_INTERVAL = 10.0

Report = Callable[[Mapping[str, float]], None]


class _Reporter:
    """Counts what loops advance, and reports the counts every few seconds together with the stage's own last report."""

    def __init__(self, report: Report) -> None:
        self._report, self._reported_at = report, time.monotonic()
        self._last: Mapping[str, float] = {}
        self._counts: Counter[str] = Counter()

    def report(self, values: Mapping[str, float]) -> None:
        self._last, self._counts, self._reported_at = dict(values), Counter(), time.monotonic()
        self._report(values)

    def count(self, what: str, by: int) -> None:
        self._counts[what] += by
        now = time.monotonic()
        if now - self._reported_at >= REPORT_INTERVAL:
            self._reported_at = now
            self._report({**self._last, what: self._counts[what]})


_reporter: ContextVar[_Reporter | None] = ContextVar("reporter", default=None)
_watcher: ContextVar[Callable[[], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def reporting(report: Report) -> Iterator[Report]:
    """Within a `with`, report what loops in this thread advance.

    Args:
        report: called every few seconds with the counts since the stage's own last report: ``{"images": 5120}``.

    Yields:
        The function by which the stage itself reports, at once and as often as it likes: ``{"epoch": 3, "of": 8}``. Later
        counts are reported together with these values: ``{"epoch": 3, "of": 8, "step": 17}``.
    """
    reporter = _Reporter(report)
    token = _reporter.set(reporter)
    try:
        yield reporter.report
    finally:
        _reporter.reset(token)


@contextmanager
def watching(call: Callable[[], None]) -> Iterator[None]:
    """Within a `with`, call this in the stage's own thread whenever a loop of it advances, such as after each training step."""
    token = _watcher.set(call)
    try:
        yield
    finally:
        _watcher.reset(token)


def advance(what: str, by: int = 1) -> None:
    """Count finished items. It takes less than a microsecond, so loops may call it for every batch.

    Args:
        what: name of the items, such as ``step``.
        by: how many more are done.
    """
    reporter, watcher = _reporter.get(), _watcher.get()
    if watcher is not None:
        watcher()
    if reporter is not None:
        reporter.count(what, by)
