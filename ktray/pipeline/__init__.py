"""From a pair to its stages, and from a stage to its artifact.

Imports stages, methods, tools and stores, never the scheduler. Start with `pair_graph` (what a pair consists of), then with
`execute` (how one stage becomes an artifact).
"""
