"""The work behind each verb: run a search on Ray Tune or a simulated cluster, run pairs, plan, dry-run, judge, export, report.

May import everything but `api` and `cli`. Start with `search_run.py`, then `coordinator.py` (between the study and the stages)
and `tune_search.py` (between the coordinator and Ray Tune); `settings.py` has what every verb is given.
"""
