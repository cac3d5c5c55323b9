"""Data sets: one file each, `Spec`, `REVISION`, `LOCATION`, `load(spec) -> Splits`.

`Spec` has `size`, `split` and `max_unreadable` beside its own fields. ``LOCATION`` names those fields that only say where the
data lies, such as ``("path",)``: they are no part of the identity, the content is.
"""
