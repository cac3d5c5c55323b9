"""Data sets: one file each, with `Spec`, `REVISION`, `LOCATION` and `load(spec) -> Splits`. Start with `folder`.

`Spec` has `size`, `split` and `max_unreadable` besides its own fields. `LOCATION` names the fields that only say where the data
is stored, such as ``("path",)``. They do not enter the identity of the data; its content does.

What an image has beside pixels is known from the spec alone, for the presets of evaluations: one label, unless
``annotations_of(spec)`` returns others of ``("labels", "presence", "boxes", "mask")``, attributes of `ktray.images.Source`.

A data set may import `ktray.images`, `ktray.spec`, `ktray.strict`, `ktray.errors` and `ktray.fingerprint`, but no other plugin.
"""
