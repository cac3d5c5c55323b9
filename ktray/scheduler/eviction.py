"""Who must go, or stay idle, so that a stage finds the room that it needs. Pure, a part of what the core decides."""

from __future__ import annotations

from ktray.scheduler.gpu_slots import SLACK, has_room
from ktray.scheduler.placement import Placement
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.worker_registry import CPUS, WHOLE, Worker, WorkerShape, shape_of


def give_up(openings: Placement, shape: WorkerShape) -> list[Worker]:
    """Idle workers of other shapes that must go so that one of `shape` gets room; none if room is on its way."""
    idle = [worker for worker in openings.idle() if worker.shape != shape]
    if not idle or _is_on_its_way(openings, shape):
        return []
    others, places = {worker.name for worker in idle}, {worker.node for worker in idle}
    one_card = 0 < shape.gpus <= 1
    for place in [name for name in openings.registry.nodes if name in places]:
        for part in [*openings.cards(place), WHOLE] if one_card else [WHOLE]:
            chosen: list[Worker] = []
            for worker in [each for each in openings.staff[place] if each.name in others and each.lies_in(part)]:
                worker.leaving = True
                chosen.append(worker)
                if _will_have_room(openings, place, shape):
                    return chosen
            for worker in chosen:
                worker.leaving = False
    return []


def make(openings: Placement, shape: WorkerShape) -> list[Worker]:
    """Idle workers that must go for one of `shape`, although more have to end their work first.

    Meanwhile nothing else begins on the node, or on the card, where most of the room is.
    """
    registry = openings.registry
    places = [(name, card) for name in registry.nodes for card in (openings.cards(name) if shape.gpus else [CPUS])]
    if not places or _is_on_its_way(openings, shape):
        return []

    def progress(place: tuple[str, str]) -> tuple[float, str, str]:
        busy = [each for each in _at(openings, *place) if not (each.leaving or registry.available(each, openings.now))]
        return (-sum(each.shape.gpus if shape.gpus else each.shape.cpus for each in busy), *place)

    name, card = max(places, key=progress)
    registry.keep(name, card)
    chosen = [each for each in _at(openings, name, card) if each.shape != shape and registry.available(each, openings.now)]
    for worker in chosen:
        worker.leaving = True
    return chosen


def quiet(openings: Placement, needs: ResourceRequest) -> Worker | None:
    """A worker for a stage that must be alone on its node; else None, and nothing begins where it will be alone soonest."""
    registry, shape = openings.registry, shape_of(needs)
    # Where somebody of its shape is: nobody is hired where a node is kept, so elsewhere it would wait for ever.
    staffed = {each.node for each in registry.workers.values() if each.shape == shape and not each.leaving}
    able = [name for name, node in registry.nodes.items() if name in staffed and node.memory >= needs.memory_bytes]
    busy = {name: sum(each.leads is not None for each in openings.staff[name]) for name in able}
    soonest = sorted(able, key=lambda name: (busy[name], -registry.nodes[name].memory, name))
    for name in soonest:
        worker = openings.take(needs, name) if not busy[name] and name not in registry.kept else None
        if worker is not None:
            registry.keep(name)
            return worker
    if soonest:
        registry.keep(soonest[0])
    return None


def _at(openings: Placement, place: str, part: str) -> list[Worker]:
    return [each for each in openings.staff[place] if each.lies_in(part)]


def _is_on_its_way(openings: Placement, shape: WorkerShape) -> bool:
    """Whether there will be room without anybody else's going; for a shape of which nobody could be hired now."""
    if not openings.registry.kept and not any(worker.leaving for worker in openings.registry.workers.values()):
        return False
    return any(_will_have_room(openings, place, shape) for place in openings.registry.nodes)


def _will_have_room(openings: Placement, place: str, shape: WorkerShape) -> bool:
    """Whether a node has room once those who are leaving are gone."""
    node, stay = openings.registry.nodes[place], [worker for worker in openings.staff[place] if not worker.leaving]
    cpus = node.cpus - sum(worker.shape.cpus for worker in stay)
    gpus = node.gpus - sum(worker.shape.gpus for worker in stay)
    if cpus < shape.cpus or gpus < shape.gpus - SLACK:
        return False
    held = sum(worker.shape.cpus for worker in openings.registry.workers.values() if not worker.leaving)
    if held + shape.cpus > openings.registry.cpus:
        return False
    return not shape.gpus or has_room(openings.cards(place, leaving=False), shape.gpus)
