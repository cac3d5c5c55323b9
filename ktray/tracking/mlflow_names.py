"""Names, values and filters in the form that MLflow accepts, and the tags and links of its pages. Does not import MLflow."""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ktray.fingerprint import fingerprint
from ktray.text import visible, visible_name

KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 8000  # characters, of mlflow.utils.validation; the same since MLflow 2.10
EXPERIMENT_TAG_LENGTH = 5000
PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 500  # MLflow's limit for metrics is 1000, which takes a busy server 1.6 s


def key_of(name: str) -> str:
    """Return `name` as a key: letters, digits and ``_ - . : / space``, a normalised relative path, at most 250 characters.

    Such names, as dotted spec paths and ``student/loss``, are unchanged. Any other gets a hash, so that ``acc@1`` never writes
    over ``acc_1``: a name has the same key in every run, and two names never have one key.
    """
    key = posixpath.normpath(re.sub(r"[^\w.\-:/ ]", "_", name)).lstrip("/")
    key = "_" + key[1:] if key.startswith("..") or key == "." else key
    changed = key != name or len(key) > KEY_LENGTH
    return f"{key[: KEY_LENGTH - 13]}-{fingerprint(name)[:12]}" if changed else key


def text_of(value: Any) -> str:
    """Return `value` as JSON writes it (``null``, ``true``, ``0.05``, ``[5,13,40]``); a string is returned unquoted.

    Control characters are written as escapes, as everywhere where ktray shows text.
    """
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str, ensure_ascii=False)
    return visible(text, layout="\n\t")


def params_of(params: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Return params for MLflow, and a tag that lists those whose value was cut to 6000 characters."""
    texts = {key_of(name): text_of(value) for name, value in params.items()}
    truncated = sorted(key for key, text in texts.items() if len(text) > PARAM_LENGTH)
    return {key: text[:PARAM_LENGTH] for key, text in texts.items()}, {
        "ktray.truncated": ", ".join(truncated)
    } if truncated else {}


def tags_of(tags: Mapping[str, Any]) -> dict[str, str]:
    """Return tags for MLflow, all under the prefix ``ktray.``."""
    keys = {name: key_of(name if name.startswith("ktray.") else f"ktray.{name}") for name in tags}
    keys |= {name: f"{keys[name]}-{fingerprint(name)[:12]}" for name in tags if keys[name] != name and keys[name] in tags}
    return {keys[name]: text_of(value)[:TAG_LENGTH] for name, value in tags.items()}


def metrics_of(values: Mapping[str, Any], step: int) -> tuple[dict[str, float], dict[str, str]]:
    """Return finite metrics, and a tag for each one that is not finite: MLflow's charts and comparisons break on NaN."""
    metrics: dict[str, float] = {}
    tags: dict[str, str] = {}
    for name, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            metrics[key_of(name)] = number
        else:
            tags[key_of(f"ktray.nonfinite.{name}")] = f"{text_of(str(value))[:100]} at step {step}"
    return metrics, tags


def run_name(number: int, name: str) -> str:
    """Return ``0042 rotation-resnet18/layer3 k=500 -> alexnet``, whether or not `name` already begins with the number."""
    head = f"{number:04d}"
    name = visible_name(name)
    return name if name == head or name.startswith(f"{head} ") else f"{head} {name}".rstrip()


def markdown_text(text: str) -> str:
    """Return `text` so that a description, which is Markdown, shows it as it is: a name is never a link or a tag."""
    return re.sub(r"([\\`*<>\[\]|~&]|(?<!\w)_|_(?!\w))", r"\\\1", visible_name(text))


def shown_value(value: float) -> float:
    """Return a metric to five significant digits: MLflow's tables show every digit. The journal and the store have all."""
    return float(f"{value:.5g}")


def quoted(text: str) -> str:
    """Return `text` as a string literal of an MLflow filter.

    Raises:
        ValueError: it contains both kinds of quotes, or a backslash; the filter language has no escapes.
    """
    mark = next((mark for mark in "'\"" if mark not in text), None)
    if mark is None or "\\" in text:
        raise ValueError(f"{text!r} cannot be written in an MLflow filter")
    return f"{mark}{text}{mark}"


VIEW_KEY = "ktray"  # of the saved view
WORKFLOW = "workflowType=machine_learning"  # without it MLflow 3 shows its pages for language models
VIEW_QUERY = f"viewStateShareKey={VIEW_KEY}&{WORKFLOW}"
DESCRIPTION = "mlflow.note.content"
TRIALS_AND_REFERENCES = "tags.`ktray.role` LIKE 'trial%'"  # MLflow's filters know no OR
BY_PARAMS, PARALLEL_PARAMS = 2, 8  # parameters in charts
_KIND = "mlflow.experimentKind"
_CHECKBOXES, _NAME = "0", "attributes.`Run Name`"  # columns, as MLflow calls them
_LINK = re.compile(r"\[((?:\\.|[^\]\\])*)\]\((view|search(?:/[\w.]+)?|(?:trial|stage)/[^)\s]+)\)")


def experiment_tags(
    objectives: Sequence[tuple[str, str]], metrics: Sequence[str], params: Sequence[str], description: str, time: int
) -> dict[str, str]:
    """Return tags of a study's experiment: its kind, and a saved view of its trials, best first.

    Without them MLflow 3 takes the study for a chat application and shows a table with neither objectives nor parameters.

    Args:
        objectives: (metric, "max" or "min"); the first orders the table.
        metrics: further columns.
        params: further columns.
        description: of the experiment.
        time: of the view, in ms.
    """
    objective_columns = [f"metrics.`objective/{metric}`" for metric, _ in objectives]
    metric_columns = [f"metrics.`{name}`" for name in metrics]
    plain = [f"objective/{metric}" for metric, _ in objectives]
    charts, sections = charts_of(plain, metrics, params)
    columns = [*objective_columns, "tags.`ktray.state`", *metric_columns, *(f"params.`{name}`" for name in params)]
    state = {
        "searchFilter": TRIALS_AND_REFERENCES,
        "orderByKey": objective_columns[0],
        "orderByAsc": objectives[0][1] == "min",
        "selectedColumns": columns,
        "columnOrder": [_CHECKBOXES, _NAME, *columns, "duration", "runDateAndNestInfo"],  # without it MLflow ignores the widths
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,  # or MLflow sorts the sections by their names
        "columnWidths": {_NAME: 330, **{name: _width(name) for name in columns}},
    }
    view = {"name": "Trials, best first", "createdAt": time, "updatedAt": time, "state": json.dumps(state)}
    return {_KIND: "custom_model_development", f"mlflow.sharedViewState.{VIEW_KEY}": json.dumps(view), DESCRIPTION: description}


def charts_of(
    objectives: Sequence[str], metrics: Sequence[str], params: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The charts of a study and their section, which MLflow shows before those that it makes itself of every metric.

    The first objective of the best trials as bars, and by the first parameters; the other metrics, such as the score at rungs,
    over epochs; parallel coordinates of parameters and the first objective.
    """
    section = "ktray-study"
    common = {"metricSectionId": section, "deleted": False, "isGenerated": False}
    first = objectives[0]
    charts: list[dict[str, Any]] = [{"type": "BAR", "metricKey": first, "displayName": first, "runsCountToCompare": 20}]
    for name in params[:BY_PARAMS]:
        axes = {"xaxis": {"key": name, "type": "PARAM"}, "yaxis": {"key": first, "type": "METRIC"}}
        charts.append({"type": "SCATTER", **axes, "displayName": f"{first} by {name}", "runsCountToCompare": 1000})
    for name in [each for each in metrics if not each.startswith("cost/")]:
        line = {"type": "LINE", "metricKey": name, "selectedMetricKeys": [name], "xAxisKey": "step", "runsCountToCompare": 20}
        charts.append({**line, "displayName": f"{name} at rungs"})
    wanted = {"selectedParams": list(params[:PARALLEL_PARAMS]), "selectedMetrics": [first]}
    charts.append({"type": "PARALLEL", **wanted, "showAllRuns": True, "displayName": "Parallel coordinates"})
    charts = [{**chart, **common, "uuid": f"ktray-{number}"} for number, chart in enumerate(charts)]
    flags = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    return charts, [{"uuid": section, "name": "The study", **flags}]


def _width(column: str) -> int:
    """Return how many pixels the column's heading needs."""
    return min(35 + 13 * len(column.split("`")[1]) // 2, 240)


def with_links(text: str, link_or_none: Callable[[str], str | None]) -> str:
    """Turn the links ``[label](trial/7)``, ``[label](stage/KEY)`` and ``[label](view)`` in `text` into links to MLflow's pages.

    Args:
        link_or_none: returns the link for what is in the parentheses. None leaves only the label.
    """

    def link(found: re.Match[str]) -> str:
        target = link_or_none(found[2])
        return f"[{found[1]}]({target})" if target else found[1]

    return _LINK.sub(link, text)


def run_link(experiment: str, run: str, artifact: str = "") -> str:
    """Return the link to a run, or to one of its artifacts."""
    return f"#/experiments/{experiment}/runs/{run}{f'/artifacts/{artifact}' if artifact else ''}?{WORKFLOW}"


def view_link(experiment: Any) -> str:
    """Return the link to the study's trials, best first."""
    return f"#/experiments/{experiment}/runs?{VIEW_QUERY}"
