"""Evaluations: one file each, with `Spec`, `REVISION`, `NEEDS_LABELS`, `DIRECTION` and `evaluate(...)`. Start with `knn`.

- `Spec` extends `EvaluationFields` of `ktray.spec` or has the same fields: `name`, `of`, `layer`, `pool` and `split`, and where
  it reads features, `network_precision`.
- `NEEDS_LABELS` says whether the target data must have labels. An evaluation that needs none but uses them where they exist
  declares whose it reads, ``MAY_READ_LABELS = ("train",)`` or ``("train", "judged")``, so that a report can count them.
- `NEEDS_ANNOTATIONS` names what the images must have besides: of ``("presence", "boxes", "mask")``, attributes of
  `ktray.images.Source`. What the data lack is then refused before anything runs. `NEEDS_LABELS` means one class per image.
- `DIRECTION` maps the metrics that can be an objective to "max" or "min": all that `evaluate` returns, but for those of which
  neither way is better, such as numbers of labels or the ends of an interval. Where the metrics depend on the spec, such as on
  several k, ``directions(spec)`` returns them all, and `DIRECTION` has those that every spec gives.
- An evaluation that judges image by image writes `per_image.parquet` (`ktray.scoring.per_image`) into `out`, from which
  standard errors and comparisons of students follow. Where a metric is no mean over images, ``recompute(columns, rows)``
  computes it anew.
- `evaluate` returns the metrics as dict[str, float]. It calls ``features(images)`` for the features (N, D) float32 of the
  training and of the judged images, and may write plots into the folder `out`, each inside `plots.optional_plot`.
- With ``READS_PSEUDO_LABELS = True`` it gets the pair's pseudo-labels, with the transfer's images as `train`, and no features.
- With ``READS_NETWORK = True`` it also gets `network` (`features.judged_network.JudgedNetwork`) and `attempt`
  (`checkpoints.Attempt`): the network itself, and checkpoints for long work. With ``READS_SPLITS = True`` it gets `images_of`,
  a function from ``"train"``, ``"val"`` or ``"test"`` to the images of that split, or None.
- `FILES` names fields of the `Spec` that may hold the path of a file. In a key it counts by its content.
- ``check(spec)`` refuses a spec in `plan`, such as one whose files or libraries are missing. ``check_network(spec, network,
  size)`` refuses a network, untrained and in eval mode, that the evaluation cannot train on images of `size` pixels.
  ``check_images(spec, names)`` refuses images to train or judge on, such as those that a file of its own does not have.
- A spec of an evaluation that trains says how long in `steps`, or in `epochs`, and how often in `seeds`: `plan` estimates its
  seconds from these, and a dry run takes as few as possible.
- ``READS_PIXELS = True`` says that it asks for features of images with changed pixels, which a file of features does not have.
  ``FITS_MASKS = True`` says that it fits masks to the squares of the data, so it cannot judge crops of a network's own.
  ``DEPENDS_ON_MACHINE = True`` says that its metrics do; the record then says so, too.

An evaluation may import the tools (`ktray.images`, `ktray.classifiers`, `ktray.scoring`, ...) and `ktray.spec`, but no plugin.
"""
