"""The one model of how long stages run, learned from the records of finished ones.

Placement, the sampler, `ktray plan`, the ETA and the forecast of a dry run all ask it. May import the root's words, `stores/`
and `pipeline/`. Start with `stage_costs.py`.
"""
