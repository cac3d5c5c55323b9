"""Pretext tasks: one file each, with `Spec`, `REVISION` and `task(spec, size) -> Task`. Start with `rotation`.

A task that must inspect the training data declares ``NEEDS = ("labels",)`` or ``NEEDS = ("colours",)`` and is defined as
``task(spec, size, images)``, where `images` are the training images of the pretext data. Data that lacks what the task needs
is refused before anything runs.

Random draws are made apart from the batch, as tensors on the CPU, and are applied on any device. A task that does nothing else
on the CPU sets `capturable` in its Task: its steps are then replayed as CUDA graphs, which is several times faster.

A task whose loss is a mean over images sets `mean_over_images` in its Task. A batch that does not fit into memory can then be
split into micro-batches. A loss that compares images within the batch, such as SimCLR's, must not set it.

Optional: ``check(spec)`` raises UserError for a spec that cannot be built, and ``quick(spec)`` returns a spec with the same
tensor shapes that is cheap to set up, for the preflight.

A pretext task may import the tools (`ktray.ops`, `ktray.training`, `ktray.images`) and `ktray.spec`, but no other plugin.
"""
