"""The judged network trained further by an evaluation: as a classifier of images, as a detector, or for label maps.

May import the other tools. Start with `image_classifier.py`; the optimiser's steps are those of `training/loop.py: fit_steps`.
"""
