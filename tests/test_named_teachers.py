"""Teachers by timm's names: features as timm computes them from the same files, and what is refused in their place."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ktray.features import extraction
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_check import check_pair, data_loader
from ktray.pipeline.pair_graph import build
from ktray.pool import StageContext
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.spec import PairSpec
from ktray.stores.file import FileStore
from tests.hub_cache import in_cache, photographs, random_weights
from tests.toys import toy_spec

timm = pytest.importorskip("timm")
torch.set_num_threads(1)

SMALL = "vit_tiny_patch16_224.augreg_in21k"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and no network at all."""
    from huggingface_hub import constants

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def pair_of(folder: Path, teacher: dict[str, Any], **changes: Any) -> PairSpec:
    """A pair whose teacher describes the images of a folder."""
    data = {"kind": "folder", "path": str(folder), "size": 32, "split": {"val": 0}}
    plain = {"data": data, "teacher": teacher, "transfer": {"kind": "clusters", "k": 2}, "evals": [], **changes}
    return PairSpec.model_validate(toy_spec(**plain))


def features_of(folder: Path, teacher: dict[str, Any], at: Path) -> torch.Tensor:
    """The features that the stages of such a pair write, in the order of the files."""
    pair = pair_of(folder, teacher)
    check_pair(pair, data_loader())
    graph = build(pair, data_identity())
    stages = [stage for stage in graph.stages if stage.name in ("images", "teacher", "features")]
    store = FileStore(at / "store")
    LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(stages, "test")
    found = store.find(graph.keys["features"])
    assert found is not None
    return torch.from_numpy(extraction.load(found.directory))


def oracle(name: str, weights: Path, files: list[Path], image_size: int | None = None) -> tuple[Any, torch.Tensor]:
    """timm's own model with these weights, and its `forward_features` of the files through its own transform."""
    sized = {} if image_size is None else {"img_size": image_size}
    overlay = {"file": str(weights)}
    takes = timm.get_pretrained_cfg(name).fixed_input_size
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **(sized if takes else {})).eval()
    config = timm.data.resolve_data_config(sized, model=model)
    transform = timm.data.create_transform(**config)
    with torch.inference_mode():
        return model, model.forward_features(torch.stack([transform(Image.open(file).convert("RGB")) for file in files]))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-4


def tokens_of(model: Any, features: torch.Tensor, tokens: str) -> torch.Tensor:
    """What the words for tokens mean, of timm's `forward_features` (B, T, D) or (B, C, h, w)."""
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    count = model.num_prefix_tokens
    patches = features[:, count:].mean(1)
    parts = {"cls": [features[:, 0]], "patches": [patches], "cls+patches": [features[:, 0], patches]}
    return torch.cat(parts.get(tokens, [features[:, :count].flatten(1), patches]), dim=1)


FAMILIES = {  # name -> the tokens to ask for
    "vit_tiny_patch16_224.augreg_in21k": ("cls", "cls+patches"),
    "convnext_atto.d2_in1k": ("patches",),
    "resnet18.a1_in1k": ("all",),
    "mobilenetv4_conv_small.e2400_r224_in1k": (),
    "efficientvit_b0.r224_in1k": (),
}
LARGE = {
    "vit_small_patch14_dinov2.lvd142m": ("cls",),
    "vit_small_patch14_reg4_dinov2.lvd142m": ("all",),
    "vit_small_patch16_dinov3.lvd1689m": ("cls", "patches", "all"),
    "vit_base_patch16_siglip_224.v2_webli": ("patches",),
    "vit_base_patch32_clip_224.openai": ("cls",),
    "vit_base_patch16_224.mae": ("cls+patches",),
    "swin_tiny_patch4_window7_224.ms_in1k": ("patches",),
    "beit_base_patch16_224.in22k_ft_in22k": ("cls",),
}


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_features_are_timms_of_its_own_transform_of_the_same_files(name: str, cache: Path, tmp_path: Path) -> None:
    files = photographs(tmp_path / "photographs")
    snapshot = in_cache(random_weights(name), name, cache)
    model, expected = oracle(name, snapshot / "model.safetensors", files)
    with torch.inference_mode():
        own = model.forward_head(expected, pre_logits=True)
    assert_close(features_of(tmp_path / "photographs", {"timm": name}, tmp_path), own)
    for tokens in {**FAMILIES, **LARGE}[name]:
        found = features_of(tmp_path / "photographs", {"timm": name, "tokens": tokens}, tmp_path)
        assert_close(found, tokens_of(model, expected, tokens))
