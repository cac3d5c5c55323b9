"""Say whether a space, pair or experiment is valid, which of its stages are done, and what the rest would cost."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ktray.cli.terminal import exit_at_once, path_argument, print_result, settings_of
from ktray.text import counted

HELP = "valid? what is done, what would run, what it costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("source", type=path_argument, metavar="SPACE|PAIR|EXPERIMENT")
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
    from ktray.runs.interruption import Interruption
    from ktray.runs.plan import dry_run_plan, invalid_answer, make_plan

    settings = settings_of(args)
    settings.open_store()  # a store that cannot be opened is an error of its own, not one of the input
    load = data_loader()
    try:
        plan = make_plan(args.source, args.overrides, load, settings)
    except UserError as error:
        if args.json:
            print_result(args, invalid_answer(str(error)), "")
        raise
    answer = dict(plan.answer)
    if args.preflight:
        interruption = Interruption((lambda: exit_at_once(interruption, args)) if args.is_program else None)
        answer["preflight"], notes = dry_run_plan(plan, load, args.address, settings, interruption)
        answer["notes"] = [*answer["notes"], *notes]
    print_result(args, answer, _text(answer, plan.evaluations, args.verbose > 0))
    return 0


def _text(answer: Mapping[str, Any], evaluations: Mapping[str, str], verbose: bool) -> str:
    """The plan for people: the answer first, and with -v each stage.

    Args:
        evaluations: key -> name of each evaluation.
    """
    from ktray.cli.terminal import table

    lines = [
        *_search_text(answer["search"], "preflight" in answer),
        f"Valid: {_pair_count(answer['pairs'])}. {_to_run(answer)}".rstrip(),
        *(f"note: {note}" for note in answer["notes"]),
        *_dry_run_text(answer.get("preflight")),
    ]
    if verbose:
        rows = [[_stage_label(row, evaluations), row["key"], row["state"], str(row["shared_by"])] for row in answer["stages"]]
        lines += ["", table(["stage", "key", "state", "shared by"], rows), "", *_sharing_text(answer["sharing"])]
    return "\n".join(lines)


def _search_text(search: Mapping[str, Any] | None, dry_run: bool) -> list[str]:
    """``14 of 14 trials done, nothing to compute``, ``14 trials: about 3 min (2 min to 5 min), 70 MB``."""
    from ktray.runs.study_status import span

    if search is None:
        return []
    trials, done = search["trials"], search["done"]
    if done >= trials:
        return [f"{done} of {counted(trials, 'trial')} done, nothing to compute"]
    what = f"{done} of {counted(trials, 'trial')} done; the rest" if done else counted(trials, "trial")
    if search["seconds"] is None:
        how = "the forecast is below" if dry_run else "ktray plan --preflight measures a few images"
        return [f"{what}: no time estimate until each kind of stage has run once in this store; {how}"]
    between = f"({span(search['low'])} to {span(search['high'])})"
    return [f"{what}: about {span(search['seconds'])} {between} on this machine, {search['bytes'] / 2**20:.0f} MB"]


def _pair_count(count: int | None) -> str:
    from ktray.search.space_tree import MAX_SIZE

    if count is None:
        return "infinitely many pairs"
    return counted(count, "pair") if count < MAX_SIZE else f"more than {MAX_SIZE:.0e} pairs".replace("e+", "e")


def _stage_label(row: Mapping[str, Any], evaluations: Mapping[str, str]) -> str:
    """``features``, ``evaluation knn``."""
    return f"{row['stage']} {evaluations.get(row['key'], '')}".rstrip()


def _to_run(answer: Mapping[str, Any]) -> str:
    """How many of the listed stages would run and how long that takes, in one sentence."""
    search = answer["search"]
    if search is not None and search["done"] >= search["trials"]:
        return ""
    total, missing = len(answer["stages"]), sum(row["state"] == "run" for row in answer["stages"])
    if not missing:
        return "The stage is done." if total == 1 else f"All {total} stages are done."
    some = f"{missing} of {total} stages" if missing < total else "The stage" if total == 1 else f"All {total} stages"
    if search is not None:
        return f"{some} of one pair per branch would run; -v lists them."
    return f"{some} would run; {_time(answer['estimate'], 'preflight' in answer)}."


def _dry_run_text(found: Mapping[str, Any] | None) -> list[str]:
    from ktray.cli.terminal import table
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
        table(["dry run", "runs", "longest s", "peak MB", "GPU MB", "expected", "full size", "on disk MB"], rows),
        f"{_nodes(found['nodes'])}. The largest pair takes about "
        f"{found['pair_bytes'] / 2**20:.0f} MB of disk, {found['free_bytes'] / 2**20:.0f} MB are free.",
        f"All of it takes roughly {span(found['seconds'])} of work, one stage after the other and each training to its end, "
        f"and {found['bytes'] / 2**30:.1f} GB of disk: scaled from one batch, so rather less.",
    ]


def _nodes(count: int) -> str:
    return "1 node sees the store" if count == 1 else f"{count} nodes see the store and have the same versions"


def _time(estimate: Mapping[str, Any], dry_run: bool) -> str:
    """How long the missing stages take one after the other, in words."""
    from ktray.runs.study_status import span

    if estimate["seconds"] is None:
        return "the forecast is below" if dry_run else "no time estimate until each kind of stage has run once in this store"
    between = f" ({span(estimate['low'])} to {span(estimate['high'])})" if estimate["seconds"] else ""
    return f"about {span(estimate['seconds'])}{between}, one after the other"


def _sharing_text(sharing: Mapping[str, Any]) -> list[str]:
    """How many different artifacts a search makes for all its draws."""
    if not sharing["stages"]:
        return []
    parts = []
    for row in sharing["stages"]:
        possible = "infinitely many" if row["possible"] is None else str(row["possible"])
        parts.append(f"{row['stage']} {row['expected']:.0f} of {possible}")
    draws = counted(sharing["draws"], "random draw")
    return [f"Expected number of distinct artifacts in {draws} (of all possible): {', '.join(parts)}."]
