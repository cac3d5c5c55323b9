"""What a user sees while a search runs: a live table in a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import contextvars
import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ktray.artifact import kind_of
from ktray.pipeline.naming import pair_name
from ktray.redaction import without_secrets
from ktray.runs.settings import Settings
from ktray.runs.study_status import progress_of, time_left, time_left_text
from ktray.search import halving, ranking
from ktray.search.history import StudySnapshot
from ktray.search.space import Space
from ktray.search.study import Study
from ktray.search.trial import Trial
from ktray.text import counted, visible_name

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

COLOURS = {"completed": "green", "running": "cyan", "failed": "red", "paused": "default", "pruned": "dim"}
NOTEBOOK_WIDTH, NOTEBOOK_HEIGHT, NOTEBOOK_SECONDS = 110, 30, 1.0
_NOTEBOOK_HTML = '<pre style="line-height: 1.25; overflow-x: auto">{code}</pre>'
_LINES_BESIDE_ROWS = 8  # head, blank lines, heads of the tables, a line about more


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
    """A table, redrawn in place: how far the study is, what the running trials wait for, then the other trials, best first.

    Args:
        is_made: whether the artifact of a key is in the store.
    """

    def __init__(self, space: Space, name: str, console: Console, is_made: Callable[[str], bool]) -> None:
        self.space, self.name, self.console, self.began = space, name, console, time.monotonic()
        self.study: Study | None = None
        self.status: Mapping[str, Any] = {}
        self._is_made, self._made = is_made, set[str]()
        self._left: tuple[float, float, float] | None = None
        self._names: tuple[int, dict[int, str]] = (0, {})

    def begin(self, study: Study) -> None:
        self.study = study

    def trial(self, event: str, trial: Trial, text: str) -> None:
        if event == "failed":
            self.say(f"trial {trial.number} {pair_name(trial.pair)}: {text}")

    def work(self, events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        self.status = status
        if self.study is not None:
            study = self.study
            snapshot = StudySnapshot(self.name, self.space.content, study.trials(), study.target, study.elapsed)
            self._left = time_left(snapshot, self._was_made)

    def _was_made(self, key: str) -> bool:
        if key not in self._made and self._is_made(key):
            self._made.add(key)
        return key in self._made

    def say(self, text: str) -> None:
        self.console.print(_as_text(without_secrets(f"ktray: {text}"), "dim"), highlight=False)

    def render(self) -> RenderableType:
        """The whole table as of now; called several times a second, by another thread."""
        from rich.console import Group

        trials = [trial for trial in self.study.trials() if trial.state != "duplicate"] if self.study else []
        running = [trial for trial in trials if trial.state == "running"]
        others = [trial for trial in _best_first(trials, self.space) if trial.state != "running"]
        names, rows = self._names_of(trials), max(2, self.console.height - _LINES_BESIDE_ROWS)
        work = _work_of(running, self.status)
        most_others = max(1, rows // 3, rows - len(work)) if others else 0
        shown_work = work[: rows - min(most_others, len(others))]
        parts: list[RenderableType] = [self._head(trials), "", self._running(work, shown_work, names)]
        if others:
            parts += ["", self._others(others, names, rows - len(shown_work))]
        return Group(*parts)

    def _names_of(self, trials: Sequence[Trial]) -> dict[int, str]:
        if self._names[0] != len(trials):
            self._names = (len(trials), ranking.names_by_difference(trials))
        return self._names[1]

    def _head(self, trials: Sequence[Trial]) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        target = self.study.target if self.study else self.space.budget.trials
        settled = sum(trial.state != "running" for trial in trials)
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=max(target, 1), completed=settled, complete_style="cyan", finished_style="green")
        head.add_row(_as_text(self.name, "bold"), bar, Text(_clock(time.monotonic() - self.began), style="bold"))
        left = "" if self._left is None else f"; {time_left_text(*self._left)}"
        return _stacked(head, Text(f"{progress_of(trials, target)}{left}", style="dim", no_wrap=True, overflow="ellipsis"))

    def _running(self, work: Sequence[_Work], shown: Sequence[_Work], names: Mapping[int, str]) -> RenderableType:
        """What runs now: one row per trial, then stages that no trial waits for yet."""
        from rich.table import Table
        from rich.text import Text

        if not work:
            return Text(self._before_work(), style="dim")
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("trial", justify="right", no_wrap=True)
        table.add_column("running", ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column("stage", no_wrap=True)
        table.add_column("progress", no_wrap=True, overflow="ellipsis", max_width=max(12, self.console.width // 3))
        table.add_column("for", justify="right", no_wrap=True)
        for each in shown:
            number = "" if each.trial is None else str(each.trial)
            what = each.waiter if each.trial is None else names.get(each.trial, "")
            table.add_row(*map(_as_text, (number, what, each.stage, each.progress, each.seconds)), style="cyan")
        queued = len(self.status.get("queued", ()))
        more = [f"and {len(work) - len(shown)} more"] if len(work) > len(shown) else []
        more += [counted(queued, "stage is queued", "stages are queued")] if queued else []
        if more:
            table.add_row("", _as_text(", ".join(more)), style="dim")
        return table

    def _before_work(self) -> str:
        workers = self.status.get("workers", ())
        if not self.status:
            return "starting"
        return "workers are starting" if all(worker["state"] == "starting" for worker in workers) else "nothing runs"

    def _others(self, trials: Sequence[Trial], names: Mapping[int, str], rows: int) -> Table:
        from rich.table import Table

        goal, stop = self.space.objectives[0][0], self.space.early_stop
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("trial", justify="right", no_wrap=True)
        table.add_column("best first", ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column("epochs", justify="right", no_wrap=True)
        if stop and stop.metric != goal:
            table.add_column(_as_text(stop.metric), justify="right", no_wrap=True)
        table.add_column(_as_text(goal), justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        shown = trials[:rows] if len(trials) <= rows or rows < 2 else trials[: rows - 1]
        for trial in shown:
            score = trial.scores.get(max(trial.scores, default=0))
            found = trial.objectives.get(goal, score if stop and stop.metric == goal else None)
            judged = [_number(score)] if stop and stop.metric != goal else []
            reached = f"{trial.epoch}/{trial.total_epochs}"
            cells = [str(trial.number), names.get(trial.number, ""), reached, *judged, _number(found), trial.state]
            table.add_row(*map(_as_text, cells), style=COLOURS.get(trial.state))
        if len(trials) > len(shown) and rows > 1:
            table.add_row("", _as_text(f"and {len(trials) - len(shown)} more"), style="dim")
        return table


@dataclass(frozen=True)
class _Work:
    """A row of what runs: a trial with the stage that it waits for, or a stage that runs for nobody yet."""

    trial: int | None
    waiter: str
    stage: str
    progress: str
    seconds: str


def _work_of(running: Sequence[Trial], status: Mapping[str, Any]) -> list[_Work]:
    """What the running trials wait for, then the stages that run and that none of them waits for."""
    now, runs = time.time(), {entry["key"]: entry for entry in status.get("running", ())}
    waits: dict[str, str] = {str(entry["waiter"]): entry["key"] for entry in status.get("waiting", ())}
    found, shown = [], set()
    for trial in running:
        key = waits.get(f"trial {trial.number}", "")
        shown.add(key)
        found.append(_row(trial.number, "", key, runs.get(key), now))
    waiters = {key: waiter for waiter, key in waits.items()}
    for key, entry in runs.items():
        if key not in shown:
            found.append(_row(None, waiters.get(key, "for a trial to come"), key, entry, now))
    return found


def _row(trial: int | None, waiter: str, key: str, entry: Mapping[str, Any] | None, now: float) -> _Work:
    stage = kind_of(key).replace("_", "-") if key else ""
    if entry is None:
        return _Work(trial, waiter, stage, "queued" if key else "", "")
    helpers = f"  {1 + len(entry['helpers'])} workers" if entry.get("helpers") else ""
    return _Work(trial, waiter, stage, f"{_progress_text(entry['progress'])}{helpers}", _clock(now - entry["since"]))


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
    """A live table if stderr is a terminal or this is a notebook, else plain lines."""
    if settings.verbosity == 1 and in_notebook():
        with _table_in_notebook(settings, space, name) as table:
            yield table
        return
    if settings.verbosity != 1 or not sys.stderr.isatty():
        yield _Plain(settings)
        return
    from rich.console import Console
    from rich.live import Live

    store = settings.open_store()
    live = _Live(space, name, Console(stderr=True), lambda key: store.find(key) is not None)
    with Live(console=live.console, get_renderable=live.render, refresh_per_second=4, transient=True), _logs_above_the_table():
        yield live


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def _table_in_notebook(settings: Settings, space: Space, name: str) -> Iterator[Display]:
    """The live table as the output of the running cell, redrawn every second by a thread; its last state stays there."""
    from rich.console import Console

    notebook: Any = sys.modules["IPython.display"]  # which every kernel has loaded, and ktray does not require
    store, over = settings.open_store(), threading.Event()
    console = Console(file=sys.stderr, width=NOTEBOOK_WIDTH, height=NOTEBOOK_HEIGHT, force_terminal=False)
    live = _Live(space, name, console, lambda key: store.find(key) is not None)
    place = notebook.display(notebook.HTML(""), display_id=True)

    def draw() -> None:
        paper = Console(file=io.StringIO(), record=True, width=NOTEBOOK_WIDTH, height=NOTEBOOK_HEIGHT, force_terminal=True)
        paper.print(live.render())
        place.update(notebook.HTML(paper.export_html(inline_styles=True, code_format=_NOTEBOOK_HTML)))

    def redraw() -> None:
        while not over.wait(NOTEBOOK_SECONDS):
            draw()

    thread = threading.Thread(target=contextvars.copy_context().run, args=(redraw,), daemon=True)  # outputs find their cell
    thread.start()
    try:
        yield live
    finally:
        over.set()
        thread.join(5)
        draw()


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
