"""Batched image operations on tensors: augmentation, colour spaces, patches, permutations; batch-independent products.

Functions of arrays and a random generator, on any device. May import only the root's words. Start with `augmentation.py`.
"""
