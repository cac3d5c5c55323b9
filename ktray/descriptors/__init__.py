"""Handcrafted teachers: one file each, `Spec`, `REVISION`, optional `fit`, `describe`.

``describe(spec, state, images)`` makes features (B, D) float32 of images (B, H, W, 3) uint8; `state` is what
``fit(spec, images)`` gave, a dict of arrays, or None. A plan asks two more, where there are any: ``check(spec, size, count)``
refuses what cannot be made of `count` images of `size` px, and ``quick(spec)`` gives a spec of the same shapes that two images
can fit.
"""
