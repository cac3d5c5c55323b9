"""k-means over shards of features, the projection before it, and the pseudo-labels that come out of it.

May import the root's words and `ops/`. Start with `kmeans.py`, then `projection.py` and `pseudo_labelling.py`.
"""
