"""Metrics of the test split in MLflow: on the run of each trial and reference judged there, and on the run of the search."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktray.redaction import without_secrets
from ktray.tracking.connection import connect, mlflow_environment, sqlite_path, validated_uri
from ktray.tracking.mlflow_names import metrics_of

log = logging.getLogger("ktray")


def log_test_metrics(uri: str, home: Path, study: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Log what the test split said. A tracker that is absent or does not answer is only mentioned in the log.

    Args:
        results: number of a trial, or name of a reference -> `metrics` and standard `errors`.
    """
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return  # this study was searched without a tracker, or with another
    with mlflow_environment():
        try:
            client = connect(validated_uri(uri), home, study, {}).client
            experiment = client.get_experiment_by_name(study)
            runs = client.search_runs([experiment.experiment_id], "tags.`ktray.role` != 'stage'", max_results=1000)
            for run in runs:
                trial = run.data.tags.get("ktray.trial", run.data.tags.get("ktray.reference"))  # None: the search's own run
                own = results if trial is None else {name: result for name, result in results.items() if name == trial}
                for name, result in own.items():
                    prefix = "" if trial is not None else f"{name}/"
                    values = {f"test/{prefix}{metric}": value for metric, value in result["metrics"].items()}
                    values |= {f"test_error/{prefix}{metric}": value for metric, value in result["errors"].items()}
                    for metric, value in metrics_of(values, 0)[0].items():
                        client.log_metric(run.info.run_id, metric, value)
        except Exception as error:  # noqa: BLE001 - MLflow and its databases raise many kinds, and the results are kept anyway
            log.warning("MLflow has not got the test results: %s", without_secrets(" ".join(str(error).split()))[:300])
