"""From a pair to its stages, and from a stage to its artifact.

May import stages, methods, tools and stores, never the scheduler. Start with `pair_graph` (the stages of a pair), then with
`execute` (how one stage becomes an artifact).
"""
