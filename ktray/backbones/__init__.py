"""Networks for teachers and students: one file each, `Spec`, `REVISION`, `build(spec) -> nn.Module`."""
