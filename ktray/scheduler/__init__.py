"""Stages on warm Ray workers: one computation per key for all that wait for it; any process may be killed at any time.

Pure scheduling logic (`core.py` and what it uses) knows neither Ray nor a clock; `broker.py`, `client.py` and `worker.py`
run it on Ray. May import the root's words, `stores/` and `cost_model/`. Start with `client.py`, then `broker.py`, `core.py`.
"""
