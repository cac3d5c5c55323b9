"""Extraction of features (N, D) from images, by a layer of a network or by a descriptor, in shards of fixed size.

Shards are bitwise identical for any number of workers: each shard is computed in the same batches, and on a GPU the batch size
depends on the size of the images and the memory of the GPU alone. Several layers of one network come out of one forward pass.
While a batch is computed, the next one is read and the last one written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor, nn

from ktray import conditions, fingerprint, plugins, progress
from ktray.checksums import State, intact, version_of
from ktray.errors import UserError
from ktray.features import graphed_pass
from ktray.features.graphed_pass import GraphedPass
from ktray.images import Images, open_split
from ktray.ops import augmentation, precision, resizing
from ktray.pool import Pool
from ktray.spec import (
    BackboneSpec,
    ChannelStatistics,
    DataSpec,
    HandcraftedTeacher,
    LoadedTeacher,
    NamedTeacher,
    Normalization,
    Pooling,
    Precision,
    StudentTeacher,
    TeacherSpec,
    TrainedTeacher,
)
from ktray.text import some_of
from ktray.training import loop, snapshot, timm_weights

View = tuple[str | None, Pooling]
"""A layer of a network (None for the output of its forward pass), and how its maps become one vector."""


def layer_extractor(
    network: nn.Module,
    layer: str | None,
    pool: Pooling,
    normalize: Normalization | ChannelStatistics = "ktray",
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
    network: nn.Module,
    views: Sequence[View],
    normalize: Normalization | ChannelStatistics = "ktray",
    computed_in: Precision = "float32",
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
    run = _forward(network, views, normalize)

    @torch.inference_mode()
    def extract(images: Tensor) -> list[tuple[Tensor, float]]:
        with precision.computing_in(computed_in, images.device):
            return run(images, timed=True)

    return extract


class _Run(Protocol):
    def __call__(self, images: Tensor, timed: bool) -> list[tuple[Tensor, float]]:
        """As `layers_extractor`; without `timed` the seconds on a GPU mean nothing, and nothing waits for them."""


def _forward(
    network: nn.Module, views: Sequence[View], normalize: Normalization | ChannelStatistics, resize: Resize | None = None
) -> _Run:
    """The tensor operations of `layers_extractor`, in whatever precision and mode they are called.

    Args:
        resize: of the images, if they are not of the size that the network sees.

    Raises:
        UserError: as `layer_extractor`.
    """
    network.eval()
    network.to(memory_format=torch.channels_last)
    layers: tuple[str, ...] = network.layers  # type: ignore[assignment]
    wanted = {layer for layer, _ in views}
    for layer in wanted - {None, *layers, *token_layers(network)}:
        raise UserError(f"the backbone has no layer {layer!r}", "layer", f"One of: {', '.join(layers)}.")
    hooked = {layer: network.get_submodule(layer) for layer in wanted if layer is not None}

    def run(images: Tensor, timed: bool) -> list[tuple[Tensor, float]]:
        collector = _LayerOutputs(views, timed)
        handles = [module.register_forward_hook(collector.hook_for(layer)) for layer, module in hooked.items()]
        seen = images if resize is None else resizing.resized(images, *resize)
        try:
            collector.hook_for(None)(network, (), network(augmentation.normalize(seen, normalize)))
        except _LastLayerReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if len(collector.found) < len(views):
            missing = next(layer for index, (layer, _) in enumerate(views) if index not in collector.found)
            raise ValueError(f"the forward pass never runs the layer {missing!r}")
        return [collector.found[index] for index in range(len(views))]

    return run


def token_layers(network: nn.Module) -> tuple[str, ...]:
    """The outputs of a network that have other tokens than patches, beside its `layers`; a network may have none."""
    found: tuple[str, ...] = getattr(network, "token_layers", ())
    return found


class _LayerOutputs:
    """Outputs collected in one forward pass: index of a view -> its rows, and the seconds until they were ready."""

    def __init__(self, views: Sequence[View], timed: bool) -> None:
        self.views, self.timed, self.began = views, timed, time.perf_counter()
        self.found: dict[int, tuple[Tensor, float]] = {}

    def hook_for(self, layer: str | None) -> Callable[[Any, Any, _Output], None]:
        """The forward hook of a layer; if it runs several times, the first output counts, as in a pass for it alone."""

        def hook(_: Any, __: Any, output: _Output) -> None:
            for index, (name, pool) in enumerate(self.views):
                if name == layer and index not in self.found:
                    rows = _pooled(output, pool)
                    if len(self.views) > 1:
                        rows = rows.clone()  # later layers may change the output in place
                        if rows.is_cuda and self.timed:
                            torch.cuda.synchronize(rows.device)
                    self.found[index] = rows, time.perf_counter() - self.began
            if len(self.found) == len(self.views):
                raise _LastLayerReached

        return hook


class _LastLayerReached(Exception):
    """Raised by a hook to end the forward pass once all requested outputs are collected."""


_Output = Tensor | tuple[Tensor, Tensor]
"""Rows (B, D), maps (B, C, h, w), or tokens (B, P, C) and the maps that come after them in a vector."""


def _pooled(output: _Output, pool: Pooling) -> Tensor:
    if isinstance(output, tuple):
        tokens, maps = output
        return torch.cat([tokens.flatten(1).float(), _pooled(maps, pool)], dim=1)
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
TOOLS_OF_SOME = (resizing, timm_weights)  # in the keys of resized images and of teachers by their names alone

Resize = tuple[int, resizing.Interpolation]
"""Side in pixels to which images are resized, and how."""

BATCH = 256  # images that go through a network or descriptor at once; on a GPU, `graphed_pass.batch_size` for networks
SHARD_ROWS = 4096  # a multiple of every batch size, so that all images go through in the same batches, shards or not
SHARDS_PER_CALL = 8  # on a GPU, which would be idle while the first batch of each call is read and the last one is written

# Floating point operations of an extraction, and its images, from which compiling the network pays.
COMPILED_FROM, COMPILED_FROM_IMAGES = 3e15, 100_000
KEPT_SHARE = 1 / 32  # of a GPU's memory that a captured network may occupy while other stages run

Extractor = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
_ViewsExtractor = Callable[[NDArray[np.uint8]], list[tuple[NDArray[np.float32], float]]]
"""An extractor of several views at once: for each view its rows, and the seconds it would have taken on its own."""
_Batches = Callable[[Images, int, int], Iterator[tuple[int, list[tuple[NDArray[np.float32], float]]]]]
"""(images, start, stop) -> for one batch after the other, the index of its first image and what `_ViewsExtractor` gives."""


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
    normalize: Normalization | ChannelStatistics = "ktray",
    computed_in: Precision = "float32",
    resize: Resize | None = None,
) -> dict[str, Any]:
    """All that determines the features of a network, except its weights, as plain data.

    Args:
        resize: of the images, where the network sees them at another size than that of the data.
    """
    view = {
        "backbone": backbone.model_dump(),
        "layer": layer,
        "pool": pool.model_dump(),
        "normalize": normalize,
        "precision": computed_in,
    }
    return view if resize is None else {**view, "resize": {"size": resize[0], "interpolation": resize[1]}}


def resize_of(view: Mapping[str, Any] | None) -> Resize | None:
    """How the images of a view are resized before its network sees them; None if they are not."""
    found = (view or {}).get("resize")
    return (found["size"], found["interpolation"]) if found else None


def resized_to(image_size: int | None) -> Resize | None:
    """The resizing of a network that sees images of this size; None for one that sees those of the data."""
    return None if image_size is None else (image_size, "bilinear")


def seen_by(view: Mapping[str, Any] | None, images: Images) -> Images:
    """Images at the size at which the network of a view sees them."""
    resize = resize_of(view)
    return images if resize is None else resizing.at_size(images, *resize)


def teacher_view(teacher: TeacherSpec) -> dict[str, Any]:
    """All that determines the features of a teacher, except weights and state, as plain data: `network_view` or a descriptor.

    Raises:
        TypeError: its features are precomputed, not extracted.
        UserError: a teacher by its name is not on this machine.
    """
    if isinstance(teacher, HandcraftedTeacher):
        return {"descriptor": teacher.descriptor.model_dump()}
    if isinstance(teacher, NamedTeacher):
        found = timm_weights.find(teacher)
        layer, prepared = timm_weights.layer_of(teacher), found.preprocessing
        resize: Resize | None = None
        if teacher.input == "data":
            resize = (prepared.size, "bicubic" if prepared.interpolation == "bicubic" else "bilinear")
        statistics = prepared.statistics()
        return network_view(found.backbone, layer, teacher.pool, statistics, teacher.network_precision, resize)
    if isinstance(teacher, TrainedTeacher | LoadedTeacher | StudentTeacher):
        normalize = teacher.normalize if isinstance(teacher, LoadedTeacher) else "ktray"
        resize = resized_to(teacher.image_size)
        return network_view(teacher.backbone, teacher.layer, teacher.pool, normalize, teacher.network_precision, resize)
    raise TypeError(f"a {type(teacher).__name__} has no features to extract")


def _descriptor_extractor(view: Mapping[str, Any], state: Path | None, device: str) -> Extractor:
    spec = plugins.parse("descriptor", view["descriptor"])
    descriptor = plugins.module_of("descriptor", spec)
    fitted: dict[str, NDArray[Any]] | None = None
    if state is not None:
        with np.load(intact(state / "state.npz"), allow_pickle=False) as file:
            fitted = dict(file)
    elif hasattr(descriptor, "fit"):
        raise ValueError(f"the descriptor {spec.kind} must be fitted to images first; pass the directory of its state")

    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        rows: Tensor = descriptor.describe(spec, fitted, torch.from_numpy(images).to(device))
        return rows.float().cpu().numpy()

    return extract


def _layer_of(view: Mapping[str, Any]) -> tuple[str | None, Pooling]:
    return view["layer"], Pooling.model_validate(view["pool"])


def extract_views(
    views: Sequence[Mapping[str, Any]],
    weights: Path | None,
    state: Path | None,
    images: Images,
    device: str = "cpu",
    max_batch_size: int | None = None,
    *,
    expected: int | None = None,
    wanted: int | None = None,
    extra_bytes: int = 0,
) -> list[NDArray[np.float32] | None]:
    """Features (N, D) float32 of all images for each view; several views are of one network.

    Args:
        views: each a `teacher_view` or `network_view`.
        weights: directory of a snapshot, for views of a network.
        state: directory of `state.npz`, for a fitted descriptor.
        device: torch device.
        max_batch_size: most images that go through the device at once; None for a usual batch.
        expected: number of images that this network is going to see, these included; None for these alone.
        wanted: the rows of the views after the first so many are given up, and None returned for them, if they take more than
            `extra_bytes` together; None keeps all.

    Raises:
        UserError: the backbone has no such layer, or the pooling grid is finer than the maps.
        ValueError: a feature is not finite (the message names the first such image), or `weights` or `state` is missing.
    """
    count = len(images)
    images = seen_by(views[0], images)
    batches = _batches_of(views, weights, state, device, max_batch_size, images, max(count, expected or 0))
    found: list[NDArray[np.float32] | None] = []
    for at, results in batches(images, 0, count):
        if not found:
            widths = [rows.shape[1] for rows, _ in results]
            kept = len(views) if wanted is None or 4 * count * sum(widths[wanted:]) <= extra_bytes else wanted
            found = [np.empty((count, width), np.float32) if index < kept else None for index, width in enumerate(widths)]
        for rows, (part, _) in zip(found, results, strict=True):
            if rows is not None:
                rows[at : at + len(part)] = part
        progress.advance("images", len(results[0][0]))
    for rows in found:
        if rows is not None:
            require_finite(rows, images, 0)
    return found


def require_finite(rows: NDArray[Any], images: Images, start: int, exact: NDArray[Any] | None = None) -> None:
    """Raise if features (n, D) of the images from `start` on are not all finite.

    Args:
        exact: the same features before they were rounded to the type of `rows`, if they were.

    Raises:
        ValueError: the message names the first such image, and says whether its features are only too large for their type.
    """
    bad = ~np.isfinite(rows)
    if not bad.any():
        return
    too_large = exact is not None and bool(np.isfinite(exact).all())
    found = np.flatnonzero(bad.any(axis=1))
    first = int(found[0])
    name = f" ({images.names[start + first]})" if images.names else ""
    what = f"beyond the range of {rows.dtype}" if too_large else f"of type {rows.dtype} that are not finite"
    value = (rows if exact is None else exact)[first][bad[first]][0]
    raise ValueError(
        f"{some_of(len(found), len(rows), 'image', ('has', 'have'))} features {what}, "
        f"the first is image {start + first}{name} with {value:.4g}"
        + (f"; {rows.dtype} holds up to {np.finfo(rows.dtype).max:.5g}, so write dtype: float32" if too_large else "")
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
    step = SHARD_ROWS * (SHARDS_PER_CALL if torch.device(sources[0]["device"]).type == "cuda" else 1)
    items = [(start, min(start + step, count)) for start in range(0, count, step)]
    written = pool.map(_write_shards, items, (fingerprint.canonical(list(sources)), [str(out) for out in outs]))
    release_large_network()
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
    """Write consecutive shards of every view; for each, its width and the seconds it would have taken on its own."""
    start, stop = item
    batches, images, dtypes = _source(shared[0], _versions(shared[0]))
    seconds, widths = [0.0 for _ in dtypes], [0 for _ in dtypes]
    shard: list[NDArray[np.float32]] = []
    began = time.perf_counter()
    with ThreadPoolExecutor(1, thread_name_prefix="ktray-write") as writer:
        writing: list[Future[float]] = []
        for at, results in batches(images, start, stop):
            first = at - at % SHARD_ROWS
            if not shard:
                length = min(stop - first, SHARD_ROWS)
                shard = [np.empty((length, rows.shape[1]), np.float32) for rows, _ in results]
            for index, (rows, passed) in enumerate(results):
                shard[index][at - first : at - first + len(rows)] = rows
                widths[index] = rows.shape[1]
                seconds[index] += passed
            if at - first + len(results[0][0]) == len(shard[0]):
                for index, saved in enumerate(writing):
                    seconds[index] += saved.result()
                paths = [Path(out) / f"features-{first // SHARD_ROWS:05d}.npy" for out in shared[1]]
                writing = [
                    writer.submit(_save, rows, dtype, path, images, first)
                    for rows, dtype, path in zip(shard, dtypes, paths, strict=True)
                ]
                shard = []
            progress.advance("images", len(results[0][0]))
        for index, saved in enumerate(writing):
            seconds[index] += saved.result()
    # Reading, computing and writing overlap, so that the parts take less than they would one after the other.
    overlap = min(1.0, (time.perf_counter() - began) / max(*seconds, 1e-9))
    return [(width, passed * overlap) for width, passed in zip(widths, seconds, strict=True)]


def _save(rows: NDArray[np.float32], dtype: str, path: Path, images: Images, first: int) -> float:
    """Write a shard, whose first image has this index; the seconds that it took."""
    began = time.perf_counter()
    require_finite(rows, images, first)
    with np.errstate(over="ignore"):  # values too large for float16 become infinite and are refused below
        stored = rows.astype(dtype, copy=False)
    if stored.dtype != rows.dtype:
        require_finite(stored, images, first, exact=rows)
    np.save(path, stored)
    return time.perf_counter() - began


@lru_cache(maxsize=2)  # a worker writes many shards of one source; at most two, since networks occupy device memory
def _source(canonical: str, versions: tuple[State, ...]) -> tuple[_Batches, Images, list[str]]:
    """What computes batches, the images, and the dtypes of shards, from the canonical JSON of the sources of `write_views`.

    Args:
        versions: of the artifacts that are read, so that none is used any more once it was damaged and computed again.
    """
    sources = json.loads(canonical)
    first, images = sources[0], _open_images(sources[0])
    weights, state = (Path(first[name]) if first[name] else None for name in ("weights", "state"))
    views = [source["view"] for source in sources]
    images = seen_by(views[0], images)
    batches = _batches_of(views, weights, state, first["device"], first.get("max_batch_size"), images, len(images))
    return batches, images, [source["dtype"] for source in sources]


def _versions(canonical: str) -> tuple[State, ...]:
    first = json.loads(canonical)[0]
    return tuple(version_of(Path(first[name])) for name in ("weights", "state", "images") if first[name])


def _batches_of(
    views: Sequence[Mapping[str, Any]],
    weights: Path | None,
    state: Path | None,
    device: str,
    max_batch_size: int | None,
    images: Images,
    expected: int,
) -> _Batches:
    """What computes the views of `expected` images like these, batch by batch."""
    if "backbone" not in views[0]:
        [view] = views
        return _batches_of_arrays(_timed(_descriptor_extractor(view, state, device), max_batch_size))
    if torch.device(device).type == "cuda":
        return _batches_of_graph(views, weights, device, max_batch_size, (images.stored or images).size, expected)
    network = trained_network(plugins.parse("backbone", views[0]["backbone"]), weights)
    extract = layers_extractor(network, [_layer_of(view) for view in views], views[0]["normalize"], views[0]["precision"])

    def extract_all_views(pixels: NDArray[np.uint8]) -> list[tuple[NDArray[np.float32], float]]:
        pieces = [extract(torch.from_numpy(piece)) for piece in _pieces(pixels, max_batch_size)]
        return [
            (np.concatenate([rows.numpy() for rows, _ in view]), sum(seconds for _, seconds in view))
            for view in zip(*pieces, strict=True)
        ]

    return _batches_of_arrays(extract_all_views)


def _timed(extractor: Extractor, max_batch_size: int | None) -> _ViewsExtractor:
    def extract(pixels: NDArray[np.uint8]) -> list[tuple[NDArray[np.float32], float]]:
        began = time.perf_counter()
        rows = np.concatenate([extractor(piece) for piece in _pieces(pixels, max_batch_size)])
        return [(rows, time.perf_counter() - began)]

    return extract


def _batches_of_arrays(extract: _ViewsExtractor) -> _Batches:
    """Batches of `BATCH` images; the next one is read while one is computed."""

    def read(images: Images, at: int, stop: int) -> tuple[NDArray[np.uint8], float]:
        began = time.perf_counter()
        pixels = images.read(np.arange(at, min(at + BATCH, stop), dtype=np.int64))
        return pixels, time.perf_counter() - began

    def batches(images: Images, start: int, stop: int) -> Iterator[tuple[int, list[tuple[NDArray[np.float32], float]]]]:
        with ThreadPoolExecutor(1, thread_name_prefix="ktray-read") as reader:
            ahead = reader.submit(read, images, start, stop)
            for at in range(start, stop, BATCH):
                pixels, seconds = ahead.result()
                if at + BATCH < stop:
                    ahead = reader.submit(read, images, at + BATCH, stop)
                yield at, [(rows, seconds + passed) for rows, passed in extract(pixels)]

    return batches


@dataclass
class _Kept:
    """A captured network, kept for later snapshots of the same network and views, whose weights take the place of its own."""

    name: str
    network: nn.Module
    weights: tuple[Path, State]
    graphed: GraphedPass
    shares: list[float]


_kept: list[_Kept] = []  # at most one, since it occupies device memory


def _batches_of_graph(
    views: Sequence[Mapping[str, Any]], weights: Path | None, device: str, max_batch_size: int | None, side: int, expected: int
) -> _Batches:
    resize = resize_of(views[0])
    largest = side if resize is None else max(side, resize[0])
    size = graphed_pass.batch_size(largest, torch.cuda.get_device_properties(device).total_memory)
    size = min(size, max_batch_size or size)

    def batches(images: Images, start: int, stop: int) -> Iterator[tuple[int, list[tuple[NDArray[np.float32], float]]]]:
        kept = _captured(views, weights, device, size, side, expected)
        graphed = kept.graphed
        conditions.note("extraction", {"batch": graphed.size, "cuda_graph": graphed.graphed, "compiled": graphed.compiled})
        began = time.perf_counter()
        for at, found in graphed.batches(images.stored or images, start, stop):
            passed = time.perf_counter() - began
            yield at, [(rows, share * passed) for rows, share in zip(found, kept.shares, strict=True)]
            began = time.perf_counter()

    return batches


def _captured(
    views: Sequence[Mapping[str, Any]], weights: Path | None, device: str, size: int, side: int, expected: int
) -> _Kept:
    """The captured network with these weights: the kept one, or a new one that takes its place."""
    compiled = _pays_to_compile(fingerprint.canonical(list(views)), side, expected)
    own = [str(weights), *version_of(weights)] if compiled and weights else []  # a program may have copies of the weights
    name = fingerprint.canonical([list(views), device, size, side, compiled, own])
    if not _kept or _kept[0].name != name:
        _kept.clear()
        _kept.append(_newly_captured(name, views, weights, device, size, side, compiled))
    kept = _kept[0]
    if weights is not None and (kept.weights != (weights, version_of(weights)) or not kept.weights[1]):
        kept.weights = Path(), ()  # until all are loaded: an error on the way would leave some of each
        snapshot.load_backbone(kept.network, weights)  # always from a folder without a record, which may have changed
        kept.weights = weights, version_of(weights)
    return kept


def _newly_captured(
    name: str,
    views: Sequence[Mapping[str, Any]],
    weights: Path | None,
    device: str,
    size: int,
    side: int,
    compiled: bool,
) -> _Kept:
    network, given = trained_network(plugins.parse("backbone", views[0]["backbone"]), weights).to(device), weights or Path()
    layers, normalize, computed_in = [_layer_of(view) for view in views], views[0]["normalize"], views[0]["precision"]
    run = _forward(network, layers, normalize, resize_of(views[0]))
    graphed = GraphedPass(
        lambda images: [rows for rows, _ in run(images, timed=False)],
        size,
        side,
        device,
        lambda: precision.computing_in(computed_in, device),
        compiled,
    )
    shares = [1.0]
    if len(views) > 1:
        seen = side if (resize := resize_of(views[0])) is None else resize[0]
        some = torch.zeros(min(size, BATCH), seen, seen, 3, dtype=torch.uint8, device=device)
        timed = [seconds for _, seconds in layers_extractor(network, layers, normalize, computed_in)(some)]
        shares = [seconds / max(timed) for seconds in timed]
    return _Kept(name, network, (given, version_of(given)), graphed, shares)


def release_large_network() -> None:
    """Free the device memory of a captured network if it is much, so that other stages and processes can use it."""
    if _kept and _kept[0].graphed.activation_bytes > KEPT_SHARE * _kept[0].graphed.device_bytes:
        _kept.clear()


@lru_cache(maxsize=64)
def _pays_to_compile(views: str, side: int, expected: int) -> bool:
    """Whether to compile a network for so many images. It depends on nothing else, for it changes the last bits of features."""
    if expected < COMPILED_FROM_IMAGES:
        return False
    from torch.utils.flop_counter import FlopCounterMode

    parsed = json.loads(views)
    side = side if (resize := resize_of(parsed[0])) is None else resize[0]
    network = loop.untrained_backbone(plugins.parse("backbone", parsed[0]["backbone"]), 0)
    extract = layers_extractor(network, [_layer_of(view) for view in parsed])
    with FlopCounterMode(display=False) as counter:
        extract(torch.zeros(1, side, side, 3, dtype=torch.uint8))
    return bool(counter.get_total_flops() * expected >= COMPILED_FROM)


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
