"""The search: which pair to try next, when to stop one early, and a journal of all that was tried.

Pure logic: no Ray, nothing is computed, and the clock is an argument. It may import the words of the root, `ops`, `pipeline`,
`cost_model` and plugins; of these it reads specs and names. Optuna is imported in this room only.

Start with `study.py`, which has the states of a trial and asks all others. A space: `space_file.py` (the YAML), `space_tree.py`
(its operators and parameters), `space.py`, `space_check.py`. Draws: `draws.py`, `sampler.py`, `surrogate.py`. Early stopping:
`halving.py`. Limits: `budget.py`. On disk: `journal.py`; for readers: `history.py`.
"""
