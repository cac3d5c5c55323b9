"""Extraction of features (N, D) from images, by a layer of a network or by a descriptor, in shards of fixed size.

Shards are bitwise identical for any number of workers: each shard is computed separately, in the same batches.
Several layers of one network come out of one forward pass.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor, nn

from ktray import fingerprint, plugins, progress
from ktray.checksums import State, intact, version_of
from ktray.errors import UserError
from ktray.images import Images, open_split
from ktray.ops import augmentation, precision
from ktray.pool import Pool
from ktray.spec import (
    BackboneSpec,
    DataSpec,
    HandcraftedTeacher,
    LoadedTeacher,
    Normalization,
    Pooling,
    Precision,
    StudentTeacher,
    TeacherSpec,
    TrainedTeacher,
)
from ktray.text import some_of
from ktray.training import snapshot

View = tuple[str | None, Pooling]
"""A layer of a network (None for the output of its forward pass), and how its maps become one vector."""


def layer_extractor(
    network: nn.Module,
    layer: str | None,
    pool: Pooling,
    normalize: Normalization = "ktray",
    computed_in: Precision = "float32",
) -> Callable[[Tensor], Tensor]:
    """A function that extracts features: (B, H, W, 3) uint8 -> (B, D) float32, both on the network's device.

    The network is put into eval mode. Layers after `layer` are not run.

    Raises:
        UserError: the backbone has no such layer, or (at the first batch) the pooling grid is finer than the maps.
    """
    extract = layers_extractor(network, [(layer, pool)], normalize, computed_in)
    return lambda images: extract(images)[0][0]


def layers_extractor(
    network: nn.Module, views: Sequence[View], normalize: Normalization = "ktray", computed_in: Precision = "float32"
) -> Callable[[Tensor], list[tuple[Tensor, float]]]:
    """As `layer_extractor`, for several layers in one forward pass; bitwise equal to extracting each layer on its own.

    Args:
        normalize: the pixel normalisation that the network's weights expect.
        computed_in: precision of products and convolutions.

    Returns:
        A function that maps (B, H, W, 3) uint8 to a pair per view, in order: features (B, D) float32 on the network's device,
        and the seconds from the start of the pass until they were ready, i.e. what this view would have taken on its own.

    Raises:
        UserError: as `layer_extractor`.
    """
    network.eval()
    network.to(memory_format=torch.channels_last)
    layers: tuple[str, ...] = network.layers  # type: ignore[assignment]
    wanted = {layer for layer, _ in views}
    for layer in wanted - {None, *layers}:
        raise UserError(f"the backbone has no layer {layer!r}", "layer", f"One of: {', '.join(layers)}.")
    hooked = {layer: network.get_submodule(layer) for layer in wanted if layer is not None}

    @torch.inference_mode()
    def extract(images: Tensor) -> list[tuple[Tensor, float]]:
        collector = _LayerOutputs(views)
        handles = [module.register_forward_hook(collector.hook_for(layer)) for layer, module in hooked.items()]
        try:
            with precision.computing_in(computed_in, images.device):
                collector.hook_for(None)(network, (), network(augmentation.normalize(images, normalize)))
        except _LastLayerReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(collector.found) < len(views):
            missing = next(layer for index, (layer, _) in enumerate(views) if index not in collector.found)
            raise ValueError(f"the forward pass never runs the layer {missing!r}")
        return [collector.found[index] for index in range(len(views))]

    return extract


class _LayerOutputs:
    """Outputs collected in one forward pass: index of a view -> its rows, and the seconds until they were ready."""

    def __init__(self, views: Sequence[View]) -> None:
        self.views, self.began = views, time.perf_counter()
        self.found: dict[int, tuple[Tensor, float]] = {}

    def hook_for(self, layer: str | None) -> Callable[[Any, Any, Tensor], None]:
        """The forward hook of a layer; if it runs several times, the first output counts, as in a pass for it alone."""

        def hook(_: Any, __: Any, output: Tensor) -> None:
            for index, (name, pool) in enumerate(self.views):
                if name == layer and index not in self.found:
                    rows = _pooled(output, pool)
                    if len(self.views) > 1:
                        rows = rows.clone()  # later layers may change the output in place
                        if rows.is_cuda:
                            torch.cuda.synchronize(rows.device)
                    self.found[index] = rows, time.perf_counter() - self.began
            if len(self.found) == len(self.views):
                raise _LastLayerReached

        return hook


class _LastLayerReached(Exception):
    """Raised by a hook to end the forward pass once all requested outputs are collected."""


def _pooled(output: Tensor, pool: Pooling) -> Tensor:
    side = min(output.shape[2:]) if output.ndim == 4 else 1
    grid = pool.side(output.shape[1], side)
    if grid > side:
        raise UserError(
            f"a grid of {grid} is finer than the features, {tuple(output.shape[1:])}",
            "pool.grid",
            f"At most {side} here.",
        )
    if output.ndim == 4:
        function = nn.functional.adaptive_avg_pool2d if pool.kind == "avg" else nn.functional.adaptive_max_pool2d
        output = function(output, grid)
    return output.flatten(1).float()


IDENTITY, REVISION = "feature_extraction", 2
TOOLS = (augmentation,)

BATCH = 256
SHARD_ROWS = 4096  # a multiple of BATCH, so that `extract_all` and `write` use the same batches

Extractor = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
_ViewsExtractor = Callable[[NDArray[np.uint8]], list[tuple[NDArray[np.float32], float]]]
"""An extractor of several views at once: for each view its rows, and the seconds it would have taken on its own."""


def network_extractor(
    backbone: BackboneSpec,
    layer: str | None,
    pool: Pooling,
    weights: Path | None,
    device: str = "cpu",
    normalize: Normalization = "ktray",
    computed_in: Precision = "float32",
) -> Extractor:
    """Features of a trained backbone: (B, H, W, 3) uint8 -> (B, D) float32.

    Args:
        backbone: spec of the network.
        layer: one of its `layers`, or None for the output of its forward pass.
        pool: how maps (C, h, w) become a vector of D = C * grid * grid.
        weights: directory of a snapshot.
        normalize: the pixel normalisation that the weights expect.
        computed_in: precision of products and convolutions.

    Raises:
        UserError: the backbone has no such layer, or (at the first batch) the pooling grid is finer than the maps.
        ValueError: `weights` is None; for an untrained network use the descriptor `random_network`.
    """
    network = trained_network(backbone, weights)
    return _on_arrays(layer_extractor(network, layer, pool, normalize, computed_in), device, network)


def trained_network(backbone: BackboneSpec, weights: Path | None) -> nn.Module:
    """A backbone with the weights of a snapshot, on the CPU.

    Raises:
        ValueError: `weights` is None.
    """
    if weights is None:
        raise ValueError(
            f"the {backbone.kind} has no weights; for features of an untrained network use the descriptor random_network"
        )
    network: nn.Module = plugins.module_of("backbone", backbone).build(backbone)
    snapshot.load_backbone(network, weights)
    return network


def network_view(
    backbone: BackboneSpec,
    layer: str | None,
    pool: Pooling,
    normalize: Normalization = "ktray",
    computed_in: Precision = "float32",
) -> dict[str, Any]:
    """All that determines the features of a network, except its weights, as plain data."""
    return {
        "backbone": backbone.model_dump(),
        "layer": layer,
        "pool": pool.model_dump(),
        "normalize": normalize,
        "precision": computed_in,
    }


def teacher_view(teacher: TeacherSpec) -> dict[str, Any]:
    """All that determines the features of a teacher, except weights and state, as plain data: `network_view` or a descriptor.

    Raises:
        TypeError: its features are precomputed, not extracted.
    """
    if isinstance(teacher, HandcraftedTeacher):
        return {"descriptor": teacher.descriptor.model_dump()}
    if isinstance(teacher, TrainedTeacher | LoadedTeacher | StudentTeacher):
        normalize = teacher.normalize if isinstance(teacher, LoadedTeacher) else "ktray"
        return network_view(teacher.backbone, teacher.layer, teacher.pool, normalize, teacher.network_precision)
    raise TypeError(f"a {type(teacher).__name__} has no features to extract")


def view_extractor(view: Mapping[str, Any], weights: Path | None, state: Path | None, device: str = "cpu") -> Extractor:
    """The extractor that a `teacher_view` describes: (B, H, W, 3) uint8 -> (B, D) float32.

    Args:
        weights: directory of a snapshot, for a view of a network.
        state: directory of `state.npz`, for fitted descriptors.

    Raises:
        UserError, ValueError: as `network_extractor`; also for a fitted descriptor without `state`.
    """
    if "backbone" in view:
        backbone = plugins.parse("backbone", view["backbone"])
        return network_extractor(backbone, *_layer_of(view), weights, device, view["normalize"], view["precision"])
    spec = plugins.parse("descriptor", view["descriptor"])
    descriptor = plugins.module_of("descriptor", spec)
    fitted: dict[str, NDArray[Any]] | None = None
    if state is not None:
        with np.load(intact(state / "state.npz"), allow_pickle=False) as file:
            fitted = dict(file)
    elif hasattr(descriptor, "fit"):
        raise ValueError(f"the descriptor {spec.kind} must be fitted to images first; pass the directory of its state")
    return _on_arrays(lambda images: descriptor.describe(spec, fitted, images), device)


def _layer_of(view: Mapping[str, Any]) -> tuple[str | None, Pooling]:
    return view["layer"], Pooling.model_validate(view["pool"])


def _on_arrays(describe: Callable[[Tensor], Tensor], device: str, network: nn.Module | None = None) -> Extractor:
    if network is not None:
        network.to(device)

    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return describe(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return extract


def extract_all(extractor: Extractor, images: Images) -> NDArray[np.float32]:
    """Features (N, D) float32 of all images, in batches of 256.

    Raises:
        ValueError: a feature is not finite; the message names the first such image.
    """
    return _rows(extractor, images, 0, len(images))


def extract_views(
    views: Sequence[Mapping[str, Any]], weights: Path | None, images: Images, device: str, max_batch_size: int | None
) -> list[NDArray[np.float32]]:
    """Features (N, D) float32 of all images for each view; the views are of one network and differ in layer and pooling.

    Raises:
        UserError, ValueError: as `extract_all` and `layers_extractor`.
    """
    extract = _views_extractor(views, weights, None, device, max_batch_size)
    kept: list[list[NDArray[np.float32]]] = [[] for _ in views]
    for at in range(0, len(images), BATCH):
        batch = images.read(np.arange(at, min(at + BATCH, len(images)), dtype=np.int64))
        for index, (rows, _) in enumerate(extract(batch)):
            kept[index].append(rows)
        progress.advance("images", len(batch))
    found = [np.concatenate(rows) for rows in kept]
    for rows in found:
        require_finite(rows, images, 0)
    return found


def _rows(extractor: Extractor, images: Images, start: int, stop: int) -> NDArray[np.float32]:
    batches = []
    for at in range(start, stop, BATCH):
        batches.append(extractor(images.read(np.arange(at, min(at + BATCH, stop), dtype=np.int64))))
        progress.advance("images", len(batches[-1]))
    rows = np.concatenate(batches)
    require_finite(rows, images, start)
    return rows


def require_finite(rows: NDArray[Any], images: Images, start: int) -> None:
    """Raise if features (n, D) of the images from `start` on are not all finite.

    Raises:
        ValueError: the message names the first such image.
    """
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        index = start + int(bad[0])
        name = f" ({images.names[index]})" if images.names else ""
        raise ValueError(
            f"{some_of(len(bad), len(rows), 'image', ('has', 'have'))} features of type {rows.dtype} that are not finite, "
            f"the first is image {index}{name}"
        )


def write(source: dict[str, Any], out: Path, pool: Pool) -> dict[str, float]:
    """Write the features of one split as `features-00000.npy` and so on, of 4096 rows each (fewer in the last).

    Args:
        source: plain data: "view" (see `teacher_view`), "weights" and "state" (directories or None), "images"
            (directory), "data" (dump of its spec), "split", "dtype" ("float32" or "float16"), "device" and optionally
            "max_batch_size", the most images that go through the device at once.
        out: an existing directory that every worker can write to.

    Returns:
        `count`, `dim` and `images_per_s` (all workers together).

    Raises:
        ValueError: a feature is not finite or, in float16, too large; the message names the first such image.
    """
    return write_views([source], [out], pool)[0][0]


def write_views(sources: Sequence[dict[str, Any]], outs: Sequence[Path], pool: Pool) -> list[tuple[dict[str, float], float]]:
    """Like `write`, for several sources that differ only in the layer and pooling of their view, in one forward pass.

    Returns:
        For each source the metrics of `write`, and the seconds of work (all workers together) it would have cost on its own.

    Raises:
        ValueError: as `write`.
    """
    began = time.perf_counter()
    count = len(_open_images(sources[0]))
    items = [(start, min(start + SHARD_ROWS, count)) for start in range(0, count, SHARD_ROWS)]
    written = pool.map(_write_shards, items, (fingerprint.canonical(list(sources)), [str(out) for out in outs]))
    if not written:
        raise ValueError(f"the split {sources[0]['split']!r} has no images")
    speed = count / (time.perf_counter() - began)
    return [
        (
            {"count": float(count), "dim": float(written[0][index][0]), "images_per_s": speed},
            sum(shard[index][1] for shard in written),
        )
        for index in range(len(sources))
    ]


def _write_shards(item: tuple[int, int], shared: tuple[str, list[str]]) -> list[tuple[int, float]]:
    """Write one shard of every view; for each, its width and the seconds it would have taken on its own."""
    start, stop = item
    extract, images, dtypes = _source(shared[0], _versions(shared[0]))
    kept: list[list[NDArray[np.float32]]] = [[] for _ in dtypes]
    seconds = [0.0 for _ in dtypes]
    for at in range(start, stop, BATCH):
        began = time.perf_counter()
        batch = images.read(np.arange(at, min(at + BATCH, stop), dtype=np.int64))
        read = time.perf_counter() - began
        for index, (rows, passed) in enumerate(extract(batch)):
            kept[index].append(rows)
            seconds[index] += read + passed
        progress.advance("images", len(batch))
    results = []
    for index, dtype in enumerate(dtypes):
        began = time.perf_counter()
        rows = np.concatenate(kept[index])
        kept[index] = []
        require_finite(rows, images, start)
        with np.errstate(over="ignore"):  # values too large for float16 become infinite and are refused below
            stored = rows.astype(dtype)
        require_finite(stored, images, start)
        np.save(Path(shared[1][index]) / f"features-{start // SHARD_ROWS:05d}.npy", stored)
        results.append((rows.shape[1], seconds[index] + time.perf_counter() - began))
    return results


@lru_cache(maxsize=2)  # a worker writes many shards of one source; at most two, since networks occupy device memory
def _source(canonical: str, versions: tuple[State, ...]) -> tuple[_ViewsExtractor, Images, list[str]]:
    """Extractor, images and dtypes for writing shards, from the canonical JSON of the sources of `write_views`.

    Args:
        versions: of the artifacts that are read, so that none is used any more once it was damaged and computed again.
    """
    sources = json.loads(canonical)
    first = sources[0]
    weights, state = (Path(first[name]) if first[name] else None for name in ("weights", "state"))
    extract = _views_extractor(
        [source["view"] for source in sources], weights, state, first["device"], first.get("max_batch_size")
    )
    return extract, _open_images(first), [source["dtype"] for source in sources]


def _versions(canonical: str) -> tuple[State, ...]:
    first = json.loads(canonical)[0]
    return tuple(version_of(Path(first[name])) for name in ("weights", "state", "images") if first[name])


def _views_extractor(
    views: Sequence[Mapping[str, Any]], weights: Path | None, state: Path | None, device: str, max_batch_size: int | None
) -> _ViewsExtractor:
    if len(views) == 1:
        extractor = in_smaller_batches(view_extractor(views[0], weights, state, device), max_batch_size)

        def extract_one(images: NDArray[np.uint8]) -> list[tuple[NDArray[np.float32], float]]:
            began = time.perf_counter()
            rows = extractor(images)
            return [(rows, time.perf_counter() - began)]

        return extract_one
    network = trained_network(plugins.parse("backbone", views[0]["backbone"]), weights).to(device)
    extract = layers_extractor(network, [_layer_of(view) for view in views], views[0]["normalize"], views[0]["precision"])

    def extract_several(images: NDArray[np.uint8]) -> list[tuple[NDArray[np.float32], float]]:
        pieces = [extract(torch.from_numpy(piece).to(device)) for piece in _pieces(images, max_batch_size)]
        return [
            (np.concatenate([rows.float().cpu().numpy() for rows, _ in view]), sum(seconds for _, seconds in view))
            for view in zip(*pieces, strict=True)
        ]

    return extract_several


def in_smaller_batches(extractor: Extractor, max_batch_size: int | None) -> Extractor:
    """The extractor applied to at most `max_batch_size` images at a time; unchanged if that is None."""
    if max_batch_size is None:
        return extractor
    return lambda images: np.concatenate([extractor(piece) for piece in _pieces(images, max_batch_size)])


def _pieces(images: NDArray[np.uint8], max_batch_size: int | None) -> list[NDArray[np.uint8]]:
    size = max_batch_size or max(1, len(images))
    return [images[at : at + size] for at in range(0, len(images), size)]


def _open_images(source: dict[str, Any]) -> Images:
    return open_split(Path(source["images"]), source["split"], TypeAdapter(DataSpec).validate_python(source["data"]))


def shards(directory: Path) -> list[Path]:
    """The shard files of `write`, in row order.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(directory.glob("features-*.npy"))
    if not found:
        raise FileNotFoundError(f"{directory.name} contains no features")
    return found


def load(directory: Path) -> NDArray[np.float32]:
    """All features (N, D) as float32."""
    return np.concatenate([np.load(intact(path), allow_pickle=False) for path in shards(directory)]).astype(
        np.float32, copy=False
    )
