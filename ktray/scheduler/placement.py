"""Placement: which worker runs a stage, where new workers start, which idle ones are evicted to make room. Pure.

`DispatchCapacity` is what one dispatch has to give out: idle workers and free room. A stage takes an idle worker of its shape;
without one, `WorkerAutoscaler` starts a worker where there is room, evicts idle workers of other shapes, or, after a while,
reserves a node until enough of it is free.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

from ktray.scheduler.messages import Action, RetireWorker, StartWorker
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.worker_registry import CPU_PART, WHOLE_NODE, Worker, WorkerRegistry, WorkerShape, worker_shape_for

RESERVE_AFTER = 30.0  # seconds that a stage waits for a worker of its shape before a node is reserved for it
FAILED_STARTS = 3  # rounds of workers that die before their first heartbeat, until what waits fails
AFFINITY_CANDIDATES = 64  # idle workers that one stage looks at for the one that knows most of its inputs
SHARE_TOLERANCE = 1e-6  # shares of a GPU are sums of floats

# ---- GPU slots


def free_gpu_shares(count: float, held: Sequence[tuple[float, tuple[str, ...]]]) -> dict[str, float]:
    """GPU -> share that is free; halves of two GPUs do not make a whole one.

    Args:
        count: GPUs of the node.
        held: (share or number of GPUs, their ids) of each worker; without ids while it is still starting. Such a worker is
            assumed where Ray puts it: a share on the fullest GPU that still has room, whole GPUs on free ones.
    """
    known = sorted({gpu for _, gpus in held for gpu in gpus})
    free = dict.fromkeys([*known, *(f"unnamed {number}" for number in range(int(count) - len(known)))], 1.0)
    for share, gpus in held:
        for gpu in gpus:
            free[gpu] -= share if share < 1 else 1.0
    for share, gpus in held:
        if gpus or not share:
            continue
        candidates = [gpu for gpu in free if free[gpu] >= min(share, 1.0) - SHARE_TOLERANCE]
        for gpu in sorted(candidates, key=lambda gpu: (free[gpu], gpu))[: max(1, math.ceil(share))]:
            free[gpu] -= min(share, 1.0)
    return free


def gpus_have_room(free: dict[str, float], gpus: float) -> bool:
    """Whether a worker with this share, or number, of GPUs can start."""
    if not gpus:
        return True
    return sum(share >= min(gpus, 1.0) - SHARE_TOLERANCE for share in free.values()) >= math.ceil(gpus)


# ---- the view of one dispatch


class DispatchCapacity:
    """Which workers are idle and what each node has left: counted once per dispatch, then kept up to date.

    Attributes:
        starting: shape -> workers that were started and have sent no heartbeat yet.
        unserved: shape -> stages that have found no worker in this dispatch.
        lent: attempt -> workers that are lent to it.
    """

    def __init__(self, registry: WorkerRegistry, now: float) -> None:
        self.registry, self.now = registry, now
        self.starting: Counter[WorkerShape] = Counter()
        self.unserved: Counter[WorkerShape] = Counter()
        self.lent: Counter[str] = Counter()
        self._available: dict[WorkerShape, list[Worker]] = {}
        self._full: set[WorkerShape] = set()
        free: list[Worker] = []
        lent: list[Worker] = []
        for worker in registry.workers.values():  # hot loop: of a thousand workers nearly all are busy
            if worker.last_heartbeat is None:
                self.starting[worker.shape] += 1
            elif worker.lent_to is not None:
                self.lent[worker.lent_to] += 1
                lent.append(worker)
            elif worker.attempt is None:
                free.append(worker)
        for group in (lent, free):  # workers are taken from the end of the list, so lent ones are taken last
            for worker in sorted(
                reversed(group), key=lambda worker: self._is_cpu_worker_on_gpu_node(worker.node, worker.shape), reverse=True
            ):
                if registry.is_available(worker, now):
                    self._available.setdefault(worker.shape, []).append(worker)

    def _is_cpu_worker_on_gpu_node(self, name: str, shape: WorkerShape) -> bool:
        """Whether a worker without a GPU would take CPUs of a node with GPUs, which need them for data loading."""
        node = self.registry.nodes.get(name)
        return node is not None and node.gpus > 0 and not shape.gpus

    @cached_property
    def all_workers_by_node(self) -> dict[str, list[Worker]]:
        """Node -> its workers, retiring ones included."""
        found: dict[str, list[Worker]] = {name: [] for name in self.registry.nodes}
        for worker in self.registry.workers.values():
            found.setdefault(worker.node, []).append(worker)
        return found

    @cached_property
    def _held_resources(self) -> dict[str, WorkerShape]:
        """Node -> what its workers hold, retiring ones included."""
        cpus, gpus = dict.fromkeys(self.registry.nodes, 0.0), dict.fromkeys(self.registry.nodes, 0.0)
        for worker in self.registry.workers.values():
            cpus[worker.node] = cpus.get(worker.node, 0.0) + worker.shape.cpus
            gpus[worker.node] = gpus.get(worker.node, 0.0) + worker.shape.gpus
        return {name: WorkerShape(cpus[name], gpus[name]) for name in cpus}

    @cached_property
    def _free_memory(self) -> dict[str, float]:
        """Node -> bytes that no stage reserves."""
        free = {name: node.memory for name, node in self.registry.nodes.items()}
        for worker in self.registry.workers.values():
            free[worker.node] = free.get(worker.node, 0.0) - worker.reserved_memory
        return free

    def available_workers(self) -> list[Worker]:
        """All workers that wait for a stage, of any shape, including those on reserved nodes."""
        return [worker for workers in self._available.values() for worker in workers if not worker.retiring]

    def take_available_worker(
        self,
        request: ResourceRequest,
        node: str | None = None,
        keys: Collection[str] = (),
        idle_since: float = float("inf"),
    ) -> Worker | None:
        """A worker that can serve the request at once, or None.

        One that is not lent goes before one that is and, for a request without a GPU, one on a node without GPUs before others.
        Among equals it is the one that has read or made most of `keys`: it may still have them in memory.

        Args:
            node: only workers on this node; None for all.
            keys: what the stage reads, and the snapshots that it may continue.
            idle_since: only workers that had no stage after this moment.
        """
        idle = self._available.get(worker_shape_for(request), [])
        best, best_rank = -1, (False, False, -1)
        for looked_at, index in enumerate(reversed(range(len(idle)))):
            worker = idle[index]
            if worker.retiring or worker.node != (node or worker.node) or self.registry.must_stay_idle(worker):
                continue
            if worker.last_busy > idle_since or self._free_memory[worker.node] < request.memory_bytes:
                continue
            free, preferred = worker.lent_to is None, not self._is_cpu_worker_on_gpu_node(worker.node, worker.shape)
            if best >= 0 and (free, preferred) != best_rank[:2]:
                break  # the list is in this order, so all further ones come later
            rank = (free, preferred, worker.affinity(keys))
            if best < 0 or rank > best_rank:
                best, best_rank = index, rank
            if not keys or rank[2] >= len(keys) or looked_at >= AFFINITY_CANDIDATES:
                break
        if best < 0:
            return None
        worker = idle.pop(best)
        self._free_memory[worker.node] -= request.memory_bytes
        return worker

    def take_worker_on_idle_node(self, request: ResourceRequest) -> Worker | None:
        """A worker on a node where nothing else runs; else None, and the node that will be free soonest is reserved."""
        registry, shape = self.registry, worker_shape_for(request)
        # Only nodes that already have a worker of the shape, because no worker starts on a reserved node.
        equipped = {worker.node for worker in registry.workers.values() if worker.shape == shape and not worker.retiring}
        able = [name for name, node in registry.nodes.items() if name in equipped and node.memory >= request.memory_bytes]
        busy = {name: sum(worker.attempt is not None for worker in self.all_workers_by_node[name]) for name in able}
        soonest = sorted(able, key=lambda name: (busy[name], -registry.nodes[name].memory, name))
        for name in soonest:
            worker = self.take_available_worker(request, name) if not busy[name] and name not in registry.reserved else None
            if worker is not None:
                registry.reserve(name)
                return worker
        if soonest:
            registry.reserve(soonest[0])
        return None

    def lendable_workers(self, shape: WorkerShape) -> list[Worker]:
        """Idle workers that are not lent, in the order in which `take_available_worker` would take them."""
        free = [worker for worker in reversed(self._available.get(shape, ())) if worker.lent_to is None and not worker.retiring]
        return [worker for worker in free if not self.registry.must_stay_idle(worker)] if self.registry.reserved else free

    def place_worker(self, shape: WorkerShape) -> Worker | None:
        """A new worker, registered on the node with most room; None if no node has room for it."""
        node = None if shape in self._full else self._node_with_most_room(shape)
        if node is None:
            self._full.add(shape)
            return None
        held, neighbours = self._held_resources[node], self.all_workers_by_node[node]
        worker = self.registry.register_new(shape, node)
        neighbours.append(worker)
        self._held_resources[node] = WorkerShape(held.cpus + shape.cpus, held.gpus + shape.gpus)
        self.starting[shape] += 1
        return worker

    def _node_with_most_room(self, shape: WorkerShape) -> str | None:
        if sum(held.cpus for held in self._held_resources.values()) + shape.cpus > self.registry.cpu_limit:
            return None
        best, best_room = None, (False, -2.0, -2.0)
        for name, node in self.registry.nodes.items():
            cpus, gpus = node.cpus - self._held_resources[name].cpus, node.gpus - self._held_resources[name].gpus
            # A silent node comes last: Ray takes a minute to notice that a node is gone.
            responsive = name not in self.registry.silent_nodes
            room = (responsive, gpus if shape.gpus else -float(self._is_cpu_worker_on_gpu_node(name, shape)), cpus)
            if cpus < shape.cpus or gpus < shape.gpus - SHARE_TOLERANCE or room <= best_room or name in self.registry.reserved:
                continue
            if not shape.gpus or gpus_have_room(self.free_gpu_shares_now(name), shape.gpus):
                best, best_room = name, room
        return best

    def free_gpu_shares_now(self, node: str) -> dict[str, float]:
        """GPU -> share that is free now."""
        return self._free_gpu_shares(node, self.all_workers_by_node[node])

    def free_gpu_shares_after_retirement(self, node: str) -> dict[str, float]:
        """GPU -> share that will be free once the retiring workers are gone."""
        return self._free_gpu_shares(node, [worker for worker in self.all_workers_by_node[node] if not worker.retiring])

    def _free_gpu_shares(self, node: str, workers: Sequence[Worker]) -> dict[str, float]:
        return free_gpu_shares(self.registry.nodes[node].gpus, [(worker.shape.gpus, worker.gpu_ids) for worker in workers])


# ---- eviction


def evict_idle(capacity: DispatchCapacity, shape: WorkerShape) -> list[Worker]:
    """Retire idle workers of other shapes until a worker of `shape` has room; none if that room is expected anyway.

    Returns:
        The workers that retire now; empty if retiring all idle workers of a node would not suffice anywhere.
    """
    idle = [worker for worker in capacity.available_workers() if worker.shape != shape]
    if not idle or _has_room_after_retirement(capacity, shape):
        return []
    names, nodes = {worker.name for worker in idle}, {worker.node for worker in idle}
    on_one_gpu = 0 < shape.gpus <= 1
    for node in [name for name in capacity.registry.nodes if name in nodes]:
        for part in [*capacity.free_gpu_shares_now(node), WHOLE_NODE] if on_one_gpu else [WHOLE_NODE]:
            evicted: list[Worker] = []
            for worker in [each for each in capacity.all_workers_by_node[node] if each.name in names and each.uses(part)]:
                worker.retiring = True
                evicted.append(worker)
                if _node_has_room_once_retiring_workers_left(capacity, node, shape):
                    return evicted
            for worker in evicted:
                worker.retiring = False
    return []


def reserve_room(capacity: DispatchCapacity, shape: WorkerShape) -> list[Worker]:
    """Reserve the node, or the GPU, where a worker of `shape` will soonest have room: no stage starts there meanwhile.

    Returns:
        The idle workers that retire there now; others must end their stages first.
    """
    registry = capacity.registry
    parts = [
        (name, gpu) for name in registry.nodes for gpu in (capacity.free_gpu_shares_now(name) if shape.gpus else [CPU_PART])
    ]
    if not parts or _has_room_after_retirement(capacity, shape):
        return []

    def preference(part: tuple[str, str]) -> tuple[float, str, str]:
        users = _workers_using_part(capacity, *part)
        busy = [worker for worker in users if not (worker.retiring or registry.is_available(worker, capacity.now))]
        return (-sum(worker.shape.gpus if shape.gpus else worker.shape.cpus for worker in busy), *part)

    node, part = max(parts, key=preference)
    registry.reserve(node, part)
    evicted = [
        worker
        for worker in _workers_using_part(capacity, node, part)
        if worker.shape != shape and registry.is_available(worker, capacity.now)
    ]
    for worker in evicted:
        worker.retiring = True
    return evicted


def _workers_using_part(capacity: DispatchCapacity, node: str, part: str) -> list[Worker]:
    """The workers on a part of a node: one GPU, its CPUs or all of it."""
    return [worker for worker in capacity.all_workers_by_node[node] if worker.uses(part)]


def _has_room_after_retirement(capacity: DispatchCapacity, shape: WorkerShape) -> bool:
    """Whether a shape that has no room now will have it once the workers that already retire are gone."""
    if not capacity.registry.reserved and not any(worker.retiring for worker in capacity.registry.workers.values()):
        return False
    return any(_node_has_room_once_retiring_workers_left(capacity, node, shape) for node in capacity.registry.nodes)


def _node_has_room_once_retiring_workers_left(capacity: DispatchCapacity, name: str, shape: WorkerShape) -> bool:
    """Whether a node has room once its retiring workers are gone."""
    node, staying = capacity.registry.nodes[name], [each for each in capacity.all_workers_by_node[name] if not each.retiring]
    cpus = node.cpus - sum(worker.shape.cpus for worker in staying)
    gpus = node.gpus - sum(worker.shape.gpus for worker in staying)
    if cpus < shape.cpus or gpus < shape.gpus - SHARE_TOLERANCE:
        return False
    held = sum(worker.shape.cpus for worker in capacity.registry.workers.values() if not worker.retiring)
    if held + shape.cpus > capacity.registry.cpu_limit:
        return False
    return not shape.gpus or gpus_have_room(capacity.free_gpu_shares_after_retirement(name), shape.gpus)


# ---- scaling


class WorkerAutoscaler:
    """Starts, lends and retires workers, so that waiting stages find one of their shape.

    Args:
        registry: the workers.
        outbox: actions are appended to it.

    Attributes:
        failed_starts: rounds in a row of workers that died before their first heartbeat; while it is not 0, workers start only
            for stages that wait.
    """

    def __init__(self, registry: WorkerRegistry, outbox: list[Action]) -> None:
        self.registry, self.outbox = registry, outbox
        self.failed_starts = 0
        self._gpu_workers_prestarted = False
        self._same_round = set[str]()
        self._waiting_since: dict[WorkerShape, float] = {}

    def prestart(self, workers: int, gpu_share: float = 0.0, gpu_workers: int = 0) -> None:
        """Start workers before the first stage comes: of the usual shape, until there are this many without a GPU.

        Args:
            gpu_share: of a GPU that a training will get. Once, as soon as there are GPUs, workers with this share start on all
                of them: they load libraries while images are decoded. Later ones start on demand, with the share that is
                known to be needed by then.
            gpu_workers: how many at most.
        """
        if self.failed_starts:
            return
        capacity, on_cpus = DispatchCapacity(self.registry, 0.0), 0
        for worker in self.registry.workers.values():
            on_cpus += not worker.shape.gpus
            self._gpu_workers_prestarted |= worker.shape.gpus > 0
        for _ in range(workers - on_cpus):
            self._start_worker(WorkerShape(), capacity)
        if gpu_share and not self._gpu_workers_prestarted and any(node.gpus for node in self.registry.nodes.values()):
            for _ in range(gpu_workers):
                self._gpu_workers_prestarted |= self._start_worker(WorkerShape(0.0, gpu_share), capacity)

    def _start_worker(self, shape: WorkerShape, capacity: DispatchCapacity) -> bool:
        worker = capacity.place_worker(shape)
        if worker is not None:
            self.outbox.append(StartWorker(worker))
        return worker is not None

    def count_failed_start(self, worker: Worker) -> bool:
        """Count a worker that died before its first heartbeat; True every `FAILED_STARTS` rounds, when it is time to give up.

        A worker that was lost with its node does not count. Of those that were starting at the same time only one counts: a
        node may take all of them with it before anybody hears that it is gone.
        """
        if worker.node not in self.registry.nodes or worker.name in self._same_round:
            return False
        self._same_round = {each.name for each in self.registry.workers.values() if each.last_heartbeat is None}
        self.failed_starts = (self.failed_starts + 1) % FAILED_STARTS
        return not self.failed_starts

    def start_worker_or_make_room(self, shape: WorkerShape, exclusive: bool, capacity: DispatchCapacity) -> bool:
        """Start a worker for a stage that has none, or begin to make room for one; False if it must wait for that room.

        Args:
            exclusive: the stage ran out of memory and gets room at once, not only after `RESERVE_AFTER`.
        """
        capacity.unserved[shape] += 1
        if capacity.starting[shape] >= capacity.unserved[shape] or self._start_worker(shape, capacity):
            return True
        evicted = evict_idle(capacity, shape)
        if any(worker.shape == shape for worker in self.registry.workers.values()):
            self._waiting_since.pop(shape, None)
        else:
            # A stream of small stages would starve a large one, which never finds all of its room free at once.
            since = self._waiting_since.setdefault(shape, capacity.now)
            if not evicted and (exclusive or capacity.now - since >= RESERVE_AFTER):
                evicted = reserve_room(capacity, shape)
        self.outbox += [RetireWorker(worker.name) for worker in evicted]
        return False

    def forget_served_shapes(self, capacity: DispatchCapacity) -> None:
        """Drop the waiting times of shapes that no stage waits for any more; by now every waiting stage was seen."""
        self._waiting_since = {shape: since for shape, since in self._waiting_since.items() if capacity.unserved[shape]}

    def lend_workers(
        self, shape: WorkerShape, wanted: Mapping[str, int], may_start: Collection[str], capacity: DispatchCapacity
    ) -> None:
        """Lend idle workers of a shape to attempts in equal parts, and start some for them where there is room.

        Helpers go over from an attempt that has at least two more than another one wants: each item of work is sent on its own,
        so a worker may change its leader between two of them.

        Args:
            wanted: attempt -> most helpers that it can use, the oldest attempt first.
            may_start: the attempts for which workers may start.
        """
        lent = {attempt: capacity.lent[attempt] for attempt in wanted}
        hungry = [attempt for attempt in wanted if lent[attempt] < wanted[attempt]]
        for worker in capacity.lendable_workers(shape):
            if not hungry:
                return
            poorest = min(hungry, key=lent.__getitem__)  # of equals the oldest
            worker.lent_to = poorest
            lent[poorest] += 1
            if lent[poorest] == wanted[poorest]:
                hungry.remove(poorest)
        while hungry:
            poorest, richest = min(hungry, key=lent.__getitem__), max(lent, key=lent.__getitem__)
            if lent[richest] < lent[poorest] + 2:
                break
            helper = next(each for each in self.registry.workers.values() if each.lent_to == richest)
            helper.lent_to = poorest
            lent[richest] -= 1
            lent[poorest] += 1
            hungry = [attempt for attempt in wanted if lent[attempt] < wanted[attempt]]
        missing = sum(wanted[attempt] - lent[attempt] for attempt in hungry if attempt in may_start)
        for _ in range(missing - capacity.starting[shape]):
            if self.failed_starts or not self._start_worker(shape, capacity):
                break

    def lent_workers(self, attempt: str) -> list[str]:
        """Names of the workers that are lent to an attempt."""
        return [worker.name for worker in self.registry.workers.values() if worker.lent_to == attempt]
