"""What a scheduler is doing at one moment, as its broker tells drivers. Pure: read from the core."""

from __future__ import annotations

from typing import Any

from ktray.scheduler.core import SchedulerCore


def overview(core: SchedulerCore, now: float) -> dict[str, Any]:
    """What works, waits and is queued, and what was computed and reused so far."""
    return {
        "workers": [
            {"name": each.name, "node": each.node, "pid": each.pid, "cpus": each.shape.cpus, "gpus": each.shape.gpus}
            | {"state": "stage" if each.leads else "helping" if each.lent_to else "idle" if each.polling else "starting"}
            | {"silent_seconds": round(now - each.beat, 3) if each.beat else None}
            for each in core.registry.workers.values()
        ],
        "running": [
            {"key": run.key, "stage": run.stage.name, "worker": run.worker, "node": core.registry.node_of(run.worker)}
            | {"since": run.since, "progress": dict(run.progress), "silent_seconds": round(now - run.moved, 3)}
            | {"attempt": run.attempt, "pace_seconds": (run.moved - run.since) / run.moves if run.moves else None}
            | {"helpers": core.helpers(run.attempt)}
            for run in core.runs.values()
        ],
        "waiting": [
            {"waiter": request.waiter, "session": request.session, "key": key, "since": request.since}
            for request in core.demand.requests.values()
            if request.waiter
            for key in sorted(request.pending, key=lambda key: core.demand.wants[key].order)[:1]
        ],
        "queued": [key for key in core.demand.wants if key not in core.runs],
        "computed": dict(core.computed),
        "reused": dict(core.demand.reused),
    }
