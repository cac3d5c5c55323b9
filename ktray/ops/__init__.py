"""Batched image operations on tensors (augmentation, colour, patches, permutations) and reproducible matrix products.

Functions of arrays and a random generator, for any device. May import only the modules at the package's root and
the records of `images`. Start with `augmentation.py`.
"""
