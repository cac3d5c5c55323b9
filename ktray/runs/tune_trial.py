"""One Tune trial: a light process that waits for the stages of one segment. Its process imports neither torch nor optuna."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from typing import Any

from ktray.errors import SearchStopped, StageFailed
from ktray.scheduler.client import SchedulerClient, WaitCancelled

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # our own handler stops the search in order

import ray
from ray import tune

HEARTBEAT_SECONDS = 2.0
STOPPED = "stopped early"
CANCELLED = "cancelled"


class StageWaiter(tune.Trainable):
    """Asks the scheduler for the stages of one segment, and waits; computes nothing."""

    def setup(self, config: dict[str, Any]) -> None:
        self.job = config["job"]
        # Ray notices only processes that end; for one that stalls, Tune would wait for ever.
        threading.Thread(target=_send_heartbeats, args=(self.job["scheduler"],), daemon=True).start()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.job = new_config["job"]
        return True

    def step(self) -> dict[str, Any]:
        scheduler: SchedulerClient = self.job["scheduler"]
        try:
            outcomes = scheduler.obtain(self.job["stages"], self.job["waiter"], self.job["priority"])
        except StageFailed as failure:
            return {"done": True, "cause": str(failure), "failed": failure.stage, "computed": "[]"}
        except SearchStopped as stop:
            return {"done": True, "cause": STOPPED, "text": str(stop), "computed": "[]"}
        except WaitCancelled:
            return {"done": True, "cause": CANCELLED, "computed": "[]"}
        computed = [outcome["key"] for outcome in outcomes if outcome["state"] == "computed"]
        return {"done": True, "cause": "", "computed": json.dumps(computed)}


def _send_heartbeats(scheduler: SchedulerClient) -> None:
    """Tell the scheduler that this process is alive, until the scheduler has ended."""
    with suppress(SearchStopped, ray.exceptions.RayError):
        while True:
            scheduler.trial_heartbeat()
            time.sleep(HEARTBEAT_SECONDS)
