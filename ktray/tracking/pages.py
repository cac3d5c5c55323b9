"""What MLflow's pages show of a study before anyone clicks: its kind, a view of its trials, and descriptions with links."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

VIEW = "ktray"  # key of the saved view
DESCRIPTION = "mlflow.note.content"
_KIND = "mlflow.experimentKind"
_BOXES, _NAME = "0", "attributes.`Run Name`"  # columns, as MLflow calls them
_LINK = re.compile(r"\[([^\]]*)\]\((view|search|(?:trial|stage)/[^)\s]+)\)")


def experiment_tags(
    goals: Sequence[tuple[str, str]], metrics: Sequence[str], params: Sequence[str], description: str, time: int
) -> dict[str, str]:
    """Tags of a study's experiment: pages of model training instead of chats, and a saved view with its trials, best first.

    Without them MLflow 3 guesses a chat application and shows a table with neither objectives nor parameters.

    Args:
        goals: (metric, "max" or "min"), the first one orders the table.
        metrics: more metrics for columns.
        params: params for columns.
        description: of the experiment.
        time: ms; of the view.
    """
    objectives = [f"metrics.`objective/{metric}`" for metric, _ in goals]
    numbers = [f"metrics.`{name}`" for name in metrics]
    columns = [*objectives, "tags.`ktray.state`", *numbers, *(f"params.`{name}`" for name in params)]
    state = {
        "searchFilter": "tags.`ktray.role` = 'trial'",
        "orderByKey": objectives[0],
        "orderByAsc": goals[0][1] == "min",
        "selectedColumns": columns,
        "columnOrder": [_BOXES, _NAME, *columns, "duration", "runDateAndNestInfo"],  # without it, the widths are not read
        "columnWidths": {_NAME: 330, **{name: _width(name) for name in columns}},
    }
    view = {"name": "Trials, best first", "createdAt": time, "updatedAt": time, "state": json.dumps(state)}
    return {_KIND: "custom_model_development", f"mlflow.sharedViewState.{VIEW}": json.dumps(view), DESCRIPTION: description}


def _width(column: str) -> int:
    """Pixels that the column's heading needs."""
    return min(35 + 13 * len(column.split("`")[1]) // 2, 240)


def with_links(text: str, address: Callable[[str], str | None]) -> str:
    """`text` with its links ``[label](trial/7)``, ``[label](stage/KEY)``, ``[label](view)`` made links of MLflow's pages.

    Args:
        address: what is in the parentheses -> link; None leaves the label alone.
    """

    def link(found: re.Match[str]) -> str:
        target = address(found[2])
        return f"[{found[1]}]({target})" if target else found[1]

    return _LINK.sub(link, text)


def run_page(experiment: str, run: str, artifact: str = "") -> str:
    """Link to a run, or to one of its artifacts."""
    return f"#/experiments/{experiment}/runs/{run}{f'/artifacts/{artifact}' if artifact else ''}"


def view_page(experiment: Any) -> str:
    """Link to the study's trials, best first."""
    return f"#/experiments/{experiment}/runs?viewStateShareKey={VIEW}&workflowType=machine_learning"
