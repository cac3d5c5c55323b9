"""Pretext tasks: one file each, `Spec`, `REVISION`, `task(spec, size) -> Task`."""
