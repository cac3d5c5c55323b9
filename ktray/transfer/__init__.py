"""Transfers: one file each, with `Spec`, `REVISION`, `NEEDS` and `task(spec, targets, augment) -> Task`. Start with `clusters`.

`NEEDS` maps each input of the student's stage to the fields of the Spec that determine it; all other fields belong to the
student's stage. The inputs are "clusters" and "pseudo_labels" (always together; several of each where the field `k` is a list),
"features" (the teacher's features of the images that the student is trained on) and "labels" (the images' own). The first three
need a teacher, so the stages that produce them join the pair. A transfer without `task` trains nothing. The Spec of a transfer
by clusters extends `KMeansFields` of `ktray.spec`, and its `NEEDS["clusters"]` is `KMEANS_FIELDS`; one that clusters positions
adds `grid`, `sample` and `whole` (see `dense_clusters`).

A task whose loss is a mean over images sets `mean_over_images` in its Task. A batch that does not fit into memory can then be
split into micro-batches.

Optional: ``check(spec, count, clustered)`` raises UserError, naming the field, for a spec that cannot be met with `count`
training images of the student and `clustered` images whose features are clustered (0 if the transfer needs no clusters).

Optional: ``MIXES_IMAGES = True`` where `task` also mixes targets as ``augment.mixup`` and ``augment.cutmix`` ask for
(`ktray.ops.mixing`); `plan` refuses these for any other transfer.

``SEVERAL_TEACHERS = True`` where `task` also takes the heads of several teachers, those of the first one first, with as many of
each as the field `k` says.

``READS_MAPS = True`` where the targets are of positions in the image and follow the crops and flips of the views; `plan`
refuses RandAugment for them, which moves images in other ways.

``check_networks(spec, teacher, student, size)`` raises UserError, naming the field, for a teacher (layer and pooling of its
features; None if it is no network) and a student (its untrained backbone, for images of `size` px) that do not go together.

A transfer may import the tools (`ktray.ops`, `ktray.training`) and `ktray.spec`, but no other plugin.
"""
