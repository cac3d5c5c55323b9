"""Classifiers on frozen features, which several evaluations share: linear ones with their solver, and nearest neighbours.

Functions of tensors, on any device. May import only the modules at the package's root. Start with `linear_classifiers.py`.
"""
