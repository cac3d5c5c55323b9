"""k-means over shards of features, the projection that precedes it, and the pseudo-labels derived from it.

May import `ops/` and `images/`. Start with `kmeans.py`, then `projection.py` and `pseudo_labelling.py`.
"""
