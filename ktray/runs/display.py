"""What a user sees while a search runs: a live table in a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ktray.artifact import kind_of
from ktray.pipeline.naming import pair_name
from ktray.redaction import without_secrets
from ktray.runs.settings import Settings
from ktray.search import halving, ranking
from ktray.search.space import Space
from ktray.search.study import Study
from ktray.search.trial import Trial
from ktray.text import counted, visible_name

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

COLOURS = {"completed": "green", "running": "cyan", "failed": "red", "paused": "default", "pruned": "dim"}
STATE_ORDER = ("completed", "running", "paused", "pruned", "failed", "duplicate")
MAX_ROWS = 12


class Display(Protocol):
    """Where a user sees the search; called from several threads."""

    def begin(self, study: Study) -> None:
        """The study before anything runs; its `trials` stay up to date."""

    def trial(self, event: str, trial: Trial, text: str) -> None:
        """A trial was paused, completed, pruned or failed."""

    def work(self, events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        """What the scheduler did since the last call, and what it does now."""

    def say(self, text: str) -> None:
        """A sentence for the user."""


class _Plain:
    """One line per event; stages only with -v."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.began = settings, time.monotonic()

    def _line(self, text: str) -> None:
        self.settings.print_info(f"[{time.monotonic() - self.began:6.0f} s] {text}")

    def begin(self, study: Study) -> None:
        """Nothing to print yet."""

    def trial(self, event: str, trial: Trial, text: str) -> None:
        if event != "pruned":
            self._line(f"{event:9} trial {trial.number:<3} {pair_name(trial.pair)}  {text}")

    def work(self, events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        if self.settings.verbosity < 2:
            return
        for event in events:
            seconds = f"  {event['seconds']:.1f} s" if event.get("seconds") else ""
            self._line(f"{event['event']:9} {event.get('key', '')}{seconds}")

    def say(self, text: str) -> None:
        self._line(text)


class _Live:
    """A table, redrawn in place: progress of the study, what runs on which worker, and the trials, best first."""

    def __init__(self, space: Space, name: str, console: Console) -> None:
        self.space, self.name, self.console, self.began = space, name, console, time.monotonic()
        self.study: Study | None = None
        self.status: Mapping[str, Any] = {}

    def begin(self, study: Study) -> None:
        self.study = study

    def trial(self, event: str, trial: Trial, text: str) -> None:
        if event == "failed":
            self.say(f"trial {trial.number} {pair_name(trial.pair)}: {text}")

    def work(self, events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        self.status = status

    def say(self, text: str) -> None:
        self.console.print(_as_text(without_secrets(f"ktray: {text}"), "dim"), highlight=False)

    def render(self) -> RenderableType:
        """The whole table as of now; called several times a second, by another thread."""
        from rich.console import Group

        trials = [trial for trial in self.study.trials() if trial.state != "duplicate"] if self.study else []
        work = self._work()
        rows = max(1, min(MAX_ROWS, self.console.height - work.row_count - 8))
        return Group(self._head(trials), "", work, self._queue(), "", self._trials(trials, rows))

    def _head(self, trials: Sequence[Trial]) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        target = self.study.target if self.study else self.space.budget.trials
        settled = sum(trial.state != "running" for trial in trials)
        states = [trial.state for trial in trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in STATE_ORDER if state in states)
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=max(target, 1), completed=settled, complete_style="cyan", finished_style="green")
        head.add_row(_as_text(self.name, "bold"), bar, Text(_clock(time.monotonic() - self.began), style="bold"))
        return _stacked(head, Text(f"{len(trials)} of {counted(target, 'trial')}{': ' if counts else ''}{counts}", style="dim"))

    def _work(self) -> Table:
        from rich.table import Table

        work = Table.grid(padding=(0, 2))
        for style in ("cyan", "default", "dim", "dim"):
            work.add_column(no_wrap=True, overflow="ellipsis", style=style)
        now = time.time()
        for entry in self.status.get("running", ()):
            helpers = f" +{len(entry['helpers'])}" if entry.get("helpers") else ""
            cells = (
                f"{entry['worker']}{helpers}",
                entry["key"],
                _clock(now - entry["since"]),
                _progress_text(entry["progress"]),
            )
            work.add_row(*map(_as_text, cells))
        return work

    def _queue(self) -> Text:
        """What waits, in a few words."""
        from rich.text import Text

        queued, workers = len(self.status.get("queued", ())), self.status.get("workers", ())
        if not self.status:
            words = "starting"
        elif all(worker["state"] == "starting" for worker in workers):
            words = "workers are starting"
        else:
            words = counted(queued, "more stage waits", "more stages wait") if queued else ""
        return Text(words, style="dim")

    def _trials(self, trials: Sequence[Trial], rows: int) -> Table:
        from rich.table import Table

        goal = self.space.objectives[0][0]
        stop = self.space.early_stop
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("trial", justify="right", no_wrap=True)
        table.add_column("pair", ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column("epochs", justify="right", no_wrap=True)
        if stop and stop.metric != goal:
            table.add_column(_as_text(stop.metric), justify="right", no_wrap=True)
        table.add_column(_as_text(goal), justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        waits_for = _stages_waited_for(self.status.get("waiting", ()))
        for trial in _best_first(trials, self.space)[:rows]:
            score = trial.scores.get(max(trial.scores, default=0))
            found = trial.objectives.get(goal, score if stop and stop.metric == goal else None)
            judged = [_number(score)] if stop and stop.metric != goal else []
            reached = f"{trial.epoch}/{trial.total_epochs}"
            state = (
                f"{trial.state}: {waits_for[trial.number]}"
                if trial.state == "running" and trial.number in waits_for
                else trial.state
            )
            cells = [str(trial.number), pair_name(trial.pair), reached, *judged, _number(found), state]
            table.add_row(*map(_as_text, cells), style=COLOURS.get(trial.state))
        if len(trials) > rows:
            table.add_row("", _as_text(f"and {len(trials) - rows} more"), style="dim")
        return table


def _as_text(value: str, style: str = "") -> Text:
    """A cell that rich shows as it is: a name is never markup, nor an emoji, nor an escape sequence."""
    from rich.text import Text

    return Text(visible_name(value), style=style)


def _best_first(trials: Sequence[Trial], space: Space) -> list[Trial]:
    """Completed trials by the first objective, then the others by the epoch they reached and their score there."""
    done = ranking.ranked(list(trials), space.objectives)
    others: list[Trial] = []
    epochs = sorted({trial.epoch for trial in trials if trial.scores}, reverse=True)
    for epoch in epochs:
        level = [trial for trial in trials if trial.state != "completed" and trial.epoch == epoch and epoch in trial.scores]
        others += halving.sorted_by_rung_score(space.early_stop, level, epoch)
    seen = {trial.number for trial in (*done, *others)}
    return [*done, *others, *(trial for trial in trials if trial.number not in seen)]


def _stages_waited_for(waiting: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Number of a trial -> name of the stage that it waits for."""
    named = [(str(entry["waiter"]).split(), kind_of(entry["key"])) for entry in waiting]
    return {int(words[1]): stage.replace("_", "-") for words, stage in named if words[0] == "trial"}


def _stacked(*parts: RenderableType) -> Table:
    from rich.table import Table

    stack = Table.grid(expand=True)
    for part in parts:
        stack.add_row(part)
    return stack


def _progress_text(progress: Mapping[str, float]) -> str:
    """``epoch 3 of 8  loss 1.29``: counters before values; the learning rate is in the schedule."""
    given = {name: value for name, value in progress.items() if name != "lr"}
    last = given.pop("of", None)
    words = [f"{name} {value:.4g}" for name, value in given.items()]
    if words and last is not None:
        words[0] += f" of {last:.4g}"
    return "  ".join(words)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def open_display(settings: Settings, space: Space, name: str) -> Iterator[Display]:
    """A live table if stderr is a terminal, else plain lines."""
    if settings.verbosity != 1 or not sys.stderr.isatty():
        yield _Plain(settings)
        return
    from rich.console import Console
    from rich.live import Live

    live = _Live(space, name, Console(stderr=True))
    with Live(console=live.console, get_renderable=live.render, refresh_per_second=4, transient=True), _logs_above_the_table():
        yield live


@contextmanager
def _logs_above_the_table() -> Iterator[None]:
    """Send log messages through the stream that `Live` has put in place of stderr, so that they do not break the table."""
    handlers = [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]
    before = [(handler, handler.setStream(sys.stderr)) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in before:
            if stream is not None:
                handler.setStream(stream)
