"""Logging a study to MLflow: one experiment, one run for the search, and below it a run per trial and per computed stage.

A search calls `Tracker` (start reading in `tracker.py`). Every call appends an event to a file, the spool (`spool.py`), and
returns. One thread (`writer.py`) applies the events to MLflow (`mlflow_runs.py`) whenever MLflow answers. So a tracker that is
slow, down or full costs no trial, and what it missed is written once it is back, by a later session if need be. Events are
idempotent: after a kill -9 some are applied twice, which changes nothing.

Besides: `model_registry.py` registers exported students, `ui_server.py` serves MLflow's pages. Of the package, this subpackage
imports only the words of the root and `stores.locks`, and nothing else in the package imports MLflow.
"""

from ktray.tracking.connection import default_uri
from ktray.tracking.tracker import StageRun, Tracker, Unwritten
from ktray.tracking.ui_server import serve

__all__ = ["StageRun", "Tracker", "Unwritten", "default_uri", "serve"]
