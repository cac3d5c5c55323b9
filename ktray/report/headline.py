"""The result in sentences: the best pair, how it compares with the references, and how many labels were used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from ktray.errors import UserError
from ktray.pipeline.naming import lineage
from ktray.pipeline.references import CEILING, RANDOM
from ktray.plugins import stated
from ktray.report.figures import strip
from ktray.report.formatting import (
    Objective,
    anonymised,
    finite,
    listed,
    loss_of,
    measure,
    number,
    pair_title,
    reference_values,
    value_of,
)
from ktray.search.ranking import ranked
from ktray.search.trial import STATES, Trial
from ktray.text import counted


def headline(
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    references: Mapping[str, Mapping[str, Any]],
    labels_used: Mapping[str, int],
    test: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return sentences about the best pair and a strip plot of the completed trials; without any, the state of the study.

    Args:
        test: what the test split said: number of a trial, or name of a reference -> `metrics` and standard `errors`.
    """
    metric, mode = objectives[0]
    completed = [trial for trial in ranked(trials, objectives) if value_of(trial, metric) is not None]
    counts: Counter[str] = Counter(trial.state for trial in trials)
    states = [f"{counts[state]:,} {state}" for state in STATES if counts[state]]
    facts = {
        "counts": f"{counted(len(trials), 'trial')}: {', '.join(states)}" if trials else "No trial yet",
        "ended": _last_end(trials),
    }
    if not completed:
        return {**facts, "best": None, "sentences": _no_result(trials), "strip": Markup("")}
    best, values = completed[0], [value_of(trial, metric) or 0.0 for trial in completed]
    ties = [f"{trial.number}" for trial, value in zip(completed, values, strict=True) if value == values[0]][1:]
    split = _split(best.pair, metric)
    known = reference_values(references, metric)
    return {
        **facts,
        "best": {"name": pair_title(best.pair), "value": measure(metric, values[0]), "number": best.number},
        "ties": listed(ties) if ties else "",
        "metric": metric,
        "mode": "higher is better" if mode == "max" else "lower is better",
        "of": counted(len(completed), "completed trial"),
        "sentences": [*_lineage(best.pair), *_comparison(values[0], known, metric, mode)],
        "labels": _labels(best.pair, labels_used),
        "chosen_of": len(completed),
        "split": split,
        "error": _standard_error(metric, values[0], labels_used.get(split or "", 0)),
        "test": on_test(best, test or {}, metric, mode),
        "strip": strip(values, values[0], known, metric) if len(values) + len(known) > 1 else Markup(""),
    }


def on_test(best: Trial, results: Mapping[str, Mapping[str, Any]], metric: str, mode: str) -> dict[str, Any] | None:
    """The first objective on the test split: the best pair, the references and other trials that were judged there.

    Returns:
        `value` and `error` of the best pair, `rows` of the others with their distance to it in standard errors of the
        difference, and `others`, whether they include trials. None if the best pair was not judged there.
    """
    own = results.get(str(best.number))
    value = finite(own["metrics"], metric) if own else None
    if own is None or value is None:
        return None
    error, loss = own.get("errors", {}).get(metric), loss_of(mode)
    rows = []
    for name, result in results.items():
        other, its_error = finite(result["metrics"], metric), result.get("errors", {}).get(metric)
        if other is None or name == str(best.number):
            continue
        gain = loss(other) - loss(value)
        verdict = "as good" if gain == 0 else f"{measure(metric, abs(gain))} {'worse' if gain > 0 else 'better'}"
        rows.append(
            {
                "name": f"trial {name}" if name.isdigit() else anonymised(name),
                "value": _with_error(metric, other, its_error),
                "verdict": verdict,
                "in_errors": _in_errors(gain, error, its_error),
            }
        )
    return {"value": measure(metric, value), "error": "" if error is None else number(error), "rows": rows}


def _with_error(metric: str, value: float, error: float | None) -> str:
    return measure(metric, value) + ("" if error is None else f" ± {number(error)}")


def _in_errors(gain: float, *errors: float | None) -> str:
    """A difference in standard errors, as if both were judged on different images, which makes it look smaller than it is."""
    known = [error for error in errors if error is not None]
    together = math.hypot(*known)
    return f"{abs(gain) / together:.1f} standard errors" if len(known) == 2 and together > 0 else ""


def next_steps(study: str, best: Trial | None, trials: int, judged: bool, has_test: bool) -> list[tuple[str, str]]:
    """(command, what it does) of what a reader may do now, the most useful first.

    Args:
        best: the best completed trial.
        trials: drawn so far.
        judged: whether the test split has judged the best.
        has_test: whether the data have a test split that was not used to choose.
    """
    again = f"ktray search SPACE.yaml --name {study}"
    if best is None:
        return [(f"ktray status {study}", "what its trials are doing"), (again, "goes on where the search ended")]
    found = []
    if not judged and has_test:
        found.append((f"ktray best {study} --test", "judges the best pair once on images that no choice was made with"))
    found.append((f"ktray export {study}/{best.number} student/", "the trained student, with a README of how to use it"))
    found.append((f"ktray show {study}/{best.number}", "its stages, their keys and all its metrics"))
    found.append((f"{again} --trials +{max(8, trials // 2)}", "goes on: more draws, and what is computed is reused"))
    found.append(("ktray ui", "every trial and stage in MLflow"))
    return found


def _no_result(trials: Sequence[Trial]) -> list[str]:
    waiting = sum(trial.state in ("running", "interrupted", "paused") for trial in trials)
    open_trials = f" {counted(waiting, 'trial')} running, interrupted or waiting at a rung." if waiting else ""
    return [f"No trial has completed, so there is no best pair.{open_trials}"]


def _comparison(best: float, known: Mapping[str, float], metric: str, mode: str) -> list[str]:
    """Compare the best pair with each reference, and place it between the random student and the supervised ceiling."""
    loss = loss_of(mode)
    comparisons = []
    for name, value in known.items():
        gain = loss(value) - loss(best)
        difference = measure(metric, abs(gain))
        verdict = "as good as" if gain == 0 else f"{difference} better than" if gain > 0 else f"{difference} worse than"
        comparisons.append(f"{verdict} the {name} ({measure(metric, value)})")
    sentences = [f"That is {listed(comparisons)}."] if comparisons else []
    if RANDOM in known and CEILING in known:
        distance = loss(known[RANDOM]) - loss(known[CEILING])
        if distance > 0:
            share = (loss(known[RANDOM]) - loss(best)) / distance
            sentences.append(f"It goes {100 * share:.0f} % of the way from the {RANDOM} to the {CEILING}.")
    return sentences


def _lineage(pair: Mapping[str, Any]) -> list[str]:
    """Name the chain of pairs in which the student of one is the teacher of the next; empty for a single pair."""
    count = len(_generations(pair))
    return [f"A chain of {count} pairs: {anonymised(lineage(pair))}."] if count > 1 else []


def _generations(pair: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the pair, then the pairs whose students are its teachers, and so on."""
    inner = [teacher["pair"] for teacher in _teachers(pair) if "pair" in teacher]
    return [pair, *(each for teaching in inner for each in _generations(teaching))]


def _teachers(pair: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    teacher = pair.get("teacher") or {}
    return list(teacher.get("several", [teacher]))


def _first_teachers(pair: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the teachers of all generations that are not students of pairs themselves."""
    return [teacher for each in _generations(pair) for teacher in _teachers(each) if "pair" not in teacher]


def _standard_error(metric: str, value: float, count: int) -> str:
    """Return the standard error of a top-1 accuracy over `count` images as a sentence; empty for other metrics."""
    if not metric.endswith("/top1") or count < 2 or not 0 < value < 1:
        return ""
    return f"One standard error of a share of {counted(count, 'image')} is {number(math.sqrt(value * (1 - value) / count))}."


def _labels(pair: Mapping[str, Any], labels_used: Mapping[str, int]) -> str:
    """Say how many labels were used for training and for selection."""
    used = [f"{counted(count, 'label')} of {split}" for split, count in labels_used.items() if count]
    if _learns_from_labels(pair):
        return f"Trained with the labels of its training images{', selected with ' + listed(used) if used else ''}."
    if not used:
        return "No labels were used, neither to train nor to select." + _unknown_training(pair)
    return f"Trained without labels, selected with {listed(used)}." + _unknown_training(pair)


def _unknown_training(pair: Mapping[str, Any]) -> str:
    known = (("checkpoint", "weights"), ("timm", "weights"), ("features", "features"))
    loaded = dict.fromkeys(what for teacher in _first_teachers(pair) for field, what in known if field in teacher)
    return "".join(f" The teacher's {what} come from a file; what they were trained with is not known here." for what in loaded)


def _learns_from_labels(pair: Mapping[str, Any]) -> bool:
    pretexts = [teacher["pretext"] for teacher in _first_teachers(pair) if "pretext" in teacher]
    try:
        teacher = any("labels" in stated("pretext", str(pretext["kind"]), "NEEDS") for pretext in pretexts)
        return teacher or any("labels" in stated("transfer", str(p["transfer"]["kind"]), "NEEDS") for p in _generations(pair))
    except UserError:  # an external plugin that this command does not trust
        return False


def _split(pair: Mapping[str, Any], metric: str) -> str | None:
    """Return the split that `metric` is evaluated on; None if no evaluation of the pair has it."""
    for entry in pair.get("evals", ()):
        if metric.split("/")[0] == (entry.get("name") or entry["kind"]):
            return str(entry.get("split", "val"))
    return None


def _last_end(trials: Sequence[Trial]) -> str | None:
    ends = [trial.ended for trial in trials if trial.ended is not None]
    return datetime.fromtimestamp(max(ends), UTC).strftime("%Y-%m-%d %H:%M UTC") if ends else None
