"""How MLflow's pages present a study: a saved view of its trials, and descriptions with links."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

VIEW_KEY = "ktray"  # of the saved view
DESCRIPTION = "mlflow.note.content"
_KIND = "mlflow.experimentKind"
_CHECKBOXES, _NAME = "0", "attributes.`Run Name`"  # columns, as MLflow calls them
_LINK = re.compile(r"\[([^\]]*)\]\((view|search|(?:trial|stage)/[^)\s]+)\)")


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
    columns = [*objective_columns, "tags.`ktray.state`", *metric_columns, *(f"params.`{name}`" for name in params)]
    state = {
        "searchFilter": "tags.`ktray.role` = 'trial'",
        "orderByKey": objective_columns[0],
        "orderByAsc": objectives[0][1] == "min",
        "selectedColumns": columns,
        "columnOrder": [_CHECKBOXES, _NAME, *columns, "duration", "runDateAndNestInfo"],  # without it MLflow ignores the widths
        "columnWidths": {_NAME: 330, **{name: _width(name) for name in columns}},
    }
    view = {"name": "Trials, best first", "createdAt": time, "updatedAt": time, "state": json.dumps(state)}
    return {_KIND: "custom_model_development", f"mlflow.sharedViewState.{VIEW_KEY}": json.dumps(view), DESCRIPTION: description}


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
    return f"#/experiments/{experiment}/runs/{run}{f'/artifacts/{artifact}' if artifact else ''}"


def view_link(experiment: Any) -> str:
    """Return the link to the study's trials, best first."""
    return f"#/experiments/{experiment}/runs?viewStateShareKey={VIEW_KEY}&workflowType=machine_learning"
