"""Search a space for its best pair. The same command goes on where it ended, whatever ended it."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktray.cli.settings import Settings, count, counted, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ktray.runs.interruption import Interruption
    from ktray.runs.search_run import SearchOutcome
    from ktray.search.space import Space

LONGEST_END = 8.0  # seconds from Ctrl-C to the end
HELP = "search a space; the same command resumes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("space", type=Path, metavar="SPACE", help="a search space (.yaml)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE", help="change the space")
    parser.add_argument("--name", default=None, help="the study's name; the same name resumes (default: the space's)")
    parser.add_argument("--trials", default=None, metavar="50|+50", help="target, or how many more once it is met")
    parser.add_argument("--concurrent", type=count, default=None, metavar="C", help="trials at the same time, 64 at most")
    parser.add_argument("--warm-start", default=None, metavar="STUDY", help="learn from another study of this home first")
    parser.add_argument("--retry", action="store_true", help="draw the pairs of failed trials again, as new trials")
    parser.add_argument("--address", default=None, help="a running Ray cluster, such as auto")
    parser.add_argument("--share-images", action="store_true", help="send cluster sheets to a remote tracker too")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from ktray.cli.spec_files import load_space
    from ktray.runs.interruption import Interruption

    options = settings(args)
    stopping = Interruption()
    with stop_on_signals(stopping, options, lambda: _end_at_once(args, options)):
        outcome, uri = search(
            load_space(args.space, args.overrides),
            str(args.space),
            options,
            stopping,
            name=args.name,
            trials=args.trials,
            concurrent=args.concurrent,
            warm_start=args.warm_start,
            address=args.address,
            share_images=args.share_images,
            retry=args.retry,
        )
        return _finish(outcome, uri, args, options)


def search(
    space: Space,
    source: str,
    options: Settings,
    stopping: Interruption,
    name: str | None,
    trials: int | str | None,
    concurrent: int | None,
    warm_start: str | None,
    address: str | None,
    share_images: bool,
    retry: bool,
) -> tuple[SearchOutcome, str]:
    """What the search did, and where it is tracked.

    Args:
        source: what errors call the space, such as its file.
        stopping: its wish ends the search within seconds; the same call goes on later.
        name, trials, concurrent, warm_start, address, share_images, retry: as `add_arguments` describes them.

    Raises:
        UserError: the space, an argument or the data are wrong.
        PreflightFailed: Ray, the store or the disk cannot carry the search.
    """
    from ktray import __version__, tracking
    from ktray.cli.live_display import live_display
    from ktray.cli.plan import check_space
    from ktray.pipeline.pair_check import data_loader
    from ktray.runs import search_run

    if concurrent is not None:
        counted(concurrent, "concurrent")
    space = search_run.with_concurrent(space, concurrent)
    check_space(space, data_loader(), source)
    study, target = name or space.name, None if trials is None else str(trials)
    for warning in space.warnings():
        options.tell(f"ktray: {warning}")
    uri = options.tracking or tracking.default_uri(options.home)
    tags = {"ktray.version": __version__}
    tracker = tracking.Tracker(uri, options.home, study, share_images=share_images, version_tags=tags)
    place = search_run.SearchSettings(options.home, options.open_store(), address, options.runtime)
    with live_display(options, space, study) as shown:
        outcome = search_run.search(
            space, place, tracker, stopping, shown, name=study, trials=target, warm_start=warm_start, retry=retry
        )
    return outcome, uri


@contextmanager
def stop_on_signals(stopping: Interruption, options: Settings, force: Callable[[], None] | None = None) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the search: in order where processes run, the second time at once.

    Args:
        force: called, in a thread, if that takes too long. A signal in the middle of an import may leave its lock taken.
    """
    timer = threading.Timer(LONGEST_END, force or (lambda: None))
    timer.daemon = True

    def stop(number: int, frame: Any) -> None:
        if not stopping.is_set():
            timer.start()
        if stopping.orderly and not stopping.is_set():
            options.tell("ktray: stopping; once more ends at once")
        stopping.wish()

    def ignored(error: sys.UnraisableHookArgs) -> None:
        if error.exc_type is not KeyboardInterrupt:  # raised where Python goes on: `Stopping.heed` raises it again
            hook(error)

    hook, sys.unraisablehook = sys.unraisablehook, ignored
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        timer.cancel()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_at_once(args: argparse.Namespace, options: Settings) -> None:
    """Leave as kill -9 would, which costs nothing that was published; Ray's processes notice."""
    from ktray.cli import INTERRUPTED

    cursor = "\x1b[?25h" if sys.__stderr__ is not None and sys.__stderr__.isatty() else ""
    options.blame(f"{cursor}ktray: interrupted; resume with: {args.command}")
    os._exit(INTERRUPTED)


def _finish(outcome: SearchOutcome, uri: str, args: argparse.Namespace, options: Settings) -> int:
    from ktray.cli import INTERRUPTED
    from ktray.cli.leaderboard import leaderboard, still_failed
    from ktray.errors import StageFailed, StoppedEarly
    from ktray.pipeline.pair_metrics import left_out
    from ktray.search.history import read

    study = read(options.home, outcome.study)
    answer = _answer(outcome, study, uri, options)
    for line in left_out(outcome.published | outcome.reused, options.open_store()):
        options.tell(f"ktray: {line}")
    place = f" --home {shlex.quote(str(args.home))}" if args.home else ""
    failed = still_failed(study.trials)
    footer = _footer(answer, outcome, place, args.command if failed else "", options)
    options.answer(answer, f"\n{leaderboard(study, options.home, top=10)}\n{footer}")
    if outcome.stopped:
        why = str(outcome.stopped).rstrip(".")
        options.blame(f"ktray: stopped early: {why}. Nothing is lost; the same command goes on from here.")
        return StoppedEarly.exit_code
    if outcome.interrupted:
        options.blame(f"ktray: interrupted; resume with: {args.command}")
        return INTERRUPTED
    return StageFailed.exit_code if failed else 0


def _answer(outcome: SearchOutcome, study: Any, uri: str, options: Settings) -> dict[str, Any]:
    from ktray.cli.leaderboard import count_states, trial_answer
    from ktray.pipeline.pair_metrics import count_by_stage
    from ktray.search import ranking

    counts = count_states(study.trials)
    ranked = ranking.ranked(study.trials, study.objectives)
    return {
        "study": outcome.study,
        "trials": {state: counts[state] for state in ("completed", "pruned", "failed", "duplicate")},
        "stages": {
            "computed": count_by_stage(outcome.published),
            "reused": count_by_stage(outcome.reused),
        },
        "best": trial_answer(ranked[0]) if ranked else None,
        "seconds": round(outcome.seconds, 1),
        "home": str(options.home),
        "tracking_uri": uri,
    }


def _footer(answer: dict[str, Any], outcome: SearchOutcome, place: str, again: str, options: Settings) -> str:
    from ktray.pipeline.references import may_be_judged_on_test

    computed, reused = (sum(answer["stages"][part].values()) for part in ("computed", "reused"))
    hints = {f"ktray ui{place}": f"every trial in MLflow ({answer['tracking_uri']})"}
    if answer["best"]:
        hints[f"ktray report {outcome.study}{place}"] = "one HTML file"
        if may_be_judged_on_test(answer["best"]["keys"], options.open_store()):
            hints[f"ktray best {outcome.study} --test{place}"] = "judge the winners on the test split"
    else:
        hints[f"ktray show {outcome.study}{place}"] = "what became of each trial"
    if again:
        hints[f"{again.replace(' --retry', '')} --retry"] = "draw what failed again, once the cause is gone"
    width = max(map(len, hints))
    return "\n".join(
        [
            f"{outcome.reason or 'not finished'}; {computed} stages computed, {reused} reused, {answer['seconds']:.0f} s.",
            *(f"{command:{width}}  {text}" for command, text in hints.items()),
        ]
    )
