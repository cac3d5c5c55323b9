"""The verbs as Python functions: `ktray.search(...)`, `ktray.run(...)`, `ktray.load_student(...)`.

They do what the commands do, on the same homes: a search begun here goes on there. Messages go to stderr, errors are raised.

    result = ktray.search("search_spaces/quickstart.yaml", trials=8)
    result = ktray.open("quickstart")       # later, or from another process
    result.best(top=3)
    result.export("my_student")
    model = ktray.load_student("my_student")
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from ktray.errors import StageFailed, UserError
from ktray.export.student_files import load_student as load_student
from ktray.local_path import local_path
from ktray.runs.settings import Settings, make_settings, require_positive
from ktray.spec import PairSpec

if TYPE_CHECKING:
    from pandas import DataFrame

    from ktray.export.student_files import Form, Head
    from ktray.runs.best_trials import Per
    from ktray.runs.interruption import Interruption
    from ktray.runs.search_run import SearchOutcome
    from ktray.search.history import StudySnapshot
    from ktray.search.space import Space

__all__ = ["BestTrial", "PairResult", "SearchResult", "load_student", "open", "run", "search"]

Talk = Literal[0, 1, 2]


class BestTrial(TypedDict):
    """A completed trial, as `SearchResult.best` and ``ktray best NAME --json`` give it.

    Attributes:
        trial: its number.
        params: dotted path -> drawn value.
        metrics: all metrics.
        objectives: metric -> value of what the study optimises.
        keys: stage -> key of its artifact; evaluation -> name -> key.
        cost: ``seconds`` alone, and ``marginal_seconds`` that it added.
        level_with_best: whether the images cannot tell it apart from the best.
        test: its metrics on the test split, where that was asked for.
    """

    trial: int
    params: dict[str, Any]
    metrics: dict[str, float]
    objectives: dict[str, float]
    keys: dict[str, Any]
    cost: dict[str, float]
    level_with_best: bool
    test: NotRequired[dict[str, float]]


class PairResult(TypedDict):
    """A computed pair, as `run` and ``ktray run --json`` give it."""

    name: str
    keys: dict[str, Any]
    metrics: dict[str, float]
    computed: list[str]
    reused: list[str]
    seconds: float


@dataclass(frozen=True)
class SearchResult:
    """What a study on disk has found, whether a search of it runs now or not. Each method reads the study anew.

    Example:
        >>> result = SearchResult(Path("/data/.ktray"), "cifar10-teachers")  # doctest: +SKIP
        >>> result.to_frame().sort_values("knn/top1").tail()  # doctest: +SKIP

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

    def history(self) -> StudySnapshot:
        """Space, objectives and trials.

        Raises:
            UserError: there is no such study.
        """
        from ktray.search.history import read_study

        return read_study(self.home, self.name)

    def best(
        self, top: int | None = None, *, pareto: bool = False, per: Per | None = None, test: bool = False
    ) -> list[BestTrial]:
        """The best completed trials, best first, in the form of ``ktray best NAME --json``.

        Args:
            top: how many at most; None means 10, or 1 with `test`.
            pareto: only those that no other beats in every objective.
            per: only the best one of each "teacher" or "student".
            test: also judge them on the test split, and keep the result: each look at that split makes it worth less.

        Example:
            >>> [row["objectives"] for row in result.best(top=3, per="teacher")]  # doctest: +SKIP

        Raises:
            UserError: there is no such study, or `top` is no whole number from 1.
            StageFailed: an evaluation on the test split failed.
        """
        from ktray.runs.best_trials import best_as_data, best_trials, default_top, judge_on_test
        from ktray.runs.uncertainty import level_with_best

        count, study = default_top(None if top is None else require_positive(top, "top"), test), self.history()
        trials = best_trials(study, pareto, per)[:count]
        level = level_with_best(trials, study.objectives[0][0], self._settings().open_store())
        answers = [BestTrial(**each) for each in best_as_data(trials, level)]  # type: ignore[typeddict-item]
        if test:
            for answer, metrics in zip(answers, judge_on_test(trials, self.name, self._settings()), strict=True):
                answer["test"] = metrics
        return answers

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

    def best_frame(self, top: int | None = None, *, pareto: bool = False, per: Per | None = None) -> DataFrame:
        """The best completed trials as a table, indexed by their numbers: names, objectives, cost, and what they differ in.

        The arguments are those of `best`.
        """
        import pandas

        from ktray.runs.best_trials import best_trials, default_top
        from ktray.search.ranking import component_names, distinguishing_params

        count, study = default_top(None if top is None else require_positive(top, "top"), False), self.history()
        trials = best_trials(study, pareto, per)[:count]
        apart = distinguishing_params(trials)
        columns = ["trial", "teacher", "transfer", "student", *(metric for metric, _ in study.objectives)]
        columns += ["seconds", "added_seconds", "differs_in"]
        rows = [
            [
                *(trial.number, *component_names(trial)),
                *(trial.objectives.get(metric) for metric, _ in study.objectives),
                *(trial.cost.get("seconds"), trial.cost.get("marginal_seconds"), apart.get(trial.number, "")),
            ]
            for trial in trials
        ]
        return pandas.DataFrame(rows, columns=columns).set_index("trial")

    def effects(self) -> DataFrame:
        """The effect of each level of each parameter, with its 95 % interval, as the report draws it.

        Columns: `result` (what is explained), `parameter`, `level`, `trials`, `effect`, `low`, `high`. Empty with fewer than
        five trials.
        """
        import pandas

        from ktray.report.effects import explained_levels

        study = self.history()
        rows = explained_levels(study.trials, study.objectives, study.content.get("early_stop"))
        return pandas.DataFrame(rows, columns=["result", "parameter", "level", "trials", "effect", "low", "high"])

    def _repr_html_(self) -> str:
        """What a notebook shows of it: the result in a sentence, the leaderboard, and its plots."""
        from ktray.runs.study_report import summary_for_notebook

        return summary_for_notebook(self.name, self._settings())

    def report(self, path: str | Path) -> Path:
        """Write the study's HTML report to `path`.

        Raises:
            UserError: there is no such study, or the file cannot be written.
        """
        from ktray.runs.study_report import write_report

        return write_report(self.name, self._settings(), local_path(path, "path"))

    def export(
        self,
        directory: str | Path,
        trial: int | None = None,
        *,
        format: Form = "safetensors",
        head: Head = "none",
        preprocessing: bool = False,
        register: bool = False,
    ) -> list[Path]:
        """Write a trial's student into a new folder, which `load_student` reads; the files.

        Args:
            trial: its number; None for the study's best.
            format: "pt2" and "onnx" add the same network as a program.
            head: "classifier" keeps that of the pseudo-labels.
            preprocessing: the program takes uint8 images of any size.
            register: also as a model in MLflow's registry: ktray-STUDY.

        Raises:
            UserError: no such study or completed trial, the folder is occupied, or the tracker cannot register it.
        """
        from ktray.runs.student_export import export_trial, register_student

        number, settings, folder = "" if trial is None else str(trial), self._settings(), local_path(directory, "directory")
        files = export_trial(settings, self.name, number, folder, head, format, preprocessing)
        if register:
            register_student(settings, self.name, number, folder)
        return files

    def _settings(self) -> Settings:
        return make_settings(self.home, store=self.store, tracking=self.tracking, verbosity=0)


def open(
    study: str, *, home: str | Path | None = None, store: str | Path | None = None, tracking: str | Path | None = None
) -> SearchResult:
    """A study on disk, whether a search of it has ended, runs now or was interrupted.

    Example:
        >>> ktray.open("quickstart").best_frame()  # doctest: +SKIP

    Args:
        home, store, tracking: as for `search`; where they were given there, they are needed here.

    Raises:
        UserError: there is no such study.
    """
    from ktray.search.history import read_study

    settings = make_settings(home, store=_as_url(store), tracking=_as_database(tracking), verbosity=0)
    read_study(settings.home, study)
    return SearchResult(settings.home, study, _as_url(store), _as_database(tracking))


def _as_url(store: str | Path | None) -> str | None:
    return f"file://{local_path(store, 'store').absolute()}" if isinstance(store, Path) else store


def _as_database(tracking: str | Path | None) -> str | None:
    return f"sqlite:///{local_path(tracking, 'tracking').absolute()}" if isinstance(tracking, Path) else tracking


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
    store: str | Path | None = None,
    tracking: str | Path | None = None,
    runtime: str | Path | None = None,
    talk: Talk = 1,
) -> SearchResult:
    """Run a search to its target, or go on with it, as `ktray search` does.

    Example:
        >>> result = ktray.search("search_spaces/quickstart.yaml", trials=8)  # doctest: +SKIP
        >>> result = ktray.search("search_spaces/quickstart.yaml", trials="+8")  # doctest: +SKIP

    Args:
        space: as plain data, or its YAML file.
        home: None means KTRAY_HOME, or `./.ktray`.
        name: of the study; None for the space's. The same name resumes.
        trials: target, such as 50 or ``"+50"``; None for the space's budget.
        concurrent: trials at the same time, 64 at most; None for the space's budget.
        warm_start: another study of this home, whose results the sampler learns from.
        address: of a running Ray cluster; None starts Ray on this machine.
        share_images: send cluster sheets to a remote tracker, too.
        retry: draw the pairs of failed trials again, as new trials.
        overrides: such as ``["transfer.k=500"]``.
        allow_plugins: packages whose kinds may load, such as ``["my_lab"]``; they stay allowed in this process.
        store: where artifacts live, such as ``file:///mnt/shared/store`` or a Path; None for the home's own.
        tracking: MLflow URI, or a sqlite file's Path; None means MLFLOW_TRACKING_URI, or else the home's own database.
        runtime: file with resources per stage kind.
        talk: 0 errors only, 1 trials, 2 stages as well; on stderr.

    Raises:
        UserError: the space, an argument or the data are wrong.
        PreflightFailed: Ray, the store or the disk cannot carry the search.
        SearchStopped: a full disk, or ten failures in a row; the same call goes on.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    from ktray.runs import search_run
    from ktray.runs.search_run import SearchOptions

    space = local_path(space, "space") if isinstance(space, str | Path) else space  # before the home is made
    store, tracking = _as_url(store), _as_database(tracking)
    plugins = list(allow_plugins)
    settings = make_settings(home, store=store, tracking=tracking, runtime=runtime, allow_plugins=plugins, verbosity=talk)
    parsed, source = _parse_space(space, list(overrides))
    options = SearchOptions(name, None if trials is None else str(trials), concurrent, warm_start, address, share_images, retry)
    outcome = _until_end(lambda interruption: search_run.search(parsed, source, options, settings, interruption), settings)
    if gap := search_run.unwritten_events(outcome, settings):
        settings.print_info(f"ktray: {gap}")
    return SearchResult(settings.home, outcome.study, store, tracking)


def _parse_space(space: Mapping[str, Any] | str | Path, overrides: list[str]) -> tuple[Space, str]:
    """A space and what errors call it: its file, or "space" for plain data.

    Raises:
        UserError: it is neither a file's name nor plain data, or no space.
    """
    from ktray.runs.spec_files import load_space
    from ktray.search.space import parse

    if isinstance(space, str | Path):
        return load_space(Path(space), overrides), str(space)
    return parse(_as_yaml(space, "space"), overrides, "space"), "space"


def _as_yaml(content: Any, what: str) -> str:
    """Plain data as the text of a file, so that files and data have the same limits and errors."""
    try:
        return json.dumps(content, allow_nan=False)  # JSON is YAML
    except (TypeError, ValueError, RecursionError) as error:
        instead = "Give a YAML file's name, or what it would hold: dicts, lists, texts and numbers."
        raise UserError(f"the {what} is no plain data ({error})", instead=instead) from error


def _until_end(start: Callable[[Interruption], SearchOutcome], settings: Settings) -> SearchOutcome:
    """The outcome of a search that came to its end; Ctrl-C interrupts it in order.

    Raises:
        SearchStopped: it did not come to its end.
        KeyboardInterrupt: Ctrl-C.
    """
    from ktray.runs.interruption import Interruption, stop_on_signals

    interruption = Interruption()
    in_main_thread = threading.current_thread() is threading.main_thread()  # signal handlers can be set only there
    with stop_on_signals(interruption, settings.print_info) if in_main_thread else contextlib.nullcontext():
        outcome = start(interruption)
    if outcome.stopped:
        raise outcome.stopped
    if outcome.interrupted:
        raise KeyboardInterrupt
    return outcome


def _pair_of(pair: PairSpec | Mapping[str, Any], overrides: list[str]) -> PairSpec:
    from ktray.search import space, space_file

    if not isinstance(pair, PairSpec):
        return space.parse_pair(space_file.parse_content(_as_yaml(pair, "pair"), overrides, "pair"), "pair")
    if overrides:
        raise UserError("overrides change files and plain data, and this is a PairSpec", "pair", "Change the spec itself.")
    return pair


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
    store: str | Path | None = None,
    runtime: str | Path | None = None,
    talk: Talk = 1,
) -> list[PairResult]:
    """Compute a pair, or all pairs of an experiment, as `ktray run` does.

    Example:
        >>> ktray.run("experiments/baselines.py", only=["random student 0"], local=True)[0]["metrics"]  # doctest: +SKIP

    Args:
        pair: a spec, a pair as plain data, or the file of a pair (YAML) or an experiment (Python).
        only: names of pairs of an experiment; none means all.
        local: in this process, without Ray.
        concurrent: pairs at the same time, on Ray.
        home, address, overrides, allow_plugins, store, runtime, talk: as for `search`.

    Returns:
        One result per pair, as ``ktray run --json`` prints it.

    Raises:
        UserError: the pair, an argument or the data are wrong.
        StageFailed: the first failure, after all pairs have come to their end.
    """
    from ktray.pipeline.pair_check import data_loader
    from ktray.runs.pair_run import run_here, run_on_ray
    from ktray.runs.plan import check_pairs
    from ktray.runs.spec_files import load_pairs, select_pairs

    require_positive(concurrent, "concurrent")
    if isinstance(pair, str | Path):
        pair = local_path(pair, "pair")  # before the home is made
    settings = make_settings(home, store=_as_url(store), runtime=runtime, allow_plugins=list(allow_plugins), verbosity=talk)
    pairs: Mapping[str, PairSpec]
    if isinstance(pair, Path):
        source, pairs = pair, load_pairs(pair, list(overrides))
    else:
        source, pairs = Path("pair"), {"pair": _pair_of(pair, list(overrides))}
    pairs = select_pairs(pairs, only)
    for sentence in check_pairs(pairs, data_loader(), source):
        settings.print_info(f"ktray: {sentence}")
    results = run_here(pairs, settings) if local else run_on_ray(pairs, address, concurrent, settings)
    finished: list[PairResult] = []
    for result in results:
        if isinstance(result, StageFailed):
            raise result
        finished.append(PairResult(**result.as_data()))  # type: ignore[typeddict-item]
    return finished
