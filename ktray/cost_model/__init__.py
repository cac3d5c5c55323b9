"""The one model of how long stages run, learned from the records of finished stages.

Placement, the sampler, `ktray plan`, the ETA and the forecast of a dry run all ask it. May import the root's words, `stores/`
and `pipeline/`; `stage_costs.py`, which the broker imports, needs neither torch nor, before its first record, numpy. Start
with `CostModel` in `stage_costs.py`.
"""
