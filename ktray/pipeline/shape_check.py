"""Runs two random images through each network and descriptor of a pair, to find errors of shape before a run.

Each distinct network, layer, pooling, descriptor and pretext task runs once per process and size of images, on the CPU. A
plugin may help: its `check` rejects a spec, and its `quick` returns one with the same shapes that is quick to try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ktray import plugins
from ktray.errors import UserError
from ktray.features import extraction
from ktray.images import Images
from ktray.plugins import PluginSpec
from ktray.spec import (
    BackboneSpec,
    DescriptorSpec,
    HandcraftedTeacher,
    NetworkTeacher,
    PairSpec,
    Pooling,
    PretextSpec,
    Student,
    TeacherSpec,
    TrainedTeacher,
)
from ktray.stages.evaluation_stage import reads_pseudo_labels
from ktray.strict import StrictSpec

_COUNT = 2  # images; batch norm cannot be trained on fewer


def try_networks(pair: PairSpec, cluster_images: int) -> None:
    """Run the networks, descriptors and tasks of a pair on two images.

    Args:
        cluster_images: number of images that a descriptor is fitted to.

    Raises:
        UserError: the first thing that fails, with its dotted path.
    """
    with _one_thread():
        _try(pair, cluster_images)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Two images are too few for several threads, which would mostly wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _try(pair: PairSpec, cluster_images: int) -> None:
    data, teacher, student = pair.data, pair.teacher, pair.student
    sizes = {role: getattr(data, role).size for role in ("pretext", "cluster", "transfer", "target")}
    judged = sizes["target"]
    if isinstance(teacher, HandcraftedTeacher):
        _try_descriptor(teacher.descriptor, sizes, cluster_images)
    elif isinstance(teacher, NetworkTeacher):
        _try_teacher(teacher, sizes)
    if "clusters" in plugins.module_of("transfer", pair.transfer).NEEDS:
        _same_width(teacher, sizes)
    with _errors_at("student.backbone", f"the {student.backbone.kind} cannot take images of {sizes['transfer']} px"):
        _extract(student.backbone, None, Pooling(), sizes["transfer"])
    for index, spec in enumerate(pair.evals):
        if reads_pseudo_labels(spec):
            continue
        network = student if spec.of == "student" else teacher
        if not isinstance(network, Student | NetworkTeacher):
            continue  # a descriptor, which `_try_descriptor` has tried, or precomputed features
        layer, pool = spec.layer, spec.pool
        if not isinstance(network, Student) and layer is None:
            layer, pool = network.layer, network.pool
        with _errors_at(f"evals.{index}", f"the {network.backbone.kind} cannot take images of {judged} px"):
            _extract(network.backbone, layer, pool, judged)


def _try_teacher(teacher: NetworkTeacher, sizes: dict[str, int]) -> None:
    kind, size = teacher.backbone.kind, sizes["pretext"]
    if isinstance(teacher, TrainedTeacher):
        run_plugin_check("teacher.pretext", "pretext", teacher.pretext)
        with _errors_at("teacher.backbone", f"the {kind} cannot learn {teacher.pretext.kind} from images of {size} px"):
            _learn(teacher.pretext, teacher.backbone, size)
    for role in ("cluster", "transfer"):
        with _errors_at("teacher", f"the {kind} cannot take images of {sizes[role]} px"):
            _extract(teacher.backbone, teacher.layer, teacher.pool, sizes[role])


def _same_width(teacher: TeacherSpec | None, sizes: dict[str, int]) -> None:
    """Check that clusters are applied to features of the same width as those that they were made of."""
    widths = {}
    for role in ("cluster", "transfer"):
        if isinstance(teacher, HandcraftedTeacher):
            widths[role] = _describe(teacher.descriptor, sizes[role])
        elif isinstance(teacher, NetworkTeacher):
            widths[role] = _extract(teacher.backbone, teacher.layer, teacher.pool, sizes[role])
    if len(set(widths.values())) > 1:
        raise UserError(
            f"images of {sizes['cluster']} px have {widths['cluster']} features each and those of {sizes['transfer']} px "
            f"{widths['transfer']}, so the clusters of data.cluster cannot be applied to data.transfer",
            "data.transfer.size",
            f"Use {sizes['cluster']} px for both, or a teacher whose features are pooled.",
        )


def _try_descriptor(descriptor: DescriptorSpec, sizes: dict[str, int], count: int) -> None:
    for size in sorted({sizes[role] for role in ("cluster", "transfer", "target")}):
        with _errors_at("teacher.descriptor", f"the descriptor {descriptor.kind} cannot take images of {size} px", descriptor):
            _describe(descriptor, size)
    run_plugin_check("teacher.descriptor", "descriptor", descriptor, sizes["cluster"], count)


def run_plugin_check(path: str, group: str, spec: PluginSpec, *data: int) -> None:
    """Run a plugin's `check` on its spec, if it has one.

    Args:
        path: dotted path of the spec in the pair.
        data: further arguments of `check`, as documented in the group's `__init__`.

    Raises:
        UserError: the plugin rejects its spec.
    """
    check = getattr(plugins.module_of(group, spec), "check", None)
    if check:
        with _errors_at(path, f"the {group} {spec.kind} cannot be made", spec):
            check(spec, *data)


@contextmanager
def _errors_at(path: str, failed: str, spec: PluginSpec | None = None) -> Iterator[None]:
    """Turn any error into a UserError with a dotted path; `spec` is that of the plugin that may raise."""
    try:
        yield
    except UserError as error:
        field = error.where.removeprefix("descriptor.")
        parent = _parent_of(spec, field.split(".")[0]) if spec else ""
        where = f"{path.removesuffix('.backbone')}.{parent}{field}" if field else path
        raise UserError(error.problem, where, error.instead) from error
    except Exception as error:  # torch and plugins may raise anything for a pair that does not fit
        message = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{failed}: {message}", path, "Use other images, such as larger ones (data.size), or another form."
        ) from error


def _parent_of(spec: PluginSpec, field: str) -> str:
    """Prefix of `field`, such as ``hog.``, if it belongs to a spec inside the descriptor's; otherwise empty."""
    own = type(spec).model_fields if isinstance(spec, StrictSpec) else {}
    specs = ((name, getattr(spec, name)) for name in own)
    inner = (name for name, part in specs if isinstance(part, StrictSpec) and field in type(part).model_fields)
    return "" if field in own else "".join(f"{name}." for name in list(inner)[:1])


def _pixels(size: int) -> Tensor:
    """Random pixels, (2, size, size, 3) uint8."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (_COUNT, size, size, 3), dtype=np.uint8))


def _images(size: int) -> Images:
    pixels = _pixels(size).numpy()
    return Images(_COUNT, size, lambda rows: pixels[rows % _COUNT], np.arange(_COUNT), ("0", "1"), ("0", "1"))


@lru_cache(maxsize=1024)
def _extract(backbone: BackboneSpec, layer: str | None, pool: Pooling, size: int) -> int:
    """Number of features of an image."""
    return _network(backbone, layer, pool)(_pixels(size)).shape[1]


@lru_cache(maxsize=2)  # the sizes for one network are tried in succession
def _network(backbone: BackboneSpec, layer: str | None, pool: Pooling) -> Callable[[Tensor], Tensor]:
    return extraction.layer_extractor(_built(backbone), layer, pool)


def _built(backbone: BackboneSpec) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = plugins.module_of("backbone", backbone).build(backbone)
    return network


@lru_cache(maxsize=1024)
def _describe(descriptor: DescriptorSpec, size: int) -> int | None:
    """Number of features of an image; None for a fitted descriptor, where it depends on the fit."""
    module = plugins.module_of("descriptor", descriptor)
    state = None
    if hasattr(module, "fit"):
        if not hasattr(module, "quick"):
            return None  # it may need more than two images
        descriptor = module.quick(descriptor)
        state = module.fit(descriptor, _images(size))
    described = module.describe(descriptor, state, _pixels(size))
    if not bool(torch.isfinite(described).all()):
        raise ValueError("its features are not finite")
    return None if state else int(described.shape[1])


@lru_cache(maxsize=1024)
def _learn(pretext: PretextSpec, backbone: BackboneSpec, size: int) -> None:
    """One forward pass of the task's model, and its loss."""
    module = plugins.module_of("pretext", pretext)
    pretext = module.quick(pretext) if hasattr(module, "quick") else pretext
    task = module.task(pretext, size, _images(size)) if hasattr(module, "NEEDS") else module.task(pretext, size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        network: Any = _built(backbone)
        model = nn.ModuleDict({"backbone": network, "head": task.head(network.feature_dim)}).train()
        if task.prepare:
            task.prepare(model)
        inputs, targets = task.batch(_pixels(size), torch.arange(_COUNT), torch.Generator().manual_seed(0))
        outputs = task.forward(model, inputs) if task.forward else model["head"](network(inputs))
        task.loss(outputs, targets)
