"""Students in MLflow's model registry: versions of `ktray-STUDY`; the best has the alias `champion`, others `challenger`."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktray.errors import UserError
from ktray.redaction import without_secrets
from ktray.tracking.connection import connect, mlflow_environment, validated_uri
from ktray.tracking.mlflow_names import quoted, text_of

if TYPE_CHECKING:
    from torch import nn

FOLDER = "student"  # of the run's artifacts


def register_student(
    uri: str,
    home: Path,
    study: str,
    trial: int,
    network: nn.Module,
    size: int,
    best: bool,
    tags: Mapping[str, str],
    check: Callable[[nn.Module], None],
) -> tuple[str, int]:
    """Log a student in its trial's run and register it as a new version of `ktray-STUDY`.

    The model is stored in the pt2 format of torch.export, which is loaded without pickle and takes batches of any size.

    Args:
        uri: of the tracker.
        network: (B, 3, size, size) float32 -> (B, D) float32; put into eval mode.
        best: whether the version gets the alias `champion` or `challenger`. The alias moves from the version that had it.
        tags: of the version.
        check: called with the model as it was stored, before the tracker gets it; raises if it is not the network.

    Returns:
        Name of the model, number of the version.

    Raises:
        UserError: the tracker cannot be reached, or has no run of this trial, or the network cannot be stored.
    """
    from mlflow.exceptions import MlflowException

    name = f"ktray-{study}"
    with mlflow_environment():
        try:
            client = connect(validated_uri(uri), home, study, {}).client
            run = _run_id(client, study, trial)
            with tempfile.TemporaryDirectory() as folder:
                _save(network, size, Path(folder) / FOLDER, check)
                client.log_artifacts(run, str(Path(folder) / FOLDER), FOLDER)
            with contextlib.suppress(MlflowException):  # it exists since an earlier version
                client.create_registered_model(name, description=f"Students of the study {text_of(study)}.")
            version = client.create_model_version(name, f"runs:/{run}/{FOLDER}", run, tags=dict(tags)).version
            client.set_registered_model_alias(name, "champion" if best else "challenger", version)
        except (
            MlflowException,
            sqlite3.Error,
        ) as error:  # sqlite's: see `follow_home`
            problem = f"the tracker did not take the model: {without_secrets(' '.join(str(error).split()))[:300]}"
            raise UserError(problem, "--register", "Export it again, to another folder, once it does.") from error
    return name, int(version)


def _run_id(client: Any, study: str, trial: int) -> str:
    experiment = client.get_experiment_by_name(study)
    condition = f"tags.`ktray.role` = 'trial' and tags.`ktray.trial` = {quoted(str(trial))}"
    found = client.search_runs([experiment.experiment_id], condition, order_by=["attribute.start_time DESC"], max_results=1)
    if not found:
        raise UserError(
            f"the tracker has no run of trial {trial} of {study!r}",
            "--register",
            "Name the tracker that the search wrote to with --tracking.",
        )
    return str(found[0].info.run_id)


def _save(network: nn.Module, size: int, folder: Path, check: Callable[[nn.Module], None]) -> None:
    import torch
    from mlflow import pytorch
    from mlflow.models import infer_signature

    example = torch.zeros(2, 3, size, size).numpy()  # two images: a batch size of one would be exported as a constant
    with torch.no_grad(), _without_output():
        features = network.eval()(torch.from_numpy(example)).numpy()
        try:
            pytorch.save_model(
                network,
                str(folder),
                signature=infer_signature(example, features),
                input_example=example,
                pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
            )
        except Exception as error:  # torch.export raises a dozen kinds, and passes on what the network raises
            problem = f"this network cannot be stored as a model: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise UserError(problem, "--register", "Export it without --register.") from error
        check(pytorch.load_model(str(folder)))


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """Suppress what MLflow and torch print and log about their own internals while they export."""
    import logging
    import warnings

    loggers = [logging.getLogger(name) for name in ("mlflow", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
