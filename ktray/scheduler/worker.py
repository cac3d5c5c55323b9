"""A warm worker: it pulls one stage after the other, tells that it lives, and lends a hand in between."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ktray.artifact import Stage
from ktray.errors import MissingInput
from ktray.pool import FEW_IMAGES, StageContext
from ktray.scheduler.config import BROKER, SchedulerConfig
from ktray.scheduler.failure_kinds import kind_of, line_of
from ktray.scheduler.ray_pool import RayPool
from ktray.scheduler.worker_registry import WorkerShape
from ktray.stores import open_store
from ktray.stores.locks import lock_store_shared


class WorkerActor:
    """One process. Its own threads do the work; the broker only ever calls `forever`, another worker only `help`."""

    def __init__(self, config: SchedulerConfig, name: str, shape: WorkerShape) -> None:
        self._charter, self._name, self._shape = config, name, shape
        self._work: Callable[..., Any] = cloudpickle.loads(config.work)
        self._store = open_store(config.store_url)
        self._lock = lock_store_shared(config.store_url)
        self._broker = ray.get_actor(BROKER, namespace=config.namespace)
        cards = tuple(map(str, ray.get_gpu_ids())) if shape.gpus else ()
        self._who = {"name": name, "node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}
        self._who |= {"shape": shape, "cards": cards}
        self._stage: Stage | None = None
        self._attempt = ""
        self._progress: Mapping[str, float] = {}
        self._lent: list[str] = []
        self._handles: dict[str, Any] = {}
        self._hands = threading.Lock()
        self._box: tuple[str, Any] = ("", None)
        self._watch = threading.Event()
        for body in (self._beat, self._pull):
            threading.Thread(target=_to_the_end, args=(body,), daemon=True).start()

    def forever(self) -> None:
        """Blocks while this process lives: the caller's error is the death notice. A newer caller replaces an older one."""
        self._watch.set()
        self._watch = mine = threading.Event()
        mine.wait()

    def help(self, call: str, box: list[Any], item: bytes) -> bytes | None:
        """One item of another worker's `map`; None if this worker has a stage of its own by now."""
        with self._hands:
            if self._attempt:
                return None
            if self._box[0] != call:
                self._box = (call, cloudpickle.loads(ray.get(box[0])))
            function, shared = self._box[1]
            try:
                return bytes(cloudpickle.dumps((True, function(cloudpickle.loads(item), shared))))
            except Exception as error:  # noqa: BLE001 - a process boundary: it is raised at the leader as it was
                return _packed(error)

    def _pull(self) -> None:
        report: dict[str, Any] | None = None
        while True:
            order: Any = ray.get(self._broker.next.remote(self._who, report))
            report = None
            if order["do"] == "go":
                return
            if order["do"] == "stage":
                report = self._run(order["stage"], order["attempt"], order["helpers"], order["few"])

    def _run(self, stage: Stage, attempt: str, lent: list[str], few: bool) -> dict[str, Any]:
        self._progress, self._lent, self._stage, self._attempt = {}, lent, stage, attempt
        runtime = self._charter.runtime
        context = StageContext(
            pool=RayPool(self._helpers),
            device="cuda:0" if self._shape.gpus else "cpu",
            progress=self._tell,
            checkpoint_seconds=runtime.checkpoint_seconds,
            memmap_bytes=runtime.memmap_bytes,
            most_images=FEW_IMAGES if few else None,
        )
        report: dict[str, Any] = {"key": stage.key, "attempt": attempt, "kind": ""}
        began = time.monotonic()
        with self._hands:  # an item for another worker may just be ending
            self._box = ("", None)
            try:
                report["computed"] = self._work(stage, self._store, attempt, context)[1]
                report["beside"] = [(each.key, self._made(each.key, attempt)) for each in stage.beside]
            except MissingInput as error:
                report |= {"kind": "failed", "missing": error.key, "cause": f"MissingInput: {error}", "traceback": ""}
            except BaseException as error:  # noqa: BLE001 - a process boundary: any error of a stage is that stage's failure
                kind = kind_of(error, self._store.root)
                report |= {"kind": kind, "cause": line_of(error), "traceback": traceback.format_exc()}
            finally:
                self._stage, self._attempt, self._lent = None, "", []
        self._give_memory_back()
        return report | {"seconds": time.monotonic() - began}

    def _give_memory_back(self) -> None:
        """To others on the same GPU; here, where an error that held tensors is gone."""
        torch = sys.modules.get("torch")
        if torch is not None and self._shape.gpus:
            torch.cuda.empty_cache()

    def _made(self, key: str, attempt: str) -> bool:
        """Whether this attempt published a stage beside the one that it was given."""
        artifact = self._store.find(key)
        return artifact is not None and artifact.record.get("attempt") == attempt

    def _tell(self, values: Mapping[str, float]) -> None:
        self._progress = dict(values)

    def _helpers(self) -> Mapping[str, Any]:
        lent = list(self._lent)
        for name in lent:
            if name not in self._handles:
                try:
                    self._handles[name] = ray.get_actor(name, namespace=self._charter.namespace)
                except ValueError:
                    continue  # it died since
        return {name: self._handles[name] for name in lent if name in self._handles}

    def _beat(self) -> None:
        while True:
            attempt, stage = self._attempt, self._stage
            reply: Any = ray.get(self._broker.beat.remote(self._who, stage, attempt if stage else "", self._progress))
            if reply["die"]:
                return
            if attempt and attempt == self._attempt:
                self._lent = reply["helpers"]
            time.sleep(self._charter.runtime.heartbeat_seconds)


def start(config: SchedulerConfig, name: str, shape: WorkerShape, node: str) -> Any:
    """A worker that is about to live on `node`, or elsewhere if it is gone: the handle of its actor."""
    actor = ray.remote(WorkerActor).options(
        name=name,
        namespace=config.namespace,
        lifetime="detached",
        num_cpus=shape.cpus,
        num_gpus=shape.gpus,
        max_restarts=0,
        max_concurrency=8,
        runtime_env={"env_vars": dict(config.environment)},
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
    )
    return actor.remote(config, name, shape)


def _to_the_end(body: Callable[[], None]) -> None:
    """Run one of the two threads; without either of them this process is of no use, however the other one is doing."""
    try:
        body()
    except ray.exceptions.RayError:
        pass  # the scheduler is no more
    except BaseException:  # noqa: BLE001 - the last frame of a thread; the log keeps it
        traceback.print_exc()
    os._exit(0)


def _packed(error: Exception) -> bytes:
    try:
        packed = bytes(cloudpickle.dumps((False, error)))
        cloudpickle.loads(packed)
    except Exception:  # noqa: BLE001 - an error may be of any class; one that does not travel goes as its text
        return bytes(cloudpickle.dumps((False, RuntimeError(line_of(error)))))
    return packed
