"""Evaluations: one file each, `Spec`, `REVISION`, `evaluate(...) -> dict[str, float]`."""
