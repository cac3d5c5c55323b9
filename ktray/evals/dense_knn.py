"""Dense nearest neighbours: segment images by the labels of the training patches most similar to each of their patches.

Nothing is trained. Patches are the cells of a layer's maps; each training patch carries the shares of the classes among its
pixels, and each judged patch gets the mean of its neighbours' shares, which are enlarged to pixels. Pixels that are void count
neither way.

Source: Balažević et al., "Towards In-Context Scene Understanding" (2023), whose reimplementation open-hummingbird has 30
neighbours and a temperature of 0.02; Darcet et al., "Cluster and Predict Latent Patches for Improved Masked Image Modeling"
(CAPI, 2025), which takes 1, 3, 10 and 30.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from ktray import fingerprint, progress
from ktray.checkpoints import Attempt
from ktray.classifiers import linear_classifiers, neighbours
from ktray.errors import UserError
from ktray.features.judged_network import JudgedNetwork
from ktray.images import VOID, Images, fit_mask
from ktray.scoring import label_maps, per_image
from ktray.spec import Count, EvaluationFields, Pooling, Seed, refuse_pool

REVISION = 1
TOOLS = (linear_classifiers, neighbours, label_maps)
NEEDS_LABELS = False
NEEDS_ANNOTATIONS = ("mask",)
READS_NETWORK = True
FITS_MASKS = True
DIRECTION: dict[str, Literal["max", "min"]] = {"miou": "max", "pixel_accuracy": "max"}


class Spec(EvaluationFields):
    """A vote of the nearest training patches for every patch. `layer` null is the last layer; its maps are read, not pooled."""

    kind: Literal["dense_knn"] = "dense_knn"
    k: Count = Field(default=30, description="number of neighbours")
    temperature: float | None = Field(default=0.02, gt=0, description="lower gives near ones more weight; null: one vote each")
    patches: int = Field(default=200_000, ge=1, description="most training patches, drawn by `seed`")
    grid: int | None = Field(default=None, ge=1, le=64, description="patches per side; null: the layer's own maps")
    seed: Seed = 0

    @model_validator(mode="after")
    def _maps_are_not_pooled(self) -> Spec:
        refuse_pool(self, "write 'grid' instead")
        return self


def check_network(spec: Spec, network: nn.Module, size: int) -> None:
    """Refuse a layer without maps, or with coarser ones than `grid`.

    Raises:
        UserError: it has none, or its maps are too coarse.
    """
    layer = spec.layer or str(network.layers[-1])  # type: ignore[index]
    shape = _shape_of_maps(network, layer, size)
    if len(shape) != 4:
        instead = "Judge a convolutional network, or a layer of it that makes maps."
        raise UserError(f"the layer {layer!r} makes no maps, but {tuple(shape[1:])}", "layer", instead)
    side = min(shape[2:])
    if spec.grid is not None and spec.grid > side:
        raise UserError(f"{spec.grid} patches per side are finer than the maps of {layer!r}", "grid", f"At most {side} here.")


def evaluate(
    spec: Spec,
    *,
    features: Callable[[Images], NDArray[np.float32]],
    train: Images,
    judged: Images,
    pseudo_labels: NDArray[np.int64] | None,
    out: Path,
    device: str,
    network: JudgedNetwork,
    attempt: Attempt,
) -> dict[str, float]:
    """`miou` in [0, 1], the mean over the classes and the background that occur, and `pixel_accuracy`; void pixels left out.

    Images and masks are squares of the data's size. `classes.json` has the IoU of each class, and `per_image.parquet` the
    pixels of each image by true and given class.

    Raises:
        ValueError: masks are missing, or no training patch has a pixel that is not void.
        UserError: the layer has coarser maps than `grid`.
    """
    masks_of_train, masks = _masks(train), _masks(judged)
    if not len(train) or not len(judged):
        raise ValueError("dense nearest neighbours need images with masks, to learn from and to judge")
    layer, grid = _layer_and_grid(spec, network, judged.size)
    view = (layer, Pooling(grid=grid))
    classes = 1 + len(judged.classes or train.classes)
    bank, shares = _bank(spec, network.features(train, [view])[0], masks_of_train, grid, classes, device)
    rows = network.features(judged, [view])[0]
    counts = np.zeros((len(judged), classes**2), np.int64)
    for index in range(len(judged)):
        patches = linear_classifiers.unit(_patches(rows[index : index + 1], grid, device))
        given = torch.cat([_mean_shares(spec, *found[1:], shares) for found in neighbours.nearest(bank, patches, spec.k)])
        maps = given.T.reshape(1, classes, grid, grid)
        enlarged = functional.interpolate(maps, size=(judged.size,) * 2, mode="bilinear", align_corners=False)
        predicted = enlarged[0].argmax(0).cpu().numpy()
        counts[index] = label_maps.confusion(masks(index), predicted, classes).ravel()
    per_image.write(out, judged.names, {"pixels": counts})
    found = label_maps.ious(counts.sum(0).reshape(classes, classes))
    names = ["background", *(judged.classes or train.classes)]
    table = {name: None if np.isnan(iou) else float(iou) for name, iou in zip(names, found, strict=True)}
    (out / "classes.json").write_text(json.dumps({"layer": layer, "grid": grid, "iou": table}, indent=1))
    return recompute({"pixels": counts}, np.arange(len(judged)))


def recompute(columns: per_image.Columns, rows: NDArray[np.int64]) -> dict[str, float]:
    """The metrics of some of the images."""
    total = columns["pixels"][rows].sum(0)
    classes = round(len(total) ** 0.5)
    table = total.reshape(classes, classes)
    ious = label_maps.ious(table)
    known = ious[~np.isnan(ious)]
    return {
        "miou": float(known.mean()) if len(known) else float("nan"),
        "pixel_accuracy": float(np.trace(table) / max(total.sum(), 1)),
    }


def _masks(images: Images) -> Callable[[int], NDArray[np.uint8]]:
    whole = images.whole() if images.whole is not None else None
    mask = whole.mask if whole is not None else None
    if mask is None:
        raise ValueError("dense nearest neighbours need images with masks, to learn from and to judge")
    return lambda index: fit_mask(mask(index), images.size)


def _layer_and_grid(spec: Spec, network: JudgedNetwork, size: int) -> tuple[str, int]:
    """The layer whose maps are read, and their side or the coarser one of the spec."""
    model = network.build()
    layer = spec.layer or str(model.layers[-1])  # type: ignore[index]
    if spec.grid is not None:
        return layer, spec.grid
    return layer, min(_shape_of_maps(model, layer, size)[2:])


def _shape_of_maps(network: nn.Module, layer: str, size: int) -> torch.Size:
    """Shape of what a layer makes of one image of `size` px; (1, C, h, w) if these are maps."""
    shapes: list[torch.Size] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda _, __, output: shapes.append(output.shape))
    with torch.inference_mode():
        network(torch.zeros(1, 3, size, size, device=next(network.parameters()).device))
    handle.remove()
    return shapes[0]


def _patches(rows: NDArray[np.float32], grid: int, device: str) -> Tensor:
    """Patches (n * grid * grid, C) of pooled maps (n, C * grid * grid)."""
    maps = linear_classifiers.on_device(rows, device).view(len(rows), -1, grid * grid)
    return maps.transpose(1, 2).reshape(-1, maps.shape[1])


def _bank(
    spec: Spec, rows: NDArray[np.float32], masks: Callable[[int], NDArray[np.uint8]], grid: int, classes: int, device: str
) -> tuple[Tensor, Tensor]:
    """Training patches (P, C) of length 1 that are not void, and the shares (P, classes) of the classes in them."""
    kept_rows, kept_shares = [], []
    for index in range(len(rows)):
        mask = torch.from_numpy(masks(index).astype(np.int64))
        known = (mask != VOID).float()
        one_hot = functional.one_hot(mask.where(mask != VOID, 0), classes).permute(2, 0, 1) * known
        cells = functional.adaptive_avg_pool2d(one_hot[None], grid)[0].flatten(1).T
        total = cells.sum(1, keepdim=True)
        here = total[:, 0] > 0
        kept_rows.append(_patches(rows[index : index + 1], grid, "cpu")[here])
        kept_shares.append((cells / total.clamp(min=1e-12))[here])
        progress.advance("masks")
    patches, shares = torch.cat(kept_rows), torch.cat(kept_shares)
    if not len(patches):
        raise ValueError("all pixels of the training masks are void")
    drawn = np.random.default_rng(fingerprint.seed_of(spec.seed, "patches", len(patches))).permutation(len(patches))
    chosen = torch.from_numpy(np.sort(drawn[: spec.patches]))
    return linear_classifiers.unit(patches[chosen].to(device)), shares[chosen].to(device)


def _mean_shares(spec: Spec, similarities: Tensor, nearest: Tensor, shares: Tensor) -> Tensor:
    """Mean (n, classes) of the neighbours' shares, weighted by exp(similarity / temperature)."""
    if spec.temperature is None:
        weights = torch.full_like(similarities, 1 / similarities.shape[1])
    else:
        weights = (similarities / spec.temperature).softmax(1)
    return torch.einsum("nk,nkc->nc", weights, shares[nearest])
