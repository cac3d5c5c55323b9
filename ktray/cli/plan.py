"""Say whether a space, pair or experiment is valid, which of its stages are done, and what the rest would cost."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktray.cli.settings import Settings, settings

if TYPE_CHECKING:
    from ktray.cost_model.forecast import FullSizeStages
    from ktray.pipeline.pair_graph import Graph
    from ktray.search.space import Space
    from ktray.spec import PairSpec

TEACHERS = "different teachers"  # counted like a kind of stage, which not every teacher has
HELP = "valid? what is done, what would run, what it costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("source", type=Path, metavar="SPACE|PAIR|EXPERIMENT")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE", help="change the spec")
    parser.add_argument("--preflight", action="store_true", help="run a few images through every stage on the real cluster")
    parser.add_argument("--address", default=None, help="with --preflight: a running Ray cluster, such as auto")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code.

    Raises:
        UserError: the input is not valid, which --json also says on stdout; or an argument is wrong.
        PreflightFailed: with --preflight: one paragraph with everything that is wrong.
    """
    from ktray.errors import UserError
    from ktray.pipeline.pair_check import data_loader

    options = settings(args)
    options.open_store()  # where that is no store, the input may still be valid
    load = data_loader()
    try:
        answer, rehearsed = _checked(args, load, options)
    except UserError as error:
        if options.json:
            options.answer(_invalid(str(error)), "")
        raise
    if args.preflight:
        expected = {row["stage"]: row["expected"] for row in answer["sharing"]["stages"]}
        answer["preflight"], more = _preflight(rehearsed, load, args.address, options, expected)
        answer["notes"] += more
    options.answer(answer, _text(answer))
    return 0


def _checked(args: argparse.Namespace, load: Any, options: Settings) -> tuple[dict[str, Any], Mapping[str, PairSpec]]:
    """The answer about a valid input, and the pairs that a rehearsal runs.

    Raises:
        UserError: it is not valid.
    """
    from ktray.cli.spec_files import is_space, load_pairs, load_space

    notes: list[str] = []
    shared: list[dict[str, Any]] = []
    draws = 0
    if is_space(args.source):
        space = load_space(args.source, args.overrides)
        check_space(space, load, str(args.source))
        pairs, count = dict(_draws_to_show(space)), space.size()
        draws = min(space.budget.trials, count or space.budget.trials)
        shared, teachers = _shared(space, draws, options)
        notes = _notes(space.warnings(), teachers, draws)
        rehearsed = {label: space.pair(params) for label, params in space.boundary_draws()}
    else:
        pairs = dict(load_pairs(args.source, args.overrides))
        check_pairs(pairs, load, args.source)
        count, rehearsed = len(pairs), pairs
    sharing = {"draws": draws, "stages": shared}
    return {**_plan(pairs, count, options, args.source), "sharing": sharing, "notes": notes}, rehearsed


def _invalid(problem: str) -> dict[str, Any]:
    """The answer about an input that is not valid: all that another one has, and nothing in it."""
    return {
        "valid": False,
        "problem": problem,
        "pairs": None,
        "stages": [],
        "estimate": dict.fromkeys(("seconds", "low", "high", "bytes")),
        "sharing": {"draws": 0, "stages": []},
        "notes": [],
    }


def _preflight(
    pairs: Mapping[str, PairSpec], load: Any, address: str | None, options: Settings, expected: Mapping[str, float]
) -> tuple[dict[str, Any], list[str]]:
    """Rehearse these pairs on the real cluster: what was measured and what is to be expected, and notes on it.

    Args:
        expected: name of a stage -> how many artifacts of it a search needs; {} for all of these pairs.

    Raises:
        PreflightFailed: one paragraph with everything that is wrong.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    from dataclasses import asdict

    from ktray.cli.search import stop_on_signals
    from ktray.pipeline.dry_run_pair import dry_run_stages
    from ktray.pipeline.identity import data_identity
    from ktray.runs.dry_run import dry_run_on
    from ktray.runs.interruption import Interruption
    from ktray.scheduler.resources import load_runtime

    identity, runtime, stopping = data_identity(options.cache), load_runtime(options.runtime), Interruption()
    draws = {name: dry_run_stages(pair, identity) for name, pair in pairs.items()}
    wanted = _wanted(pairs, load, identity, expected)
    options.tell(f"ktray: rehearsing {len(draws)} draws, {len({s.key for stages in draws.values() for s in stages})} stages")
    say = lambda text: options.tell(f"ktray: {text}")  # noqa: E731
    with stop_on_signals(stopping, options):
        found = asdict(dry_run_on(options.home, options.open_store(), address, runtime, draws, wanted, say, stopping))
    return found, found.pop("notes")


def _wanted(pairs: Mapping[str, PairSpec], load: Any, identity: Any, expected: Mapping[str, float]) -> FullSizeStages:
    """The pairs at full size, and how many images their data sets have."""
    from ktray.cost_model.forecast import FullSizeStages
    from ktray.images import parts
    from ktray.pipeline import pair_graph
    from ktray.stages.images_stage import stage_of

    images = {}
    for each in (each for pair in pairs.values() for each in pair_graph.generations(pair)):
        for spec in (getattr(each.data, role) for role in type(each.data).model_fields):
            found = {split: len(rows) for split, (_, rows) in parts(load(spec), spec.split).items()}
            images[stage_of(spec, identity(spec)).key] = (found["train"], sum(found.values()))
    return FullSizeStages({name: pair_graph.build(pair, identity).stages for name, pair in pairs.items()}, images, expected)


def check_pairs(pairs: Mapping[str, PairSpec], load: Any, source: Path) -> None:
    """Check pairs against data and networks.

    Raises:
        UserError: names the file, the pair where there are several, and the dotted path.
    """
    from ktray.errors import UserError
    from ktray.pipeline.pair_check import check_pair

    for name, pair in pairs.items():
        try:
            check_pair(pair, load)
        except UserError as error:
            which = f"{source}: {name}: " if source.suffix == ".py" else f"{source}: "
            raise UserError(error.problem, where=f"{which}{error.where}", instead=error.instead) from error


def check_space(space: Space, load: Any, file: str) -> None:
    """Check every branch at both ends of every range against data and networks.

    Raises:
        UserError: names the file, the dotted path with its branch, and the draw.
    """
    from ktray.errors import UserError
    from ktray.pipeline.pair_check import check_pair

    for label, params in space.boundary_draws():
        try:
            check_pair(space.pair(params), load)
        except UserError as error:
            place = space.place(tuple(error.where.split(".")), params) if error.where else "pair"
            drawn = f" ({label})" if ": " in label else ""  # the first draw of each branch is told by its path
            raise UserError(f"{error.problem}{drawn}", where=f"{file}: {place}", instead=error.instead) from error


def _draws_to_show(space: Space) -> Iterator[tuple[str, PairSpec]]:
    """Draws that show every branch, of teachers, transfers and students, and those that a search begins with."""
    for label, params in space.branch_draws():
        yield label, space.pair(params)
    for index, start in enumerate(space.start_with):
        yield f"start_with[{index}]", space.pair(space.complete(start))


def _shared(space: Space, draws: int, options: Settings) -> tuple[list[dict[str, Any]], float]:
    """Per kind of stage, how many different artifacts the draws can need, and are expected to; and how many teachers."""
    from ktray.errors import UserError
    from ktray.pipeline import pair_graph
    from ktray.pipeline.identity import data_identity
    from ktray.scheduler.resources import STAGES
    from ktray.search.sharing import sharing
    from ktray.search.space_tree import Params

    identity = data_identity(options.cache)

    def keys(params: Params) -> list[tuple[str, str]]:
        try:
            pair = space.pair(params)
            graph = pair_graph.build(pair, identity)
        except UserError:
            return []  # two values that do not go together: such a draw computes nothing
        teacher = [(TEACHERS, _teacher(pair, graph))] if pair.teacher is not None else []
        return [*teacher, *((stage.name, stage.key) for stage in graph.stages)]

    rows = {row.stage: row for row in sharing(space, keys, draws)}
    teachers = rows.pop(TEACHERS, None)
    return [
        {"stage": row.stage, "possible": row.possible, "expected": round(row.expected, 1)}
        for row in sorted(rows.values(), key=lambda row: STAGES.index(row.stage))
    ], teachers.expected if teachers else 0.0


def _teacher(pair: PairSpec, graph: Graph) -> str:
    """What makes a teacher another one: in a chain a student's artifact, and where no stage makes it, its spec on its data."""
    from ktray.fingerprint import fingerprint

    return str(graph.keys.get("teacher") or fingerprint([pair.data.model_dump(), pair.teacher and pair.teacher.model_dump()]))


def _notes(warnings: list[str], teachers: float, draws: int) -> list[str]:
    """Warnings of the space, with what those about teachers would cost."""
    about = any(warning.startswith(("pair.teacher", "pair.data")) for warning in warnings)
    if not (about and teachers):
        return warnings
    return [*warnings, f"expect about {teachers:.0f} different teachers in {draws} random draws"]


def _plan(pairs: Mapping[str, PairSpec], count: int | None, options: Settings, source: Path) -> dict[str, Any]:
    from ktray.pipeline import pair_graph
    from ktray.pipeline.identity import data_identity

    identity = data_identity(options.cache)
    built = [pair_graph.build(pair, identity) for pair in pairs.values()]
    _refuse_absent(dict(zip(pairs, built, strict=True)), options, source)
    return {"valid": True, "problem": None, "pairs": count, **_stages(built, options)}


def _refuse_absent(built: Mapping[str, Graph], options: Settings, source: Path) -> None:
    """Refuse a loaded teacher whose artifact is neither in the store nor made by any of these pairs."""
    from ktray.errors import UserError

    store, made = options.open_store(), {stage.key for graph in built.values() for stage in graph.stages}
    for name, graph in built.items():
        absent = [key for stage in graph.stages for key in stage.inputs.values() if key not in made and not store.find(key)]
        if absent:
            raise UserError(
                f"the artifact {absent[0]} is not in the store {store.url}",
                f"{source}: {f'{name}: ' if len(built) > 1 else ''}teacher.checkpoint",
                "Run the pair that makes it first, or name the store that has it with --store.",
            )


def _stages(built: list[Graph], options: Settings) -> dict[str, Any]:
    from ktray.cost_model.stage_costs import CostModel, sample

    store = options.open_store()
    stages = {stage.key: stage for graph in built for stage in graph.stages}
    shared = {key: sum(any(s.key == key for s in graph.stages) for graph in built) for key in stages}
    done = {key for key in stages if store.find(key)}
    records = sample(store)
    cost = CostModel(records).estimate(stages.values(), made=done)
    seconds, low, high = (None if cost.unknown else round(each, 1) for each in (cost.seconds, cost.low, cost.high))
    rows = [
        {"stage": stage.name, "key": key, "state": "done" if key in done else "run", "shared_by": shared[key]}
        for key, stage in stages.items()
    ]
    return {
        "stages": rows,
        "estimate": {"seconds": seconds, "low": low, "high": high, "bytes": _bytes(rows, list(records.values()))},
    }


def _bytes(rows: list[dict[str, Any]], records: list[Mapping[str, Any]]) -> int:
    """Disk that the missing stages will take, by the mean of earlier artifacts of the same stage; 0 where none is known."""
    sizes: dict[str, list[int]] = {}
    for record in records:
        sizes.setdefault(record["stage"], []).append(sum(entry["size"] for entry in record["files"].values()))
    known = {stage: sum(found) // len(found) for stage, found in sizes.items()}
    return sum(known.get(row["stage"], 0) for row in rows if row["state"] == "run")


def _text(answer: Mapping[str, Any]) -> str:
    from ktray.cli.text_table import table

    rows = [[row["stage"], row["key"], row["state"], str(row["shared_by"])] for row in answer["stages"]]
    missing = sum(row["state"] == "run" for row in answer["stages"])
    cost = _cost(answer["estimate"], "preflight" in answer)
    count = "endlessly many" if answer["pairs"] is None else str(answer["pairs"])
    lines = [
        table(["stage", "key", "state", "shared by"], rows),
        *_rehearsed(answer.get("preflight")),
        "",
        f"valid; {count} pairs. Of the {len(rows)} stages above {missing} would run: {cost}.",
        *_shared_text(answer["sharing"]),
        *(f"note: {note}" for note in answer["notes"]),
    ]
    return "\n".join(lines)


def _rehearsed(found: Mapping[str, Any] | None) -> list[str]:
    from ktray.cli.text_table import table
    from ktray.runs.study_status import span

    if found is None:
        return []
    rows = [
        [
            *(stage, str(entry["runs"]), f"{entry['seconds']:.2f}"),
            *(f"{entry[peak] / 2**20:.0f}" if entry[peak] else "" for peak in ("peak_bytes", "device_peak_bytes")),
            *(f"{entry['expected']:.0f}", span(entry["whole_seconds"]), f"{entry['whole_bytes'] / 2**20:.1f}"),
        ]
        for stage, entry in found["stages"].items()
    ]
    return [
        "",
        table(["rehearsed", "runs", "longest s", "peak MB", "GPU MB", "to expect", "a whole one", "on disk MB"], rows),
        f"{found['nodes']} nodes see the store and have the same versions. The largest pair takes about "
        f"{found['pair_bytes'] / 2**20:.0f} MB of disk, {found['free_bytes'] / 2**20:.0f} MB are free.",
        f"All of it takes roughly {span(found['seconds'])} of work, one stage after the other and each training to its end, "
        f"and {found['bytes'] / 2**30:.1f} GB of disk: scaled from one batch, so rather less.",
    ]


def _cost(estimate: Mapping[str, Any], rehearsed: bool) -> str:
    """What the missing stages take one after the other, in words."""
    from ktray.runs.study_status import span

    if estimate["seconds"] is None:
        return "roughly as forecast above" if rehearsed else "unknown until one of each stage has run here"
    between = f" ({span(estimate['low'])} to {span(estimate['high'])})" if estimate["seconds"] else ""
    return f"about {span(estimate['seconds'])}{between} if one runs after the other"


def _shared_text(sharing: Mapping[str, Any]) -> list[str]:
    """How many different artifacts a search makes for all its draws."""
    if not sharing["stages"]:
        return []
    parts = []
    for row in sharing["stages"]:
        most = "no end" if row["possible"] is None else str(row["possible"])
        parts.append(f"{row['stage']} {row['expected']:.0f} of {most}")
    return [f"{sharing['draws']} random draws would share artifacts; to expect, of all that there can be: {', '.join(parts)}."]
