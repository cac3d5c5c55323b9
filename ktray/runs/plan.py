"""Whether a space, pair or experiment is valid, which of its stages are done, and what the rest would cost.

`count_shared_stages` counts the different artifacts that the draws of a space can need, and estimates how many they will.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktray.errors import UserError
from ktray.runs.data_check import notes_about
from ktray.runs.settings import Settings

if TYPE_CHECKING:
    from ktray.cost_model.dry_run_forecast import FullSizeStages
    from ktray.pipeline.pair_check import Load
    from ktray.pipeline.pair_graph import Graph, Identity
    from ktray.runs.interruption import Interruption
    from ktray.search.space import Space
    from ktray.spec import PairSpec
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable

from ktray.search import space_tree
from ktray.search.space import MAX_BRANCH_COMBINATIONS, Space
from ktray.search.space_tree import Parameter, Params
from ktray.text import counted

Keys = Callable[[Params], Iterable[tuple[str, str]]]
"""Parameters of a draw -> (name, key) of its stages in the order in which they run; empty if it is no valid pair."""

Occurrence = tuple[str, int]
"""Name of a stage, and number of stages of this name before it: in a chain of pairs each generation has its own features."""


@dataclass(frozen=True)
class _ArtifactCount:
    """Numbers of artifacts of one kind of stage.

    Attributes:
        stage: name of the kind.
        possible: different artifacts that draws can need, counted up to `space_tree.MAX_SIZE`; None if infinitely many.
        expected: different artifacts that random draws need on average.
    """

    stage: str
    possible: int | None
    expected: float


def count_shared_stages(space: Space, keys: Keys, draws: int) -> list[_ArtifactCount]:
    """One row per kind of stage, in the order in which stages run.

    Changes one parameter at a time in each branch: a kind has as many artifacts as there are combinations of the parameters
    that change its key. The expectation is for random draws; the draws of a sampler share more.

    Args:
        draws: number of draws of the search.
    """
    branches = list(
        itertools.islice(
            space_tree.combinations(space.root, lambda parameter: space_tree.values_to_check(parameter)[:1]),
            MAX_BRANCH_COMBINATIONS,
        )
    )
    parameters = {parameter.name: parameter for parameter, _ in space_tree.parameters_with_conditions(space.root)}
    groups: dict[tuple[str, str, frozenset[str]], float] = {}
    for base in branches:
        own, dependencies = _dependencies(base, parameters, keys)
        for occurrence, key in own.items():
            group = (occurrence[0], key, frozenset(dependencies[occurrence]))
            groups[group] = groups.get(group, 0.0) + draws / len(branches)
    return _rows(groups, parameters)


def _dependencies(
    base: Params, parameters: Mapping[str, Parameter], keys: Keys
) -> tuple[dict[Occurrence, str], dict[Occurrence, set[str]]]:
    """Stage -> its key for the draw `base`; stage -> the parameters that change this key."""
    own = _by_occurrence(keys(base))
    dependencies: dict[Occurrence, set[str]] = {occurrence: set() for occurrence in own}
    for name in (name for name in base if not space_tree.chooses_branch(parameters[name])):
        for value in space_tree.values_to_check(parameters[name])[1:]:
            changed = _by_occurrence(keys({**base, name: value}))
            for stage in own if changed else ():
                if changed.get(stage) != own[stage]:
                    dependencies[stage].add(name)
    return own, dependencies


def _by_occurrence(stages: Iterable[tuple[str, str]]) -> dict[Occurrence, str]:
    seen: Counter[str] = Counter()
    found: dict[Occurrence, str] = {}
    for name, key in stages:
        found[name, seen[name]] = key
        seen[name] += 1
    return found


def _rows(groups: Mapping[tuple[str, str, frozenset[str]], float], parameters: Mapping[str, Parameter]) -> list[_ArtifactCount]:
    rows: dict[str, _ArtifactCount] = {}
    for (name, _, dependencies), draws in groups.items():
        values = [space_tree.all_values(parameters[each]) for each in dependencies]
        sizes = [len(each) for each in values if each is not None]
        infinite = len(sizes) < len(values)
        combinations = min(math.prod(sizes), space_tree.MAX_SIZE)
        expected = draws if infinite else _distinct(combinations, draws)
        before = rows.get(name, _ArtifactCount(name, 0, 0.0))
        possible = None if infinite or before.possible is None else min(before.possible + combinations, space_tree.MAX_SIZE)
        rows[name] = _ArtifactCount(name, possible, before.expected + min(expected, draws))
    return list(rows.values())


def _distinct(combinations: int, draws: float) -> float:
    """Expected number of different combinations among `draws` draws, if all combinations are equally likely."""
    if combinations == 1:
        return 1.0
    return -combinations * math.expm1(draws * math.log1p(-1 / combinations))


TEACHERS = "different teachers"  # counted as if it were a kind of stage, which not every teacher has


@dataclass(frozen=True)
class _Plan:
    """What is known of a valid input before anything runs.

    Attributes:
        answer: its stable machine-readable form, as ``ktray plan --json`` prints it.
        pairs: name -> pair; of a space, draws that cover every branch at both ends of every range.
        evaluations: key -> name of each evaluation in the answer, by which its metrics are known.
    """

    answer: dict[str, Any]
    pairs: Mapping[str, PairSpec]
    evaluations: Mapping[str, str]

    def artifacts_expected(self) -> dict[str, float]:
        """Stage -> how many artifacts of it a search is expected to need; empty where there is no search."""
        return {row["stage"]: row["expected"] for row in self.answer["sharing"]["stages"]}


def make_plan(source: Path, overrides: list[str], load: Load, settings: Settings) -> _Plan:
    """Check a space, a pair or an experiment, and look up what of it is done.

    Raises:
        UserError: it is not valid.
    """
    from ktray.pipeline.identity import data_identity
    from ktray.runs.spec_files import is_space, load_pairs, load_space

    if not is_space(source):
        pairs = dict(load_pairs(source, overrides))
        assumed = check_pairs(pairs, load, source)
        graphs = _graphs(pairs, settings)
        return _Plan(_answer(graphs, len(pairs), settings, source, _sharing(0, []), assumed), pairs, _evaluation_names(graphs))
    space = load_space(source, overrides)
    assumed = check_space(space, load, str(source))
    size = space.draw_count()
    draws = min(space.budget.trials, size or space.budget.trials)
    stages, teachers = _shared_stages(space, draws, data_identity(settings.cache))
    graphs = _graphs(dict(_draws_to_show(space)), settings)
    notes = [*_notes(space.sharing_warnings(), teachers, draws), *_note_of_partial_count(space), *assumed]
    answer = _answer(graphs, size, settings, source, _sharing(draws, stages), notes)
    answer["search"] = _search_estimate(space, graphs.values(), stages, draws, settings)
    pairs = {label: space.pair(params) for label, params in space.boundary_draws()}
    return _Plan(answer, pairs, _evaluation_names(graphs))


def invalid_answer(problem: str) -> dict[str, Any]:
    """The answer about an input that is not valid: the same fields as for a valid one, all empty."""
    return {
        "valid": False,
        "problem": problem,
        "pairs": None,
        "stages": [],
        "estimate": dict.fromkeys(("seconds", "low", "high", "bytes")),
        "sharing": _sharing(0, []),
        "notes": [],
        "search": None,
    }


def dry_run_plan(
    plan: _Plan, load: Load, address: str | None, settings: Settings, interruption: Interruption
) -> tuple[dict[str, Any], list[str]]:
    """Run a few images through every stage of a plan on the real cluster: what was measured and is to be expected, and notes.

    Raises:
        PreflightFailed: one paragraph with everything that is wrong.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP.
    """
    from ktray.pipeline.identity import data_identity
    from ktray.runs.dry_run import dry_run_on, dry_run_stages
    from ktray.runs.interruption import stop_on_signals
    from ktray.scheduler.resources import load_runtime_settings

    identity, runtime = data_identity(settings.cache), load_runtime_settings(settings.runtime)
    draws = {name: dry_run_stages(pair, identity) for name, pair in plan.pairs.items()}
    full_size = _full_size_stages(plan, load, identity)
    stages = {stage.key for of_draw in draws.values() for stage in of_draw}

    def inform(text: str) -> None:
        settings.print_info(f"ktray: {text}")

    inform(f"dry run of {counted(len(draws), 'draw')}, {counted(len(stages), 'stage')}")
    with stop_on_signals(interruption, settings.print_info):
        found = asdict(
            dry_run_on(settings.home, settings.open_store(), address, runtime, draws, full_size, inform, interruption)
        )
    return found, found.pop("notes")


def _full_size_stages(plan: _Plan, load: Load, identity: Identity) -> FullSizeStages:
    """The stages of the plan's pairs at full size, and how many images their data sets have."""
    from ktray.cost_model.dry_run_forecast import FullSizeStages
    from ktray.images import split_rows
    from ktray.pipeline import pair_graph
    from ktray.spec import teachers_of
    from ktray.stages.images_stage import stage_of

    images = {}
    for generation in (each for pair in plan.pairs.values() for each in pair_graph.generations(pair)):
        for spec in (getattr(generation.data, role) for role in type(generation.data).model_fields):
            found = {split: len(rows) for split, (_, rows) in split_rows(load(spec), spec.split).items()}
            for own in (None, *map(pair_graph.own_crop_of, teachers_of(generation))):
                images[stage_of(spec, identity(spec), own).key] = (found["train"], sum(found.values()))
    stages = {name: pair_graph.build(pair, identity).stages for name, pair in plan.pairs.items()}
    return FullSizeStages(stages, images, plan.artifacts_expected())


def check_pairs(pairs: Mapping[str, PairSpec], load: Load, source: Path) -> list[str]:
    """Check pairs against data and networks; returns what was assumed and what looks wrong, each once, as sentences.

    Raises:
        UserError: names the file, the pair where there are several, and the dotted path.
    """
    from ktray.pipeline.pair_check import check_pair

    assumed: dict[str, None] = {}
    for name, pair in pairs.items():
        try:
            assumed |= dict.fromkeys(check_pair(pair, load))
        except UserError as error:
            which = f"{source}: {name}: " if source.suffix == ".py" else f"{source}: "
            raise UserError(error.problem, where=f"{which}{error.where}", instead=error.instead) from error
    return [*assumed, *notes_about(pairs.values(), load)]


def check_space(space: Space, load: Load, source: str) -> list[str]:
    """Check every branch at both ends of every range against data and networks; returns what was assumed, as `check_pairs`.

    Args:
        source: what errors call the space, such as its file.

    Raises:
        UserError: names the source, the dotted path with its branch, and the draw.
    """
    from ktray.pipeline.pair_check import check_pair

    assumed: dict[str, None] = {}
    for label, params in space.boundary_draws():
        try:
            assumed |= dict.fromkeys(check_pair(space.pair(params), load))
        except UserError as error:
            path = space.path_in_file(tuple(error.where.split(".")), params) if error.where else "pair"
            draw = f" ({label})" if ": " in label else ""  # the path alone identifies the first draw of each branch
            raise UserError(f"{error.problem}{draw}", where=f"{source}: {path}", instead=error.instead) from error
    return [*assumed, *notes_about((space.pair(params) for _, params in space.boundary_draws()), load)]


def _draws_to_show(space: Space) -> Iterator[tuple[str, PairSpec]]:
    """Draws that show every branch, of teachers, transfers and students, and those that a search begins with."""
    for label, params in space.branch_draws():
        yield label, space.pair(params)
    for index, start in enumerate(space.start_with):
        yield f"start_with[{index}]", space.pair(space.fill_with_first_values(start))


def expected_artifacts(space: Space, draws: int, identity: Identity) -> dict[str, float]:
    """Stage -> how many different artifacts of it random draws need on average."""
    return {row.stage: row.expected for row in _shared_stages(space, draws, identity)[0]}


def _shared_stages(space: Space, draws: int, identity: Identity) -> tuple[list[_ArtifactCount], float]:
    """Per kind of stage, how many artifacts all draws together need; and how many different teachers to expect."""
    from ktray.pipeline import pair_graph
    from ktray.scheduler.resources import STAGES

    def keys(params: Params) -> list[tuple[str, str]]:
        try:
            pair = space.pair(params)
            graph = pair_graph.build(pair, identity)
        except UserError:
            return []  # two values that do not go together: such a draw computes nothing
        teacher = [(TEACHERS, _teacher_identity(pair, graph))] if pair.teacher is not None else []
        return [*teacher, *((stage.name, stage.key) for stage in graph.stages)]

    rows = {row.stage: row for row in count_shared_stages(space, keys, draws)}
    teachers = rows.pop(TEACHERS, None)
    return sorted(rows.values(), key=lambda row: STAGES.index(row.stage)), teachers.expected if teachers else 0.0


def _teacher_identity(pair: PairSpec, graph: Graph) -> str:
    """Equal for equal teachers: the key of the artifact, or a hash of data and spec where no stage makes the teacher."""
    from ktray.fingerprint import fingerprint
    from ktray.spec import SeveralTeachers

    one_stage = None if isinstance(pair.teacher, SeveralTeachers) else graph.keys.get("teacher")
    return str(one_stage or fingerprint([pair.data.model_dump(), pair.teacher and pair.teacher.model_dump()]))


def _sharing(draws: int, stages: Sequence[_ArtifactCount]) -> dict[str, Any]:
    rows = [{"stage": row.stage, "possible": row.possible, "expected": round(row.expected, 1)} for row in stages]
    return {"draws": draws, "stages": rows}


def _notes(warnings: list[str], teachers: float, draws: int) -> list[str]:
    """Warnings of the space; if one is about teachers, also how many of them to expect."""
    about_teachers = any(warning.startswith(("pair.teacher", "pair.data")) for warning in warnings)
    if not (about_teachers and teachers):
        return warnings
    return [*warnings, f"expect about {counted(round(teachers), 'different teacher')} in {counted(draws, 'random draw')}"]


def _note_of_partial_count(space: Space) -> list[str]:
    combinations = space_tree.combinations(space.root, lambda parameter: space_tree.values_to_check(parameter)[:1])
    if next(itertools.islice(combinations, MAX_BRANCH_COMBINATIONS, None), None) is None:
        return []
    return [f"the numbers of artifacts are those of the first {MAX_BRANCH_COMBINATIONS} combinations of branches"]


def _search_estimate(
    space: Space, graphs: Iterable[Graph], expected: Sequence[_ArtifactCount], draws: int, settings: Settings
) -> dict[str, Any]:
    """How far a space's study is, and what the rest of its search takes on this machine by the store's records.

    `trials` is the target, `done` how many have ended; `seconds`, `low`, `high` of wall time are None if a kind of stage
    has no record in the store.
    """
    from ktray.cost_model.stage_costs import CostModel, sample_records
    from ktray.runs.machine import cores
    from ktray.runs.search_forecast import shares_of_training, wall_seconds

    target, done = _progress(space, draws, settings)
    found: dict[str, Any] = {"trials": target, "done": done, "seconds": None, "low": None, "high": None, "bytes": 0}
    if done >= target:
        return found | {"seconds": 0.0, "low": 0.0, "high": 0.0}
    records = sample_records(settings.open_store())
    model, left = CostModel(records), (target - done) / target
    stages = {stage.key: stage for graph in graphs for stage in graph.stages}
    seconds = model.predict(stages.values())
    shares, work, size = shares_of_training(space), 0.0, 0.0
    for row in expected:
        of_kind = [value for key, value in seconds.items() if stages[key].name == row.stage]
        if not of_kind or not model.has_records(row.stage):
            return found
        work += row.expected * shares.get(row.stage, 1.0) * sum(of_kind) / len(of_kind)
        size += row.expected * _expected_bytes([row.stage], list(records.values()))
    wall = (round(each, 1) for each in wall_seconds(left * work, space, cores()))
    return found | dict(zip(("seconds", "low", "high"), wall, strict=True)) | {"bytes": round(left * size)}


def _progress(space: Space, draws: int, settings: Settings) -> tuple[int, int]:
    """The target of a space's study and how many of its trials have ended; of another space under its name, nothing counts."""
    from ktray.search.history import read_study
    from ktray.search.journal import study_names

    if space.study_name not in study_names(settings.home):
        return draws, 0
    try:
        study = read_study(settings.home, space.study_name)
        if space.differences(study.space.document.model_dump(mode="json")):
            return draws, 0
    except UserError:  # never begun, or damaged, which a search will say
        return draws, 0
    ended = sum(trial.state in ("completed", "pruned", "failed") for trial in study.trials)
    target = study.target if study.space.budget.trials == space.budget.trials else draws
    return target, min(ended, target)


def _graphs(pairs: Mapping[str, PairSpec], settings: Settings) -> dict[str, Graph]:
    from ktray.pipeline import pair_graph
    from ktray.pipeline.identity import data_identity

    identity = data_identity(settings.cache)
    return {name: pair_graph.build(pair, identity) for name, pair in pairs.items()}


def _evaluation_names(graphs: Mapping[str, Graph]) -> dict[str, str]:
    """Key -> name of every evaluation; where pairs give one evaluation different names, the first."""
    found: dict[str, str] = {}
    for graph in graphs.values():
        for name, key in graph.keys.get("evaluation", {}).items():
            found.setdefault(key, name)
    return found


def _answer(
    graphs: Mapping[str, Graph],
    count: int | None,
    settings: Settings,
    source: Path,
    sharing: dict[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    _check_artifacts(graphs, settings, source)
    valid = {"valid": True, "problem": None, "pairs": count}
    return {**valid, **stages_and_estimate(list(graphs.values()), settings), "sharing": sharing, "notes": notes, "search": None}


def _check_artifacts(graphs: Mapping[str, Graph], settings: Settings, source: Path) -> None:
    """Refuse a loaded teacher whose artifact is neither in the store nor made by these pairs, or has another architecture."""
    from ktray import plugins
    from ktray.training.pretrained import check_weights, shapes

    store, made = settings.open_store(), {stage.key for graph in graphs.values() for stage in graph.stages}
    for name, graph in graphs.items():
        absent = [key for stage in graph.stages for key in stage.inputs.values() if key not in made and not store.find(key)]
        where = f"{source}: {f'{name}: ' if len(graphs) > 1 else ''}teacher.checkpoint"
        if absent:
            raise UserError(
                f"the artifact {absent[0]} is not in the store {store.url}",
                where,
                "Run the pair that makes it first, or name the store that has it with --store.",
            )
        for stage in graph.stages:
            teacher = store.find(stage.inputs.get("snapshot", ""))
            if teacher:
                try:
                    check_weights(shapes(plugins.parse("backbone", stage.spec["backbone"])), teacher.directory)
                except UserError as error:
                    raise UserError(error.problem, where, error.instead) from error


def stages_and_estimate(graphs: Sequence[Graph], settings: Settings) -> dict[str, Any]:
    """Each stage of these graphs with its state, and what the missing ones would cost."""
    from ktray.cost_model.stage_costs import CostModel, sample_records

    store = settings.open_store()
    stages = {stage.key: stage for graph in graphs for stage in graph.stages}
    shared = {key: sum(any(stage.key == key for stage in graph.stages) for graph in graphs) for key in stages}
    done = {key for key in stages if store.find(key)}
    records = sample_records(store)
    cost = CostModel(records).estimate(stages.values(), made=done)
    seconds, low, high = (None if cost.unknown else round(value, 1) for value in (cost.seconds, cost.low, cost.high))
    rows = [
        {"stage": stage.name, "key": key, "state": "done" if key in done else "run", "shared_by": shared[key]}
        for key, stage in stages.items()
    ]
    missing = [row["stage"] for row in rows if row["state"] == "run"]
    size = _expected_bytes([str(stage) for stage in missing], list(records.values()))
    return {"stages": rows, "estimate": {"seconds": seconds, "low": low, "high": high, "bytes": size}}


def _expected_bytes(stages: Sequence[str], records: Sequence[Mapping[str, Any]]) -> int:
    """Disk that these stages will take, by the mean of earlier artifacts of the same stage; 0 where none is known."""
    sizes: dict[str, list[int]] = {}
    for record in records:
        sizes.setdefault(record["stage"], []).append(sum(entry["size"] for entry in record["files"].values()))
    means = {stage: sum(found) // len(found) for stage, found in sizes.items()}
    return sum(means.get(stage, 0) for stage in stages)
