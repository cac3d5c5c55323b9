"""The training loop for pretext tasks, students and probes, and the training problems that it solves.

May import `ops/` and `images/`. Optimiser steps are taken nowhere else. Start with `task.py` (the problem), then `loop.py`.
"""
