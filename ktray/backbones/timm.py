"""Any model of the timm library by name, untrained; its feature levels are the layers. Needs `pip install 'ktray[timm]'`.

Nothing is downloaded. Pretrained weights are those of a teacher with `timm`, or come from a file, through a loaded teacher,
with timm's parameter names. Layers are named as by timm's `features_only`, with "_" for "." (`layer3`, `blocks_5`,
`stages_2`), and are maps (B, C, h, w) for transformers too. `token_layers` are outputs with other tokens than patches: see
`token_layer`. timm may change what a name means between versions; an artifact's record names the version.

Source: Wightman, PyTorch Image Models, doi:10.5281/zenodo.4414861.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from ktray.errors import UserError
from ktray.strict import StrictSpec, added_field

REVISION = 1


class Spec(StrictSpec):
    """A timm model name such as `resnet18` or `vit_small_patch16_224`, without a pretrained tag."""

    kind: Literal["timm"] = "timm"
    model: str = "mobilenetv3_small_050"
    image: int | None = Field(default=None, ge=8, le=1024, description="side in pixels, for models with a fixed image size")
    drop_path: float = added_field(
        0.0, ge=0, lt=1, description="stochastic depth: probability of skipping the last block, lower for earlier ones"
    )

    @field_validator("model")
    @classmethod
    def _is_a_name_without_a_tag(cls, model: str) -> str:
        """As a hub writes it, ``hf_hub:timm/resnet18.a1_in1k``, a name says which pretrained weights it means."""
        bare = re.sub(r"^(hf[-_]hub:|local-dir:|timm/)+", "", model.strip())
        name, dot, tag = bare.partition(".")
        plain = name.lower().replace("-", "_")
        if model == plain and re.fullmatch(r"[a-z0-9_]+", plain):
            return model
        plain = next((each for each in (plain, name.lower().replace("-", "")) if _exists(each)), plain)
        if not re.fullmatch(r"[a-z0-9_]+", plain):
            raise ValueError(f"{model!r} is no name of timm's, which are small letters, digits and '_', such as resnet18")
        if not dot:
            raise ValueError(f"write model: {plain}, as timm spells it, instead of {model!r}")
        raise ValueError(
            f"{dot + tag!r} names pretrained weights, and this network starts untrained: write model: {plain}, and give the "
            f"weights of a teacher as a file, {{checkpoint: FILE, backbone: {{kind: timm, model: {plain}}}}}"
        )


def _exists(model: str) -> bool:
    """Whether the timm that is installed has this model; no where none is."""
    try:
        from timm import is_model
    except ImportError:
        return False
    return bool(is_model(model))


Tokens = Literal["cls", "patches", "cls+patches", "all"]
"""Which outputs of a network are features: its class token, its patches, or both; "all" adds registers."""
TOKENS: tuple[Tokens, ...] = ("cls", "patches", "cls+patches", "all")


def token_layer(layer: str | None, tokens: Tokens | None) -> str | None:
    """The name of an output, for a forward hook: ``blocks_5``, ``blocks_5:cls``, ``cls+patches`` (of the last, normalised).

    Args:
        layer: one of `layers`; None for the output of the last one after the network's final norm.
        tokens: None for the features of the network itself, or the patches of a layer.
    """
    if layer is None:
        return tokens
    return layer if tokens in (None, "patches") else f"{layer}:{tokens}"


class _Timm(nn.Module):
    """A timm model; an identity module for each of its outputs names the layer.

    The output of a layer is its maps (B, C, h, w). Of a token layer it is the class token (B, C), or a pair: the tokens before
    the patches (B, P, C), and the maps of the patches.
    """

    def __init__(self, model: Any, levels: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.layers = model, levels
        self._prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
        self._channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self._with_prefix = "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
        has_class = self._prefix > 0 and getattr(model, "cls_token", None) is not None
        kinds = TOKENS if has_class else ("patches", "all")
        inner = [token_layer(level, kind) for level in levels for kind in kinds if kind != "patches"] if self._prefix else []
        self.token_layers = tuple(str(name) for name in (*inner, *kinds))
        for name in (*levels, *self.token_layers):
            self.add_module(name, nn.Identity())
        self.feature_dim = int(getattr(model, "head_hidden_size", None) or model.num_features)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float32 -> (B, feature_dim) float32: the input of the model's classifier."""
        prefixed = {"return_prefix_tokens": True} if self._prefix and self._with_prefix else {}
        last, levels = self.model.forward_intermediates(images, output_fmt="NCHW", **prefixed)
        maps = [level[0] if prefixed else level for level in levels]
        for name, found in zip(self.layers, maps, strict=True):
            self.get_submodule(name)(found)
        self._show_tokens(last, maps, [level[1] for level in levels] if prefixed else [])
        features: Tensor = self.model.forward_head(last)
        return features

    def _show_tokens(self, last: Tensor, maps: Sequence[Tensor], prefixes: Sequence[Tensor]) -> None:
        """Run the identity modules of the token layers that somebody listens to."""
        shown = [name for name in self.token_layers if self.get_submodule(name)._forward_hooks]
        for name in shown:
            layer, _, tokens = name.rpartition(":")
            if layer:
                index = self.layers.index(layer)
                prefix, patches = prefixes[index], maps[index]
            elif last.ndim == 3:
                prefix = last[:, : self._prefix]
                patches = last[:, self._prefix :].transpose(1, 2).unflatten(2, tuple(maps[-1].shape[2:]))
            else:
                patches = last.permute(0, 3, 1, 2) if self._channels_last else last
                prefix = patches.new_zeros(len(patches), 0, patches.shape[1])
            chosen = prefix[:, : 0 if tokens == "patches" else 1 if tokens == "cls+patches" else self._prefix]
            self.get_submodule(name)(prefix[:, 0] if tokens == "cls" else (chosen, patches))

    def layer_numbers(self) -> tuple[dict[str, int], int]:
        """The layer of each parameter, and that of a classifier, as timm numbers them for layer-wise decay."""
        from timm.models import group_parameters

        unknown = "ktray_classifier"  # what no pattern of timm's matches is numbered as the classifier
        named: Any = SimpleNamespace(named_parameters=lambda: [*self.model.named_parameters(), (unknown, None)])
        numbers: dict[str, int] = group_parameters(named, self.model.group_matcher(coarse=False), reverse=True)
        of_head = numbers.pop(unknown)
        return {f"model.{name}": number for name, number in numbers.items()}, of_head


def build(spec: Spec) -> nn.Module:
    """The network with random initial weights from the global generator.

    Raises:
        UserError: timm is not installed or has no such model, or the model has no feature levels or no variable image size.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError("the backbone timm needs the package timm", "backbone.kind", "pip install 'ktray[timm]'") from error
    if not timm.is_model(spec.model):
        near = ", ".join(timm.list_models(f"*{spec.model.split('_')[0]}*")[:5])
        raise UserError(
            f"timm has no model {spec.model!r}",
            "backbone.model",
            f"Similar names: {near}." if near else "See timm.list_models().",
        )
    sized: dict[str, Any] = {} if spec.image is None else {"img_size": spec.image}
    skipping: dict[str, Any] = {"drop_path_rate": spec.drop_path} if spec.drop_path else {}
    try:
        model: Any = timm.create_model(spec.model, pretrained=False, num_classes=0, **sized, **skipping)
    except TypeError as error:
        what, field = ("drop_path", "drop_path") if "drop_path_rate" in str(error) else ("image size", "image")
        raise UserError(f"the timm model {spec.model} takes no {what}", f"backbone.{field}", "Leave it out.") from error
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
        raise UserError(f"the timm model {spec.model} has no feature levels", "backbone.model", "Choose another model.")
    levels = tuple(str(level["module"]).replace(".", "_") for level in model.feature_info)
    return _Timm(model, levels)
