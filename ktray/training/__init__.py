"""The one training loop, for pretext tasks, students and probes, and the training problems that it solves.

May import `ops/` and `images/`; nothing else steps an optimiser. Start with `task.py` (the problem), then `loop.py`.
"""
