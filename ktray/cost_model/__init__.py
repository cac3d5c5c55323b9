"""The model of how long stages run, learned from the records of finished stages.

DispatchCapacity, the sampler, `ktray plan`, the ETA and the forecast of a dry run all use it. It may import the modules of the
package's root, `stores` and `stages`. The broker imports `stage_costs.py`, so that file imports no torch, and numpy only with
the first record. Start with `CostModel` in `stage_costs.py`.
"""
