"""`python -m tests.chaos --faults 50 --mean 15`: runs rounds until this many faults were injected, and prints the figures."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tests.chaos import spaces, verdict
from tests.chaos.supervisor import Round, run_undisturbed, run_with_faults
from tests.searches import Home


def main() -> int:
    """Run rounds in turn: the fixed list and the drawn space, on a Ray of their own and on a cluster."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=50, help="how many in all, at least")
    parser.add_argument("--mean", type=float, default=15.0, help="seconds between two, on average")
    parser.add_argument("--size", type=int, default=3, help="how long the searches are; 1 takes a minute without faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[f"{space}-{place}" for space in spaces.SPACES for place in ("own", "cluster")])
    parser.add_argument("--folder", type=Path, default=None, help="where everything is kept; a temporary one by default")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    began, rounds, problems = time.monotonic(), [], []
    plan = [options.only] if options.only else ["fixed-own", "drawn-cluster", "drawn-own", "fixed-cluster"]
    while sum(len(outcome.faults) for outcome in rounds) < options.faults:
        name, seed = plan[len(rounds) % len(plan)], options.seed + len(rounds)
        left = options.faults - sum(len(outcome.faults) for outcome in rounds)
        outcome, found = run_round(name, folder / f"{len(rounds)}-{name}", folder, left, options.mean, options.size, seed)
        rounds.append(outcome)
        problems += [f"{name}: {problem}" for problem in found]
        _log(f"{name} is done after {outcome.seconds:.0f} s: {json.dumps(figures([outcome]))}")
        for problem in found:
            _log(f"  WRONG: {problem}")
    share = figures(rounds)["lost_share"]
    problems += [f"{share:.0%} of all worker-seconds were lost"] if share > verdict.MAX_LOST_SHARE else []
    print(json.dumps({**figures(rounds), "seconds": round(time.monotonic() - began), "wrong": problems}, indent=1))
    return 1 if problems else 0


def run_round(name: str, folder: Path, shared: Path, faults: int, mean: float, size: int, seed: int) -> tuple[Round, list[str]]:
    """One round and the promises that it broke.

    Args:
        folder: of this round.
        shared: of all rounds; the undisturbed search is kept there.
    """
    kind, _, where = name.partition("-")
    space = spaces.SPACES[kind](folder, size)
    trials = int(yaml.safe_load(space.read_text())["budget"]["trials"])
    outcome = run_with_faults(
        space, Home(folder / "home"), faults=faults, mean=mean, seed=seed, cluster=where == "cluster", log=_log
    )
    found = verdict.violations(outcome, trials)
    if outcome.results[-1].code != 0:
        return outcome, found
    if kind == "fixed":
        undisturbed = Home(shared / "undisturbed" / "home")
        if not undisturbed.path.exists():
            run_undisturbed(spaces.fixed(shared / "undisturbed", size), undisturbed)
        return outcome, found + verdict.different_from_undisturbed(outcome, undisturbed)
    return outcome, found + verdict.different_from_single_run(outcome, folder)


def figures(rounds: list[Round]) -> dict[str, Any]:
    """Figures of these rounds, as plain data."""
    all_seconds = [outcome.watcher.worker_seconds() for outcome in rounds]
    total = sum(each.total for each in all_seconds)
    gaps = [gap for outcome in rounds for _, gap in verdict.gaps(outcome)]
    return {
        "faults": dict(
            sorted(Counter(f"{f.target} {'frozen' if f.seconds else 'killed'}" for each in rounds for f in each.faults).items())
        ),
        "commands": dict(Counter(str(result.code) for outcome in rounds for result in outcome.results)),
        "worker_seconds": round(total, 1),
        "lost_share": round(sum(each.lost for each in all_seconds) / max(total, 1e-9), 4),
        "frozen_seconds": round(sum(each.frozen for each in all_seconds), 1),
        "replaced_after": [round(gap, 1) for gap in gaps],
    }


def _log(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
