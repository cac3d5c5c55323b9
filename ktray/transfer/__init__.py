"""Ways to transfer: one file each, `Spec`, `REVISION`, `NEEDS`, `task(spec, targets) -> Task`."""
