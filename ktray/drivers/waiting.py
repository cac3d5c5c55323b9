"""One Tune trial: a light driver that waits for the stages of one leg. Its process imports neither torch nor optuna."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from typing import Any

from ktray.crew.client import Crew, Released
from ktray.errors import StageFailed, StoppedEarly

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is ours: `stopping` ends the search in order

import ray
from ray import tune

EVERY = 2.0
STOPPED = "stopped early"
RELEASED = "released"


class WaitForStages(tune.Trainable):  # type: ignore[misc]
    """A light driver: asks the crew for the stages of one leg, computes nothing, imports no torch."""

    def setup(self, config: dict[str, Any]) -> None:
        self.job = config["job"]
        # A process that stands still would have Tune wait for ever: Ray notices only those that end.
        threading.Thread(target=_attend, args=(self.job["crew"],), daemon=True).start()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.job = new_config["job"]
        return True

    def step(self) -> dict[str, Any]:
        crew: Crew = self.job["crew"]
        try:
            outcomes = crew.obtain(self.job["stages"], self.job["waiter"], self.job["priority"])
        except StageFailed as failure:
            return {"done": True, "cause": str(failure), "failed": failure.stage, "computed": "[]"}
        except StoppedEarly as stop:
            return {"done": True, "cause": STOPPED, "text": str(stop), "computed": "[]"}
        except Released:
            return {"done": True, "cause": RELEASED, "computed": "[]"}
        computed = [outcome["key"] for outcome in outcomes if outcome["state"] == "computed"]
        return {"done": True, "cause": "", "computed": json.dumps(computed)}


def _attend(crew: Crew) -> None:
    """Tell the crew that this process lives, until the crew is no more."""
    with suppress(StoppedEarly, ray.exceptions.RayError):
        while True:
            crew.attend()
            time.sleep(EVERY)
