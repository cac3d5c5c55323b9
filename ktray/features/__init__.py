"""Features (N, D) of images: from a layer of a network, from a descriptor, or from a file of precomputed features.

May import `ops/`, `training/` and `images/`. Start with `extraction.py`.
"""
