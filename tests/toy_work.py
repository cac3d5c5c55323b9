"""Stages of no weight for the tests of the scheduler: what they do stands in their spec."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from ktray.artifact import Artifact, Stage
from ktray.errors import MissingInput
from ktray.pool import StageContext
from ktray.stores import Store


def toy(
    name: str, spec: dict[str, Any] | None = None, inputs: tuple[Stage, ...] = (), resume_from: tuple[Stage, ...] = ()
) -> Stage:
    """A stage that does what `spec` says: steps, sleep, error, map, log (a file where each attempt leaves a line).

    Stages of different tests differ, so that tests can share a scheduler and a store.
    """
    spec = {"test": os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0], **(spec or {})}
    keys = {f"input{index}": stage.key for index, stage in enumerate(inputs)}
    return Stage(name, spec, {}, inputs=keys, resume_from=tuple(stage.key for stage in resume_from))


def work(stage: Stage, store: Store, attempt: str, context: StageContext) -> tuple[Artifact, bool]:
    """Compute and publish a toy stage."""
    found = store.find(stage.key)
    if found is not None:
        return found, False
    spec, began = stage.spec, time.perf_counter()
    _write_log(spec, f"{stage.key} {attempt} {os.getpid()}")
    for key in stage.inputs.values():
        if store.find(key) is None:
            raise MissingInput(key)
    steps = [int(path.name.rpartition("-")[2]) for path in store.checkpoints(stage.key)]
    scratch = store.scratch(stage.key, attempt)
    for step in range(max(steps, default=0), spec.get("steps", 0)):
        time.sleep(spec.get("sleep", 0.1))
        (scratch / f"checkpoint-{step + 1}").mkdir()
        _write_log(spec, f"step {step + 1}")
        context.progress({"step": step + 1, "of": spec["steps"]})
    if spec.get("error") == "disk full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if spec.get("error") == "memory" and context.max_batch_size is None:
        raise MemoryError("no room for 9 GB")
    if spec.get("error") == "die":
        os._exit(1)
    if "error" in spec and spec["error"] != "memory":
        raise ValueError(spec["error"])
    metrics = {"toy/steps": float(spec.get("steps", 0))}
    if "map" in spec:
        sums = context.pool.map(
            block_sum, list(range(spec["map"])), {"scale": np.float64(0.1), "sleep": spec.get("sleep", 0.0)}
        )
        np.save(scratch / "sums.npy", np.stack([total for total, _ in sums]))
        metrics["toy/processes"] = float(len({pid for _, pid in sums}))
    record: dict[str, Any] = {"after_out_of_memory": context.max_batch_size is not None, "metrics": metrics}
    record |= {"seconds": time.perf_counter() - began}
    return store.publish(scratch, stage.key, record)


def block_sum(item: int, shared: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Sums (8,) float64 of a block of random numbers, and who added them."""
    time.sleep(shared["sleep"])
    block = np.random.default_rng(item).random((1000, 8))
    return (block * shared["scale"]).sum(axis=0), os.getpid()


def _write_log(spec: Any, line: str) -> None:
    if spec.get("log"):
        with open(Path(spec["log"]), "a") as file:
            file.write(line + "\n")
