"""List, verify or prune the artifacts of the store."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktray.cli.settings import Settings, settings
from ktray.stores import Store

HELP = "list, verify or prune artifacts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("action", choices=["list", "verify", "prune"])
    parser.add_argument("--yes", action="store_true", help="prune: really delete; without it only say what would go")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code."""
    options = settings(args)
    return {"list": _list, "verify": _verify, "prune": _prune}[args.action](args, options)


def _size(record: Any) -> int:
    return sum(int(entry["size"]) for entry in record["files"].values())


def _list(args: argparse.Namespace, options: Settings) -> int:
    from ktray.cli.text_table import table

    store = options.open_store()
    rows = [
        {"key": found.key, "stage": found.record["stage"], "bytes": _size(found.record), "seconds": found.record["seconds"]}
        for found in filter(None, map(store.find, store.keys()))
    ]
    text = table(["key", "MB", "seconds"], [[r["key"], f"{r['bytes'] / 1e6:.1f}", f"{r['seconds']:.1f}"] for r in rows])
    options.answer(rows, f"{text}\n{len(rows)} artifacts, {sum(r['bytes'] for r in rows) / 1e6:.1f} MB in {store.url}")
    return 0


def _verify(args: argparse.Namespace, options: Settings) -> int:
    """Compare every file with the sha256 of its record; damaged artifacts are moved aside, to be computed again.

    Where a search runs, they stay: its stages may read them now. What has lost bytes, any reader moves aside at any time.
    """
    from ktray.errors import UserError

    store = options.open_store()
    damaged = {key: problem for key in list(store.keys()) if (problem := store.verify(key))}
    left = "made anew by now"
    if any(map(store.find, damaged)):
        try:
            with _alone(store, "Verify again when it has ended."):
                _set_aside(store, damaged)
        except UserError as busy:
            left = f"left where it is: {busy}"
    gone = {key: store.find(key) is None for key in damaged}
    became = {True: "moved aside, to be computed again", False: left}
    lines = [f"{key}: {problem}; {became[gone[key]]}" for key, problem in damaged.items()]
    answer = {"damaged": damaged, "moved_aside": [key for key in damaged if gone[key]]}
    options.answer(answer, "\n".join([*lines, f"{len(damaged)} damaged artifacts"]))
    return 0


def _set_aside(store: Store, damaged: Iterable[str]) -> None:
    for key in damaged:
        problem = store.verify(key) if store.find(key) else ""  # since, another may have moved it and made it anew
        if problem:
            store.set_aside(key, problem)


def _prune(args: argparse.Namespace, options: Settings) -> int:
    """Delete artifacts that no trial of any study of this home uses."""
    store = options.open_store()
    needed = _needed(store, options.home)
    idle = [found for found in filter(None, map(store.find, store.keys())) if found.key not in needed]
    freed = sum(_size(found.record) for found in idle)
    if args.yes:
        with _alone(store, "Prune when it has ended."):
            for found in idle:
                store.remove(found.key)
            store.sweep()
            store.discard_damaged()
    verb = "removed" if args.yes else "would remove (add --yes)"
    options.answer(
        {"keys": [found.key for found in idle], "bytes": freed, "removed": args.yes},
        "\n".join([*(found.key for found in idle), f"{verb}: {len(idle)} artifacts, {freed / 1e6:.1f} MB"]),
    )
    return 0


@contextmanager
def _alone(store: Store, instead: str) -> Iterator[None]:
    """Nothing may run meanwhile: what a trial in flight has just had computed is not in its study yet.

    Raises:
        UserError: something does; `instead` says what to do then.
    """
    from ktray.errors import UserError
    from ktray.stores.locks import try_lock_store

    lock = try_lock_store(store.url)
    if lock is None:
        raise UserError(f"a search or a run uses the store {store.url} now", instead=instead)
    try:
        yield
    finally:
        lock.release()


def _needed(store: Store, home: Path) -> set[str]:
    """What trials and reference lines of all studies rest on, and what was judged of it, as on test: that is small."""
    from ktray.cli.leaderboard import study_folder
    from ktray.runs import reference_lines
    from ktray.search import journal
    from ktray.search.history import keys_in_use

    used = keys_in_use(home)
    for name in journal.names(home):
        for line in reference_lines.read(study_folder(home, name)).values():
            evaluations = line["keys"].get("evaluation", {}).values()
            used |= {*evaluations, *(key for key in line["keys"].values() if isinstance(key, str))}
    needed = _with_inputs(store, used)
    judged = [found for found in filter(None, map(store.find, store.keys())) if found.record["stage"] == "evaluation"]
    return needed | {found.key for found in judged if set(found.record["inputs"].values()) <= needed}


def _with_inputs(store: Store, keys: set[str]) -> set[str]:
    """`keys` and everything they were made from."""
    needed: set[str] = set()
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key in needed:
            continue
        needed.add(key)
        found = store.find(key)
        if found:
            waiting.extend(found.record["inputs"].values())
            if found.record.get("started_from"):
                waiting.append(found.record["started_from"])
    return needed
