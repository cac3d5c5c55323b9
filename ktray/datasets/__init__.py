"""Data sets: one file each, `Spec`, `REVISION`, `load(spec) -> Splits`."""
