"""Pretext tasks: one file each, `Spec`, `REVISION`, `task(spec, size) -> Task`.

A task that looks at the data first says what it looks for, ``NEEDS = ("labels",)`` or ``NEEDS = ("colours",)``. It is then
``task(spec, size, images)``, with the training images of the pretext data; data without that is refused before anything runs.

Where the loss is a mean over images, the Task says so (`mean_over_images`): then a batch that does not fit into the memory can
go through the network in parts. A loss that compares images, as SimCLR's, must not say it.

A plan asks two more, where there are any: ``check(spec)`` refuses what cannot be made, and ``quick(spec)`` gives a spec of the
same shapes that takes no time to try.
"""
