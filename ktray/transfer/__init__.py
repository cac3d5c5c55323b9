"""Ways to transfer: one file each, `Spec`, `REVISION`, `NEEDS`, `task(spec, targets, augment) -> Task`.

NEEDS says what the student reads, and which fields of the Spec determine it; all other fields belong to the student's stage:
"clusters" and "pseudo_labels" (together; several, where the field `k` is a list), "features" (the teacher's, of the images
that the student is trained on), "labels" (the images' own). The first three need a teacher, and the stages before them follow.
A transfer without `task` trains nothing. Of a Task whose loss is a mean over images, `mean_over_images`, a batch that does not
fit into the memory can go through the network in parts.

A plan asks one more, where there is any: ``check(spec, count, clustered)`` refuses what cannot be made of `count` images that
the student is trained on and `clustered` images whose features are clustered (0 where none are), and names the field.
"""
