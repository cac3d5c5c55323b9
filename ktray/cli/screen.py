"""What a person sees while a search runs: one live table in a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from ktray.cli.settings import Settings
from ktray.pipeline.naming import pair_name
from ktray.search.space import Space
from ktray.search.trial import Trial

LINES = 8


class Screen(Protocol):
    """Where news go."""

    def trial(self, event: str, trial: Trial, text: str) -> None:
        """A trial was paused, completed, pruned or failed."""

    def work(self, events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        """What the crew did since the last call, and what it does now."""

    def say(self, text: str) -> None:
        """A sentence."""


class _Plain:
    """One line per piece of news; stages only with -v."""

    def __init__(self, options: Settings) -> None:
        self.options, self.began = options, time.monotonic()

    def _line(self, text: str) -> None:
        self.options.tell(f"[{time.monotonic() - self.began:6.0f} s] {text}")

    def trial(self, event: str, trial: Trial, text: str) -> None:
        if event != "pruned":
            self._line(f"{event:9} trial {trial.number:<3} {pair_name(trial.pair)}  {text}")

    def work(self, events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        if self.options.talks < 2:
            return
        for event in events:
            seconds = f"  {event['seconds']:.1f} s" if event.get("seconds") is not None else ""
            self._line(f"{event['event']:9} {event.get('key', '')}{seconds}")

    def say(self, text: str) -> None:
        self._line(text)


class _Live:
    """A table that is redrawn in place: what runs on which worker, and the latest news of trials."""

    def __init__(self, options: Settings, space: Space, name: str, live: Any) -> None:
        self.name, self.space, self.live, self.began = name, space, live, time.monotonic()
        self.news: deque[str] = deque(maxlen=LINES)
        self.running: list[Mapping[str, Any]] = []
        self.counts: dict[str, int] = {}

    def trial(self, event: str, trial: Trial, text: str) -> None:
        self.counts[event] = self.counts.get(event, 0) + 1
        if event != "pruned":
            self.news.append(f"{event:9} {trial.number:>4}  {pair_name(trial.pair)}  {text}")
        self._draw()

    def work(self, events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        self.running = list(status["running"])
        self._draw()

    def say(self, text: str) -> None:
        self.live.console.print(f"ktray: {text}", style="dim", markup=False, highlight=False)

    def _draw(self) -> None:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        counts = "  ".join(f"{count} {event}" for event, count in self.counts.items())
        head = Text(f"{self.name}  {time.monotonic() - self.began:.0f} s  {counts}", style="bold")
        work = Table(box=None, pad_edge=False, show_header=False)
        for entry in self.running:
            progress = "  ".join(f"{name} {value:.4g}" for name, value in (entry.get("progress") or {}).items())
            work.add_row(Text(str(entry["worker"]), style="cyan"), Text(str(entry["key"])), Text(progress, style="dim"))
        self.live.update(Group(head, work, *(Text(line) for line in self.news)))


@contextmanager
def screen(options: Settings, space: Space, name: str) -> Iterator[Screen]:
    """The screen that fits where stderr goes."""
    if options.talks != 1 or not sys.stderr.isatty():
        yield _Plain(options)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as live:
        yield _Live(options, space, name, live)
