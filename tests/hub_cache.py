"""Networks of timm with random weights, in the layout of the Hugging Face cache, and photographs of many kinds to show them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

CARD = "---\nlicense: {licence}\nlibrary_name: timm\n---\n# A card\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def random_weights(name: str, seed: int = 0, **options: Any) -> Any:
    """A model of timm with its classifier; statistics of batch norm and scales of layers are unlike the initial ones."""
    import timm

    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, **options).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif key.endswith(("running_mean", "bias", "cls_token", "reg_token")) and tensor.is_floating_point():
                tensor.normal_(std=0.1)
            elif key.endswith(("gamma", "gamma_1", "gamma_2")):  # layer scale, 1e-5 at first: every block would be the identity
                tensor.uniform_(0.5, 1.0)
    return model


def config_of(model: Any) -> dict[str, Any]:
    """What timm writes as `config.json` beside weights."""
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in ("url", "file", "hf_hub_id", "source")}
    return {"architecture": cfg["architecture"], "num_classes": model.num_classes, "pretrained_cfg": cfg}


def in_folder(model: Any, folder: Path, config: dict[str, Any] | None = None, licence: str = "") -> Path:
    """Weights and config in a plain folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if licence:
        (folder / "README.md").write_text(CARD.format(licence=licence))
    return folder


def in_cache(model: Any, name: str, cache: Path, licence: str = "apache-2.0") -> Path:
    """The same as huggingface_hub lays it out after a download: blobs, a snapshot of links, a ref. Returns the snapshot."""
    repo = cache / f"models--timm--{name}"
    made = in_folder(model, repo / "made", config_of(model), licence)
    snapshot = repo / "snapshots" / COMMIT
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    for file in sorted(made.iterdir()):
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    made.rmdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


SHAPES = [(200, 300), (420, 180), (64, 64), (30, 500), (224, 224), (333, 257), (96, 97), (500, 31)]  # height, width
MODES = ["RGB", "L", "P", "CMYK", "1", "RGBA", "LA", "RGB"]


def photographs(folder: Path, repeat: int = 1) -> list[Path]:
    """Smooth images with detail, of mixed sizes, aspect ratios, modes and formats; opaque."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index, ((height, width), mode) in enumerate([*zip(SHAPES, MODES, strict=True)] * repeat):
        image = Image.fromarray(_pixels(height, width, index)).convert(mode)
        files.append(folder / f"{index:03d}.{'jpg' if mode in ('RGB', 'L', 'CMYK') and index % 3 else 'tif'}")
        image.save(files[-1])
    return sorted(files)


def _pixels(height: int, width: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 40.0
    waves = [np.sin(a * x + b * y + c) for a, b, c in generator.uniform(-4, 4, (3, 3))]
    noise = generator.normal(0, 0.15, (height, width, 3))
    return (((np.stack(waves, -1) + noise) * 0.4 + 0.5).clip(0, 1) * 255).astype(np.uint8)
