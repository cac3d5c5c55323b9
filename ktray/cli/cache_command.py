"""List, verify or prune the artifacts of the store."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ktray.cli.terminal import print_result, settings_of
from ktray.text import counted

if TYPE_CHECKING:
    from ktray.artifact import Artifact

HELP = "list, verify or prune artifacts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this verb."""
    parser.add_argument("action", choices=["list", "verify", "prune"])
    parser.add_argument("--yes", action="store_true", help="prune: really delete; without it only say what would go")


def run(args: argparse.Namespace) -> int:
    """Do it; the exit code."""
    return {"list": _list, "verify": _verify, "prune": _prune}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from ktray.cli.terminal import table
    from ktray.runs.cache import artifacts, size_of

    store = settings_of(args).open_store()
    listed = artifacts(store)
    rows = [
        {"key": found.key, "stage": found.record["stage"], "bytes": size_of(found), "seconds": found.record["seconds"]}
        for found in listed
    ]
    text = table(["key", "MB", "seconds"], [[r["key"], f"{r['bytes'] / 1e6:.1f}", f"{r['seconds']:.1f}"] for r in rows])
    total = sum(row["bytes"] for row in rows) / 1e6
    print_result(args, rows, f"{text}\n{counted(len(rows), 'artifact')}, {total:.1f} MB in {store.url}{_outdated_note(listed)}")
    return 0


def _outdated_note(listed: Iterable[Artifact]) -> str:
    """A line about artifacts of an older key format; empty if there are none."""
    from ktray.artifact import outdated

    count = sum(outdated(found.record) for found in listed)
    if not count:
        return ""
    return (
        f"\nof an earlier version, whose keys are not used any more (they changed in 0.2): {counted(count, 'artifact')}; "
        "ktray cache prune removes those that no study names"
    )


def _verify(args: argparse.Namespace) -> int:
    from ktray.runs.cache import artifacts, verify

    store = settings_of(args).open_store()
    found = verify(store)
    lines = [
        f"{key}: {problem}; {'moved aside, to be computed again' if key in found.moved_aside else 'made anew by now'}"
        for key, problem in found.damaged.items()
    ]
    answer = {"damaged": found.damaged, "moved_aside": found.moved_aside}
    print_result(
        args,
        answer,
        "\n".join([*lines, f"{counted(len(found.damaged), 'damaged artifact')}{_outdated_note(artifacts(store))}"]),
    )
    return 0


def _prune(args: argparse.Namespace) -> int:
    from ktray.runs.cache import remove, size_of, unused

    settings = settings_of(args)
    found = unused(settings)
    keys, freed = [artifact.key for artifact in found], sum(map(size_of, found))
    if args.yes:
        remove(settings.open_store(), keys)
    verb = "removed" if args.yes else "would remove (add --yes)"
    print_result(
        args,
        {"keys": keys, "bytes": freed, "removed": args.yes},
        "\n".join([*keys, f"{verb}: {counted(len(keys), 'artifact')}, {freed / 1e6:.1f} MB"]),
    )
    return 0
