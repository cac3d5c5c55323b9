"""Features (N, D) of images: from the layer of a network, from a descriptor, or read from a file that was made elsewhere.

May import `ops/`, `training/` and `images/`. Start with `extraction.py`.
"""
