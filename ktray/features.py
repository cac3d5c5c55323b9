"""Features (N, D) of images: from a layer of a network or from a descriptor, in shards of a fixed number of rows.

The bits of a shard do not depend on the number of workers: each shard is made alone, in the same batches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor, nn

from ktray import augment, fingerprint, plugins, train
from ktray.errors import UserError
from ktray.images import Images, open_split
from ktray.pool import Pool
from ktray.spec import (
    BackboneSpec,
    DataSpec,
    HandcraftedTeacher,
    LoadedTeacher,
    Normalization,
    Pooling,
    StudentTeacher,
    TeacherSpec,
    TrainedTeacher,
)

REVISION = 1
TOOLS = (augment,)

BATCH = 256
SHARD_ROWS = 4096  # a multiple of BATCH, so that `all_of` and `write` see the same batches

Extractor = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def of_network(
    backbone: BackboneSpec,
    layer: str | None,
    pool: Pooling,
    weights: Path | None,
    device: str = "cpu",
    normalize: Normalization = "ktray",
) -> Extractor:
    """Features of a trained backbone: (B, H, W, 3) uint8 -> (B, D) float32.

    Args:
        backbone: spec of the network.
        layer: one of its `layers`, or None for what its forward returns.
        pool: how maps (C, h, w) become one vector of D = C * grid * grid.
        weights: directory of a snapshot.
        normalize: what its weights expect of pixels.

    Raises:
        UserError: the backbone has no such layer; at the first batch, the grid is finer than the maps.
        ValueError: `weights` is None; an untrained network is the descriptor `random_network`.
    """
    if weights is None:
        raise ValueError(
            f"the {backbone.kind} has no weights; features of an untrained network are the descriptor random_network"
        )
    network = plugins.module_of("backbone", backbone).build(backbone)
    train.load(network, weights)
    return _on_arrays(of_module(network, layer, pool, normalize), device, network)


def of_teacher(teacher: TeacherSpec, weights: Path | None, state: Path | None, device: str = "cpu") -> Extractor:
    """Features of any teacher: (B, H, W, 3) uint8 -> (B, D) float32.

    Args:
        weights: directory of a snapshot, for teachers with a backbone.
        state: directory of `state.npz`, for descriptors that are fitted.

    Raises:
        UserError, ValueError: as `of_network`; a fitted descriptor without `state`.
    """
    if isinstance(teacher, TrainedTeacher | LoadedTeacher | StudentTeacher):
        normalize: Normalization = teacher.normalize if isinstance(teacher, LoadedTeacher) else "ktray"
        return of_network(teacher.backbone, teacher.layer, teacher.pool, weights, device, normalize)
    if not isinstance(teacher, HandcraftedTeacher):
        raise TypeError(f"a {type(teacher).__name__} is no teacher")
    descriptor = plugins.module_of("descriptor", teacher.descriptor)
    fitted: dict[str, NDArray[Any]] | None = None
    if state is not None:
        with np.load(state / "state.npz", allow_pickle=False) as file:
            fitted = dict(file)
    elif hasattr(descriptor, "fit"):
        raise ValueError(f"the descriptor {teacher.descriptor.kind} is fitted to images first; give the directory of its state")
    return _on_arrays(lambda images: descriptor.describe(teacher.descriptor, fitted, images), device)


def of_module(
    network: nn.Module, layer: str | None, pool: Pooling, normalize: Normalization = "ktray"
) -> Callable[[Tensor], Tensor]:
    """Features of a ready backbone: (B, H, W, 3) uint8 -> (B, D) float32, both on the network's device.

    The network is put into eval mode. Its layers after `layer` are not run.

    Raises:
        UserError: the backbone has no such layer; at the first batch, the grid is finer than the maps.
    """
    network.eval()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if layer is None:
        return torch.inference_mode()(lambda images: _pooled(network(augment.normalize(images, normalize)), pool))
    layers: tuple[str, ...] = network.layers  # type: ignore[assignment]
    if layer not in layers:
        raise UserError(f"the backbone has no layer {layer!r}", "layer", f"One of: {', '.join(layers)}.")
    tapped = network.get_submodule(layer)

    def stop(_: nn.Module, __: Any, output: Tensor) -> None:
        raise _Reached(output)

    @torch.inference_mode()
    def extract(images: Tensor) -> Tensor:
        handle = tapped.register_forward_hook(stop)
        try:
            network(augment.normalize(images, normalize))
        except _Reached as reached:
            return _pooled(reached.output, pool)
        finally:
            handle.remove()
        raise ValueError(f"the forward pass never runs the layer {layer!r}")

    return extract


class _Reached(Exception):
    """The forward pass has come to the tapped layer; what follows would be computed in vain."""

    def __init__(self, output: Tensor) -> None:
        self.output = output
        super().__init__()


def _pooled(output: Tensor, pool: Pooling) -> Tensor:
    places = min(output.shape[2:]) if output.ndim == 4 else 1
    if pool.grid > places:
        raise UserError(
            f"a grid of {pool.grid} is finer than the features, {tuple(output.shape[1:])}",
            "pool.grid",
            f"At most {places} here.",
        )
    if output.ndim == 4:
        function = nn.functional.adaptive_avg_pool2d if pool.kind == "avg" else nn.functional.adaptive_max_pool2d
        output = function(output, pool.grid)
    return output.flatten(1).float()


def _on_arrays(describe: Callable[[Tensor], Tensor], device: str, network: nn.Module | None = None) -> Extractor:
    if network is not None:
        network.to(device)

    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return describe(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return extract


def all_of(extractor: Extractor, images: Images) -> NDArray[np.float32]:
    """Features (N, D) float32 of all images, in batches of 256.

    Raises:
        ValueError: a feature is not finite; the message names the first image.
    """
    return _rows(extractor, images, 0, len(images))


def _rows(extractor: Extractor, images: Images, start: int, stop: int) -> NDArray[np.float32]:
    batches = [extractor(images.read(np.arange(at, min(at + BATCH, stop), dtype=np.int64))) for at in range(start, stop, BATCH)]
    rows = np.concatenate(batches)
    require_finite(rows, images, start)
    return rows


def require_finite(rows: NDArray[Any], images: Images, start: int) -> None:
    """Refuse features that are not finite, of the images from `start` on.

    Raises:
        ValueError: names the first image.
    """
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        index = start + int(bad[0])
        name = f" ({images.names[index]})" if images.names else ""
        raise ValueError(
            f"{len(bad)} of {len(rows)} images have features of type {rows.dtype} that are not finite, "
            f"the first is image {index}{name}"
        )


def write(source: dict[str, Any], out: Path, pool: Pool) -> dict[str, float]:
    """Write the features of one split as `features-00000.npy` and so on, of 4096 rows each (the last of what is left).

    Args:
        source: plain data: "teacher" (dump of a TeacherSpec), "weights" and "state" (directories or None), "images"
            (directory), "data" (dump of its spec), "split", "dtype" ("float32" or "float16") and "device".
        out: an existing directory that every worker sees.

    Returns:
        `count`, `dim` and `images_per_s` (of all workers together).

    Raises:
        ValueError: a feature is not finite or, in float16, too large; the message names the first image.
    """
    began = time.perf_counter()
    count = len(_opened(source))
    items = [(start, min(start + SHARD_ROWS, count)) for start in range(0, count, SHARD_ROWS)]
    widths = pool.map(_write_shard, items, (fingerprint.canonical(source), str(out)))
    if not widths:
        raise ValueError(f"the split {source['split']!r} has no images")
    return {"count": float(count), "dim": float(widths[0]), "images_per_s": count / (time.perf_counter() - began)}


def _write_shard(item: tuple[int, int], shared: tuple[str, str]) -> int:
    start, stop = item
    extractor, images, dtype = _source(shared[0])
    rows = _rows(extractor, images, start, stop)
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, and is refused with its image's name
        stored = rows.astype(dtype)
    require_finite(stored, images, start)
    np.save(Path(shared[1]) / f"features-{start // SHARD_ROWS:05d}.npy", stored)
    return rows.shape[1]


@lru_cache(maxsize=2)  # a worker writes many shards of one source; two at most, since networks hold device memory
def _source(canonical: str) -> tuple[Extractor, Images, str]:
    """What a worker needs to write shards, from the canonical JSON of `write`'s source."""
    source = json.loads(canonical)
    teacher = TypeAdapter(TeacherSpec).validate_python(source["teacher"])
    weights, state = (Path(source[name]) if source[name] else None for name in ("weights", "state"))
    return of_teacher(teacher, weights, state, source["device"]), _opened(source), source["dtype"]


def _opened(source: dict[str, Any]) -> Images:
    return open_split(Path(source["images"]), source["split"], TypeAdapter(DataSpec).validate_python(source["data"]))


def shards(directory: Path) -> list[Path]:
    """The shards of `write`, in the order of their rows.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(directory.glob("features-*.npy"))
    if not found:
        raise FileNotFoundError(f"{directory.name} holds no features")
    return found


def load(directory: Path) -> NDArray[np.float32]:
    """All features (N, D) as float32."""
    return np.concatenate([np.load(path, allow_pickle=False) for path in shards(directory)]).astype(np.float32, copy=False)
