"""Descriptors (handcrafted teachers): one file each, with `Spec`, `REVISION`, `describe`, optionally `fit`. Start with `hog`.

``describe(spec, state, images)`` returns features (B, D) float32 of images (B, H, W, 3) uint8. `state` is the dict of arrays
that ``fit(spec, images)`` returned for the training images, or None if the descriptor has no `fit`.

Optional: ``check(spec, size, count)`` raises UserError for a spec that cannot be met with `count` images of `size` px, and
``quick(spec)`` returns a spec with the same tensor shapes that can be fitted to two images, for the preflight.

A descriptor may import the tools (`ktray.ops`, `ktray.clustering`, `ktray.features`) and `ktray.spec`, but no other plugin.
"""
