"""Evaluations: one file each, `Spec`, `REVISION`, `NEEDS_LABELS`, `DIRECTION`, `evaluate(...) -> dict[str, float]`.

`Spec` has `name`, `of` ("student" or "teacher"), `layer`, `pool` and `split` ("val" or "test") beside its own fields.
``NEEDS_LABELS`` says whether the target data must have labels; one that needs none but reads those that there are says whose,
``MAY_READ_LABELS = ("train",)`` or with "judged", so that a report can count them. ``DIRECTION`` names each metric that a
search may use, and which way it is better. `evaluate` asks ``features(images)`` for (N, D) float32 of the training and the
judged images, and may write plots into `out`. One with ``READS_PSEUDO_LABELS = True`` gets those of the pair, with the
transfer's images as training images, and is asked for no features. See `knn`.
"""
