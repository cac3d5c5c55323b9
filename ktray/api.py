"""The verbs as Python functions: `ktray.search(...)`, `ktray.run(...)`, `ktray.load_student(...)`.

They do what the commands do, on the same homes: a search begun here goes on there. Talk goes to stderr, errors are raised.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ktray.cli.settings import Settings, counted, open_home
from ktray.errors import StageFailed
from ktray.export import load_student as load_student
from ktray.spec import PairSpec

if TYPE_CHECKING:
    from pandas import DataFrame

    from ktray.drivers.search import Outcome
    from ktray.search.history import History
    from ktray.stores import Store

Talk = Literal[0, 1, 2]


@dataclass(frozen=True)
class Study:
    """A study on disk, whether a search of it runs now or not; what is asked is read anew each time.

    Attributes:
        home: absolute path of the home that holds it.
        name: the study's name.
        store: where its artifacts are, such as ``file:///mnt/shared/store``; None for the home's own.
    """

    home: Path
    name: str
    store: str | None = None

    def history(self) -> History:
        """Space, objectives and trials.

        Raises:
            UserError: there is no such study.
        """
        from ktray.search.history import read

        return read(self.home, self.name)

    def best(self, top: int = 10) -> list[dict[str, Any]]:
        """The best completed trials, best first, in the form of ``ktray best NAME --json``."""
        from ktray.cli.leaderboard import trial_answer
        from ktray.search import ranking

        study = self.history()
        return [trial_answer(trial) for trial in ranking.ranked(study.trials, study.objectives)[:top]]

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

        return write_report(self.name, self.home, self._opened(), Path(path))

    def export(
        self, directory: str | Path, trial: int | None = None, form: Literal["safetensors", "pt2", "onnx"] = "safetensors"
    ) -> list[Path]:
        """Write a trial's student (None: that of the best one) into a new folder; `load_student` reads it.

        "pt2" and "onnx" add the same network as a program.

        Raises:
            UserError: no such study or completed trial, or the folder is occupied.
        """
        from ktray.cli.export import write_student

        number = "" if trial is None else str(trial)
        return write_student(self.home, self._opened(), self.name, number, Path(directory), "none", form)

    def _opened(self) -> Store:
        return _settings(self.home, 0, store=self.store).open_store()


def search(
    space: str | Path,
    *,
    home: str | Path | None = None,
    name: str | None = None,
    trials: int | str | None = None,
    concurrent: int | None = None,
    warm_start: str | None = None,
    address: str | None = None,
    overrides: Sequence[str] = (),
    store: str | None = None,
    tracking: str | None = None,
    runtime: str | Path | None = None,
    talk: Talk = 1,
) -> Study:
    """Run a search to its target, or go on with it, as `ktray search` does.

    Args:
        space: YAML file.
        home: None means KTRAY_HOME, or `./.ktray`.
        name: of the study; None for the space's. The same name goes on.
        trials: target, such as 50 or ``"+50"``; None for the space's budget.
        concurrent: trials at the same time; None for the space's budget.
        warm_start: another study of this home, whose results the sampler learns from.
        address: of a running Ray cluster; None starts Ray on this machine.
        overrides: such as ``["transfer.k=500"]``.
        store: where artifacts live, such as ``file:///mnt/shared/store``; None for the home's own.
        tracking: MLflow URI; None for the home's own.
        runtime: file with resources per stage kind.
        talk: 0 errors only, 1 news of trials, 2 stages as well; on stderr.

    Raises:
        UserError: the space, an argument or the data are wrong.
        PreflightFailed: Ray, the store or the disk cannot carry the search.
        StoppedEarly: a full disk, or ten failures in a row; the same call goes on.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    if concurrent is not None:
        counted(concurrent, "concurrent")
    args = argparse.Namespace(
        space=Path(space),
        overrides=list(overrides),
        name=name,
        trials=None if trials is None else str(trials),
        concurrent=concurrent,
        warm_start=warm_start,
        address=address,
        share_images=False,
    )
    options = _settings(home, talk, store, tracking, runtime)
    return Study(options.home, _searched(args, options).study, store)


def _searched(args: argparse.Namespace, options: Settings) -> Outcome:
    from ktray.cli.search import search as searched
    from ktray.cli.search import stop_on_signals
    from ktray.drivers.stopping import Stopping

    stopping = Stopping()
    in_main = threading.current_thread() is threading.main_thread()  # nobody else may handle signals
    with stop_on_signals(stopping, options) if in_main else contextlib.nullcontext():
        outcome, _ = searched(args, options, stopping)
    if outcome.stopped:
        raise outcome.stopped
    if outcome.interrupted:
        raise KeyboardInterrupt
    return outcome


def run(
    pair: PairSpec | Mapping[str, Any] | str | Path,
    *,
    home: str | Path | None = None,
    local: bool = False,
    address: str | None = None,
    concurrent: int = 4,
    overrides: Sequence[str] = (),
    store: str | None = None,
    runtime: str | Path | None = None,
    talk: Talk = 1,
) -> list[dict[str, Any]]:
    """Compute a pair, or all pairs of an experiment, as `ktray run` does.

    Args:
        pair: a spec, a pair as plain data, or the file of a pair (YAML) or an experiment (Python).
        local: in this process, without Ray.
        concurrent: pairs at the same time, on Ray.
        home, address, overrides, store, runtime, talk: as for `search`.

    Returns:
        ``{"name", "keys", "metrics", "computed", "reused", "seconds"}`` per pair, as ``ktray run --json`` prints it.

    Raises:
        UserError: the pair, an argument or the data are wrong.
        StageFailed: the first failure, after all pairs have come to their end.
    """
    from ktray.cli.plan import check_pairs
    from ktray.cli.run import run_here, run_on_ray
    from ktray.cli.source import load_pairs
    from ktray.pipeline.check import data_loader
    from ktray.search.space import pair_of

    counted(concurrent, "concurrent")
    options = _settings(home, talk, store, None, runtime)
    pairs: Mapping[str, PairSpec]
    if isinstance(pair, str | Path):
        source, pairs = Path(pair), load_pairs(Path(pair), list(overrides))
    else:
        source, pairs = Path("pair"), {"pair": pair if isinstance(pair, PairSpec) else pair_of(pair, "pair")}
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
) -> Settings:
    place = open_home(home)
    url = store or f"file://{place / 'store'}"
    return Settings(place, url, tracking, Path(runtime) if runtime else None, json=False, talks=talk)
