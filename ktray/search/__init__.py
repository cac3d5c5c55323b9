"""The search: chooses the next pair to try, stops poor trials early, and keeps a journal of all trials.

Pure logic: it uses no Ray, runs no stage and takes the clock as an argument. It may import the modules of the package's root,
`ops`, `pipeline`, `cost_model`, `stores` and the plugins, of which it uses only specs and names. Nothing outside this
subpackage imports Optuna.

Start with `study.py`, which defines the states of a trial and uses everything else. Search spaces: `space_file.py` (the YAML),
`space_tree.py` (operators and parameters), `space.py`, `space_check.py`. Draws: `draws.py`, `sampler.py`, `surrogate.py`,
`tpe.py`. Early stopping: `halving.py`. Limits: `budget.py`. Files: `journal.py` writes them, `history.py` reads them.
"""
