"""Stages on warm Ray workers: each key is computed once for all that wait for it, and any process may be killed at any time.

The decisions are pure and know neither Ray nor a clock: `core.py`, with `requests.py` (pending stages and their order),
`worker_registry.py`, `placement.py` (GPU slots, eviction, starting workers), `fault_tolerance.py` (liveness, retries). On
Ray, `broker.py` carries them out, `worker.py` runs stages, `client.py` is what drivers and trials call, and `ray_session.py`
starts Ray or connects to a cluster. `local_scheduler.py` does without Ray.

May import the root's words, `stores/` and `cost_model/`. Start with `client.py`, then `broker.py`, then `core.py`.
"""
