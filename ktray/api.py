"""The verbs as Python functions: `ktray.search(...)`, `ktray.run(...)`, `ktray.load_student(...)`.

They do what the commands do, on the same homes: a search begun here goes on there. Talk goes to stderr, errors are raised.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ktray import plugins
from ktray.cli.settings import Settings, counted, open_home
from ktray.errors import StageFailed, UserError
from ktray.export.student_files import load_student as load_student
from ktray.spec import PairSpec

if TYPE_CHECKING:
    from pandas import DataFrame

    from ktray.cli.best import Per
    from ktray.export.student_files import Form, Head
    from ktray.runs.interruption import Interruption
    from ktray.runs.search_run import SearchOutcome
    from ktray.search.history import History
    from ktray.search.space import Space

Talk = Literal[0, 1, 2]


@dataclass(frozen=True)
class SearchResult:
    """What a study on disk has found, whether a search of it runs now or not; what is asked is read anew each time.

    Attributes:
        home: absolute path of the home that holds it.
        name: the study's name.
        store: where its artifacts are, such as ``file:///mnt/shared/store``; None for the home's own.
        tracking: MLflow URI; None means MLFLOW_TRACKING_URI, or the home's own database where that is not set.
    """

    home: Path
    name: str
    store: str | None = None
    tracking: str | None = None

    def history(self) -> History:
        """Space, objectives and trials.

        Raises:
            UserError: there is no such study.
        """
        from ktray.search.history import read

        return read(self.home, self.name)

    def best(
        self, top: int | None = None, *, pareto: bool = False, per: Per | None = None, test: bool = False
    ) -> list[dict[str, Any]]:
        """The best completed trials, best first, in the form of ``ktray best NAME --json``.

        Args:
            top: at most so many; None means 10, and one where `test` is asked for.
            pareto: only those that no other beats in every objective.
            per: only the best one of each "teacher" or "student".
            test: judge them on the test split, too, and keep what it says: each look at it makes it worth less.

        Raises:
            UserError: there is no such study, or `top` is no whole number from 1.
            StageFailed: an evaluation on the test split failed.
        """
        from ktray.cli.best import judged, shown, winners

        count = shown(None if top is None else counted(top, "top"), test)
        return judged(winners(self.history(), pareto, per)[:count], self.name, self._options(), test)

    def to_frame(self) -> DataFrame:
        """One row per trial, indexed by its number: `state`, `epoch`, `cause`, then ``params.*``, metrics and ``cost/*``."""
        import pandas

        rows = [
            {"trial": trial.number, "state": trial.state, "epoch": trial.epoch, "cause": trial.cause}
            | {f"params.{name}": value for name, value in trial.params.items()}
            | dict(trial.metrics)
            | {f"cost/{name}": value for name, value in trial.cost.items()}
            for trial in self.history().trials
        ]
        return pandas.DataFrame(rows, columns=None if rows else ["trial", "state"]).set_index("trial")

    def report(self, path: str | Path) -> Path:
        """Write the study's HTML report to `path`.

        Raises:
            UserError: there is no such study, or the file cannot be written.
        """
        from ktray.cli.report import write_report

        return write_report(self.name, self.home, self._options().open_store(), Path(path))

    def export(
        self,
        directory: str | Path,
        trial: int | None = None,
        *,
        format: Form = "safetensors",
        head: Head = "none",
        register: bool = False,
    ) -> list[Path]:
        """Write a trial's student into a new folder, which `load_student` reads; the files.

        Args:
            trial: its number; None for the study's best.
            format: "pt2" and "onnx" add the same network as a program.
            head: "classifier" keeps that of the pseudo-labels.
            register: also as a model in MLflow's registry: ktray-STUDY.

        Raises:
            UserError: no such study or completed trial, the folder is occupied, or the tracker cannot register it.
        """
        from ktray.cli.export import register as registered
        from ktray.cli.export import write_student

        number, options, folder = "" if trial is None else str(trial), self._options(), Path(directory)
        files = write_student(self.home, options.open_store(), self.name, number, folder, head, format)
        if register:
            registered(options, self.name, number, folder)
        return files

    def _options(self) -> Settings:
        return _settings(self.home, 0, self.store, self.tracking)


def search(
    space: Mapping[str, Any] | str | Path,
    *,
    home: str | Path | None = None,
    name: str | None = None,
    trials: int | str | None = None,
    concurrent: int | None = None,
    warm_start: str | None = None,
    address: str | None = None,
    share_images: bool = False,
    retry: bool = False,
    overrides: Sequence[str] = (),
    allow_plugins: Sequence[str] = (),
    store: str | None = None,
    tracking: str | None = None,
    runtime: str | Path | None = None,
    talk: Talk = 1,
) -> SearchResult:
    """Run a search to its target, or go on with it, as `ktray search` does.

    Args:
        space: as plain data, or its YAML file.
        home: None means KTRAY_HOME, or `./.ktray`.
        name: of the study; None for the space's. The same name goes on.
        trials: target, such as 50 or ``"+50"``; None for the space's budget.
        concurrent: trials at the same time, 64 at most; None for the space's budget.
        warm_start: another study of this home, whose results the sampler learns from.
        address: of a running Ray cluster; None starts Ray on this machine.
        share_images: send cluster sheets to a remote tracker, too.
        retry: draw the pairs of failed trials again, as new trials.
        overrides: such as ``["transfer.k=500"]``.
        allow_plugins: packages whose kinds may load, such as ``["my_lab"]``; they stay allowed in this process.
        store: where artifacts live, such as ``file:///mnt/shared/store``; None for the home's own.
        tracking: MLflow URI; None means MLFLOW_TRACKING_URI, or the home's own database where that is not set.
        runtime: file with resources per stage kind.
        talk: 0 errors only, 1 news of trials, 2 stages as well; on stderr.

    Raises:
        UserError: the space, an argument or the data are wrong.
        PreflightFailed: Ray, the store or the disk cannot carry the search.
        StoppedEarly: a full disk, or ten failures in a row; the same call goes on.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    from ktray.cli.search import search as searched

    options = _settings(home, talk, store, tracking, runtime, allow_plugins)
    found, source = _space(space, list(overrides))
    wishes = (name, trials, concurrent, warm_start, address, share_images, retry)  # in the order of `searched`
    outcome = _ended(lambda stopping: searched(found, source, options, stopping, *wishes)[0], options)
    return SearchResult(options.home, outcome.study, store, tracking)


def _space(space: Mapping[str, Any] | str | Path, overrides: list[str]) -> tuple[Space, str]:
    """A space and what errors call it: its file, or "space" for plain data.

    Raises:
        UserError: it is neither a file's name nor plain data, or no space.
    """
    from ktray.cli.spec_files import load_space
    from ktray.search.space import parse

    if isinstance(space, str | Path):
        return load_space(Path(space), overrides), str(space)
    try:
        text = json.dumps(space, allow_nan=False, ensure_ascii=False)  # JSON is YAML
    except (TypeError, ValueError) as error:
        right = "Give a YAML file's name, or what it would hold: dicts, lists, texts and numbers."
        raise UserError(f"the space is no plain data ({error})", instead=right) from error
    return parse(text, overrides, "space"), "space"


def _ended(begin: Callable[[Interruption], SearchOutcome], options: Settings) -> SearchOutcome:
    """What a search did that came to its end; Ctrl-C is heard while it runs.

    Raises:
        StoppedEarly: it did not come to its end.
        KeyboardInterrupt: Ctrl-C.
    """
    from ktray.cli.search import stop_on_signals
    from ktray.runs.interruption import Interruption

    stopping = Interruption()
    in_main = threading.current_thread() is threading.main_thread()  # nobody else may handle signals
    with stop_on_signals(stopping, options) if in_main else contextlib.nullcontext():
        outcome = begin(stopping)
    if outcome.stopped:
        raise outcome.stopped
    if outcome.interrupted:
        raise KeyboardInterrupt
    return outcome


def run(
    pair: PairSpec | Mapping[str, Any] | str | Path,
    *,
    home: str | Path | None = None,
    only: Sequence[str] = (),
    local: bool = False,
    address: str | None = None,
    concurrent: int = 4,
    overrides: Sequence[str] = (),
    allow_plugins: Sequence[str] = (),
    store: str | None = None,
    runtime: str | Path | None = None,
    talk: Talk = 1,
) -> list[dict[str, Any]]:
    """Compute a pair, or all pairs of an experiment, as `ktray run` does.

    Args:
        pair: a spec, a pair as plain data, or the file of a pair (YAML) or an experiment (Python).
        only: names of the pairs of an experiment that are wanted; none means all.
        local: in this process, without Ray.
        concurrent: pairs at the same time, on Ray.
        home, address, overrides, allow_plugins, store, runtime, talk: as for `search`.

    Returns:
        ``{"name", "keys", "metrics", "computed", "reused", "seconds"}`` per pair, as ``ktray run --json`` prints it.

    Raises:
        UserError: the pair, an argument or the data are wrong.
        StageFailed: the first failure, after all pairs have come to their end.
    """
    from ktray.cli.plan import check_pairs
    from ktray.cli.run import run_here, run_on_ray
    from ktray.cli.spec_files import chosen, load_pairs
    from ktray.pipeline.pair_check import data_loader
    from ktray.search.space import pair_of

    counted(concurrent, "concurrent")
    options = _settings(home, talk, store, None, runtime, allow_plugins)
    pairs: Mapping[str, PairSpec]
    if isinstance(pair, str | Path):
        source, pairs = Path(pair), load_pairs(Path(pair), list(overrides))
    else:
        source, pairs = Path("pair"), {"pair": pair if isinstance(pair, PairSpec) else pair_of(pair, "pair")}
    pairs = chosen(pairs, only)
    check_pairs(pairs, data_loader(), source)
    results = run_here(pairs, options) if local else run_on_ray(pairs, address, concurrent, options)
    for result in results:
        if isinstance(result, StageFailed):
            raise result
    return results


def _settings(
    home: str | Path | None,
    talk: Talk,
    store: str | None = None,
    tracking: str | None = None,
    runtime: str | Path | None = None,
    allow_plugins: Sequence[str] = (),
) -> Settings:
    plugins.allow(list(allow_plugins))
    place = open_home(home)
    url = store or f"file://{place / 'store'}"
    return Settings(place, url, tracking, Path(runtime) if runtime else None, json=False, talks=talk)
