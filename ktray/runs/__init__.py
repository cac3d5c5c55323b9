"""What the verbs do: run a search on Ray Tune, simulate one, check a cluster, dry-run a space, report a study's status.

May import everything but `api` and `cli`. Start with `search_run.py`.
"""
