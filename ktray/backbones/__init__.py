"""Networks for teachers and students: one file each, `Spec`, `REVISION`, `build(spec) -> nn.Module`.

A file whose network is also one of torchvision's says so to those who get an exported student: `HEAD`, the name of the linear
classifier there ("head" if absent), and `in_torchvision(spec) -> str | None`, the model as code, up to its head.
"""
