"""Backbones for teachers and students: one file each, `Spec`, `REVISION`, `build(spec) -> nn.Module`. Start with `resnet`.

The network maps images (B, 3, H, W) float32 to features (B, feature_dim). It has the attributes `feature_dim` and `layers`, the
names of the submodules whose outputs can be read as features, from the first to the last.

A network that reads values of tensors, draws random numbers in Python or changes Python variables in its forward pass has the
attribute ``capturable = False``: its steps cannot be replayed as CUDA graphs.

Optional, for exported students whose weights load into a torchvision model: `HEAD`, the name of its linear classifier ("head"
by default), and ``in_torchvision(spec) -> str | None``, the expression that builds that model.

A backbone may import `ktray.spec`, `ktray.strict`, `ktray.errors` and the tools, but no other plugin.
"""
