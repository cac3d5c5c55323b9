"""A study of any size in a home, as a search would have left it, without computing anything: results follow a known formula."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ktray.checksums import json_text
from ktray.search import space
from ktray.search.space_tree import Choice, Parameter
from tests.source import ROOT

RUNGS = (2, 4, 8)
TEACHERS = {"hog": 0.06, "random": -0.03, "rotation": 0.02}


def write_study(home: Path, trials: int, name: str = "quickstart", seed: int = 0) -> Path:
    """Write the journal of a study of the quick start's space, and what its workers ran; the home.

    Half of the trials at each rung go on. A score is the sum of an effect of the teacher, 0.02 per level of k, and noise.
    """
    drawn = space.load(ROOT / "search_spaces" / "quickstart.yaml", [])
    folder = home / "studies" / name
    folder.mkdir(parents=True)
    source = random.Random(seed)
    head = {"worker_id": "w", "study_id": 0}
    lines: list[dict[str, Any]] = [{"op_code": 0, "worker_id": "w", "study_name": name, "directions": [2]}]
    lines.append({"op_code": 2, **head, "user_attr": {"space": {**drawn.content, "study": name}}})
    lines.append({"op_code": 2, **head, "user_attr": {"target": {"trials": trials, "budget": trials}}})
    runs, clock, pairs = [], 1_796_000_000.0, {}
    for number in range(trials):
        params = drawn.build_draw(lambda parameter: _draw(parameter, source))
        kind = json.dumps({each: value for each, value in params.items() if each != "student.schedule.lr"}, sort_keys=True)
        if kind not in pairs:  # validating a pair takes milliseconds
            pairs[kind] = drawn.pair(params).model_dump(mode="json")
        pair = json.loads(json.dumps(pairs[kind]))
        pair["student"]["schedule"]["lr"] = params["student.schedule.lr"]
        level = 0.7 + TEACHERS[params["teacher"]] + 0.02 * [20, 50, 100].index(params["transfer.k"])
        reached = source.choice([1, 1, 2, 2, 3]) if number else 3
        scores = {str(epoch): round(level + 0.01 * epoch + source.gauss(0, 0.01), 4) for epoch in RUNGS[:reached]}
        done = reached == len(RUNGS)
        keys = {stage: f"{stage}-{number:012x}" for stage in ("features", "clusters", "pseudo_labels", "student")}
        found: dict[str, Any] = {
            "pair": json.dumps(pair),
            "started": clock,
            "planned": None,
            "ended": clock + 30,
            "cause": None,
        }
        found |= {"keys": keys | {"evaluation": {"knn": f"evaluation-{number:012x}"}}, "duplicate_of": None}
        found["cost"] = {"marginal_seconds": 20.0, **({"seconds": 30.0} if done else {})}
        if done:
            value = round(level + 0.1 + source.gauss(0, 0.01), 4)
            found |= {"metrics": {"linear_probe/top1": value, "cost/seconds": 30.0}, "objectives": {"linear_probe/top1": value}}
        progress = {"state": "completed" if done else "pruned", "epoch": RUNGS[reached - 1], "scores": scores, "teacher": None}
        distributions = {
            each: json.dumps({"name": "CategoricalDistribution", "attributes": {"choices": [value]}})
            for each, value in params.items()
        }
        created = {"distributions": distributions, "params": dict.fromkeys(params, 0)}
        lines.append(
            {"op_code": 4, **head, "state": 1 if done else 2, **created, "user_attrs": {**found, "progress": progress}}
        )
        for stage, key in keys.items():
            worker = {"worker": f"worker-{1 + number % 4}", "session": "a"}
            runs.append({"key": key, "stage": stage, **worker, "began": clock, "ended": clock + 4, "outcome": ""})
            clock += 1.2
    (folder / "journal.log").write_text("".join(f"{json_text(line)}\n" for line in lines))
    (folder / "workers.jsonl").write_text("".join(f"{json.dumps(run)}\n" for run in runs))
    return home


def _draw(parameter: Parameter, source: random.Random) -> Any:
    if isinstance(parameter, Choice):
        return source.choice(parameter.labels)
    return 10 ** source.uniform(-2, -0.7)
