"""Checks of what a search under faults promises."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.chaos.supervisor import Round
from tests.searches import Home

MAX_LOST_SHARE = 0.15
LOST_PER_FAULT = 2 * 4.0  # worker-seconds: two workers, each its last checkpoint of 2 s and the epoch that it was in
MAX_GAP = 30.0
DISRUPTIVE_TARGETS = ("driver", "broker", "node")


def violations(outcome: Round, trials: int) -> list[str]:
    """Broken promises, whatever was searched."""
    codes = [result.code for result in outcome.results]
    found = [f"the commands ended with {codes}"] if codes[-1] != 0 or set(codes) - {0, -9, 5} else []
    found += [f"the command said: {result.err[-600:]}" for result in outcome.results if result.code not in (0, -9)]
    found += [line for result in outcome.results for line in result.err.splitlines() if "Traceback" in line]
    if codes[-1] != 0:
        return found
    states = outcome.home.states()
    counted = sum(state != "duplicate" for state in states)
    if set(states) - {"completed", "pruned", "duplicate"} or counted != trials:
        found.append(f"{trials} trials should have ended, and they are {states}")
    found += [f"{key} was published {len(made)} times" for key, made in outcome.watcher.published.items() if len(made) > 1]
    found += [f"left behind: {each}" for each in outcome.leftovers]
    lost = outcome.watcher.worker_seconds()
    if lost.lost > max(MAX_LOST_SHARE * lost.total, LOST_PER_FAULT * len(outcome.faults)):  # of one round a share says little
        found.append(f"{lost.share:.0%} of {lost.total:.0f} worker-seconds were lost")
    found += [f"{fault} was replaced only after {gap:.0f} s" for fault, gap in gaps(outcome) if gap > MAX_GAP]
    return [*found, *_untracked(outcome.home)]


def gaps(outcome: Round) -> list[tuple[str, float]]:
    """How long each stage whose worker was frozen stood still; of those that no other fault disturbed meanwhile."""
    found = []
    for fault in outcome.faults:
        if not (fault.key and fault.seconds):
            continue
        restarted = outcome.watcher.restarted_at(fault.key, fault.at)
        woke = fault.at + fault.seconds
        if restarted is None or restarted > woke:
            continue  # it woke up before it was declared dead
        between = [each for each in outcome.faults if each.target in DISRUPTIVE_TARGETS and fault.at - 20 < each.at < restarted]
        if not between:
            found.append((str(fault), restarted - fault.at))
    return found


def _untracked(home: Home) -> list[str]:
    runs = home.runs()
    stages = [run for run in runs if run.data.tags["ktray.role"] == "stage"]
    open_runs = [run.info.run_name for run in runs if run.info.status not in ("FINISHED", "KILLED", "FAILED")]
    found = [f"MLflow shows {len(stages)} stages, and {len(home.artifacts())} were computed"]
    return (found if len(stages) != len(home.artifacts()) else []) + [
        f"in MLflow {name} is still running" for name in open_runs
    ]


def different_from_undisturbed(outcome: Round, undisturbed: Home) -> list[str]:
    """Keys, metrics of artifacts, and metrics of trials that an undisturbed search of the same list does not have."""
    keys, expected = set(outcome.home.artifacts()), set(undisturbed.artifacts())
    found = [f"only under faults: {key}" for key in sorted(keys - expected)]
    found += [f"missing under faults: {key}" for key in sorted(expected - keys)]
    for key in sorted(keys & expected):
        if without_costs(outcome.home.record(key)["metrics"]) != without_costs(undisturbed.record(key)["metrics"]):
            found.append(f"the metrics of {key} differ")
    theirs = {json.dumps(trial.pair, sort_keys=True): trial for trial in undisturbed.study().trials}
    for trial in outcome.home.study().trials:
        other = theirs.get(json.dumps(trial.pair, sort_keys=True))
        if (
            other is None
            or without_costs(trial.metrics) != without_costs(other.metrics)
            or dict(trial.keys) != dict(other.keys)
        ):
            found.append(f"trial {trial.number} differs from the undisturbed one")
    return found


def different_from_single_run(outcome: Round, folder: Path) -> list[str]:
    """Finished trials whose keys or metrics `ktray run` of their spec does not give."""
    trials = [trial for trial in outcome.home.study().trials if trial.state == "completed"]
    pairs = {f"t{trial.number}": trial.pair for trial in trials}
    source = f'"""The pairs of a search."""\nimport json\nPAIRS = json.loads({json.dumps(pairs)!r})\n'
    source += "def pairs():\n    from ktray.spec import PairSpec\n"
    source += "    return {name: PairSpec.model_validate(pair) for name, pair in PAIRS.items()}\n"
    experiment = folder / "single.py"
    experiment.write_text(source)
    ended = Home(folder / "single").run("run", experiment, "--local", "--json", timeout=1200.0)
    if ended.code:
        return [f"ktray run ended with {ended.code}: {ended.err}"]
    single = {result["name"]: result for result in ended.answer}
    return [
        f"trial {trial.number} is not what ktray run gives"
        for trial in trials
        if without_costs(trial.metrics) != without_costs(single[f"t{trial.number}"]["metrics"])
        or dict(trial.keys) != single[f"t{trial.number}"]["keys"]
    ]


def without_costs(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics without costs and speeds, which are those of the machine."""
    return {name: value for name, value in metrics.items() if not name.startswith("cost/") and "images_per_s" not in name}
