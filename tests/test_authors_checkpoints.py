"""Checkpoints in the layouts that the authors of teachers publish: the features that timm computes from them, or a refusal.

The names of the tensors are those of the authors' code, the numbers are random. What timm makes of the same file is the oracle.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ktray.errors import UserError
from tests.hub_cache import photographs, random_weights
from tests.test_named_teachers import assert_close, features_of, oracle
from tests.test_named_teachers import cache as cache  # a fixture

pytest.importorskip("timm")
pytestmark = pytest.mark.slow  # networks of 22 to 100 million parameters

State = dict[str, Tensor]


def renamed(state: State, pairs: list[tuple[str, str]]) -> State:
    """The tensors of timm's model without its head, under other names; each pair is a pattern and what replaces it."""
    found = {}
    for name, tensor in state.items():
        for pattern, other in pairs:
            name = re.sub(pattern, other, name)
        found[name] = tensor
    return {name: tensor for name, tensor in found.items() if not name.startswith(("head", "fc_norm"))}


def dinov2(state: State) -> State:
    """github.com/facebookresearch/dinov2, `dinov2_vits14_pretrain.pth`."""
    return {**renamed(state, []), "mask_token": torch.zeros(1, state["cls_token"].shape[-1])}


def dinov2_with_registers(state: State) -> State:
    """The same, `dinov2_vits14_reg4_pretrain.pth`: the class token has a position, too."""
    found = renamed(state, [("^reg_token$", "register_tokens")])
    position = torch.full_like(found["cls_token"], 0.25)
    found["pos_embed"] = torch.cat([position, found["pos_embed"]], dim=1)
    return {**found, "mask_token": torch.zeros(1, position.shape[-1])}


def dinov3(state: State) -> State:
    """github.com/facebookresearch/dinov3, `dinov3_vits16_pretrain_lvd1689m-*.pth`: biases of qkv with a mask, all zero."""
    found = renamed(state, [("^reg_token$", "storage_tokens"), (r"gamma_(\d)$", r"ls\1.gamma")])
    width = state["cls_token"].shape[-1]
    for block in range(12):
        found[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(3 * width)
        found[f"blocks.{block}.attn.qkv.bias_mask"] = torch.zeros(3 * width)
    return {**found, "mask_token": torch.zeros(1, width), "rope_embed.periods": torch.ones(16)}


def mae(state: State) -> dict[str, State]:
    """github.com/facebookresearch/mae, `mae_pretrain_vit_base.pth`: the encoder alone, below `model`."""
    return {"model": renamed(state, [])}


def clip(state: State) -> State:
    """github.com/openai/CLIP, `ViT-B-32.pt` as a state_dict: both towers, without the text tower's blocks."""
    pairs = [
        (r"^patch_embed\.proj", "conv1"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"^blocks\.", "transformer.resblocks."),
        (r"\.norm(\d)\.", r".ln_\1."),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    ]
    found = renamed(state, pairs)
    found["class_embedding"] = found.pop("cls_token").flatten()
    found["positional_embedding"] = found.pop("pos_embed")[0]
    found["proj"] = torch.ones(found["class_embedding"].numel(), 512)
    text = {"token_embedding.weight": torch.zeros(100, 512), "text_projection": torch.eye(512), "logit_scale": torch.ones(())}
    return {
        **{f"visual.{name}": tensor for name, tensor in found.items()},
        **text,
        "positional_embedding": torch.zeros(77, 512),
    }


def open_clip(state: State) -> State:
    """github.com/mlfoundations/open_clip: timm's tower below `visual.trunk`, as of SigLIP 2, beside the text tower."""
    own = {f"visual.trunk.{name}": tensor for name, tensor in state.items()}
    return {
        **own,
        "text.token_embedding.weight": torch.zeros(100, 768),
        "logit_scale": torch.ones(()),
        "logit_bias": torch.ones(()),
    }


def transformers(state: State) -> State:
    """Hugging Face transformers, `Dinov2Model` and `SiglipVisionModel`: other names, queries, keys and values apart."""
    pairs = [
        (r"^blocks\.", "encoder.layer."),
        (r"^(cls_token|pos_embed)$", r"embeddings.\1"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^norm\.", "layernorm."),
        (r"attn\.proj", "attention.output.dense"),
    ]
    found = {}
    for name, tensor in renamed(state, pairs).items():
        parts = dict(zip(("query", "key", "value"), tensor.chunk(3), strict=True)) if "attn.qkv" in name else {}
        found |= {name.replace("attn.qkv", f"attention.attention.{part}"): each.clone() for part, each in parts.items()}
        found |= {} if parts else {name: tensor}
    return found


def c_radio(state: State) -> State:
    """huggingface.co/nvidia/C-RADIOv3-B, `model.safetensors`: positions of 128 x 128 patches, a class token per teacher."""
    found = renamed(state, [(r"^blocks\.", "radio_model.model.blocks.")])
    tokens = torch.cat([found.pop("cls_token"), found.pop("reg_token")], dim=1)[0]
    width = tokens.shape[-1]
    found["radio_model.model.patch_generator.cls_token.token"] = tokens
    found["radio_model.model.patch_generator.embedder.weight"] = found.pop("patch_embed.proj.weight").flatten(1)
    found["radio_model.model.patch_generator.pos_embed"] = torch.randn(1, 128 * 128, width)
    found.pop("patch_embed.proj.bias", None)
    found.pop("pos_embed")
    found = {name: tensor for name, tensor in found.items() if name.startswith("radio_model.")}
    mean = {f"radio_model.input_conditioner.norm_{name}": torch.ones(3, 1, 1) for name in ("mean", "std")}
    return {**found, **mean, "radio_model.summary_idxs": torch.tensor([0, 1])}


LOADED: dict[str, tuple[str, Callable[[State], Any]]] = {
    "DINOv2": ("vit_small_patch14_dinov2.lvd142m", dinov2),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2.lvd142m", dinov2_with_registers),
    "DINOv3": ("vit_small_patch16_dinov3.lvd1689m", dinov3),
    "MAE": ("vit_base_patch16_224.mae", mae),
    "CLIP": ("vit_base_patch32_clip_224.openai", clip),
    "SigLIP 2 of open_clip": ("vit_base_patch16_siglip_224.v2_webli", open_clip),
}
REFUSED: dict[str, tuple[str, Callable[[State], Any]]] = {
    "DINOv2 of transformers": ("vit_small_patch14_dinov2.lvd142m", transformers),
    "SigLIP 2 of transformers": ("vit_base_patch16_siglip_224.v2_webli", transformers),
    "C-RADIO": ("vit_base_patch16_radio_v3.c_radio", c_radio),
}


def written(name: str, layout: Callable[[State], Any], path: Path) -> Path:
    """A file in the authors' layout."""
    made = layout(dict(random_weights(name).state_dict()))
    nested = any(isinstance(each, dict) for each in made.values())
    tensors = made if nested else {key: tensor.contiguous().clone() for key, tensor in made.items()}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


@pytest.mark.parametrize("case", LOADED)
def test_a_file_of_the_authors_teaches_what_timm_makes_of_it(case: str, cache: Path, tmp_path: Path, capsys: Any) -> None:
    name, layout = LOADED[case]
    files = photographs(tmp_path / "photographs")
    weights = written(name, layout, tmp_path / "authors.pth")
    model, expected = oracle(name, weights, files)
    with torch.inference_mode():
        own = model.forward_head(expected, pre_logits=True)
    capsys.readouterr()
    assert_close(features_of(tmp_path / "photographs", {"timm": name, "weights": str(weights)}, tmp_path), own)
    assert not capsys.readouterr().out, "what timm prints would stand in the answer of a command"


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_in_a_layout_that_timm_does_not_read_as_it_is_is_refused(case: str, cache: Path, tmp_path: Path) -> None:
    name, layout = REFUSED[case]
    photographs(tmp_path / "photographs")
    weights = written(name, layout, tmp_path / "authors.safetensors")
    with pytest.raises(UserError) as caught:
        features_of(tmp_path / "photographs", {"timm": name, "weights": str(weights)}, tmp_path)
    said = str(caught.value)
    assert re.match(
        rf"teacher\.weights: .*(?:patch_embed\.proj\.weight|pos_embed) of shape.*teachers fetch {re.escape(name)}", said
    )
