"""Resources: what each kind of stage requests, read from the runtime file, and which share of a GPU it gets by default.

Nothing here is hashed, and nothing here may change a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ktray.artifact import Artifact, kind_of
from ktray.errors import UserError
from ktray.strict import StrictSpec, plain_types
from ktray.text import near_word, shown
from ktray.yaml_file import read_yaml

STAGES = ("images", "teacher", "features", "clusters", "pseudo_labels", "student", "evaluation")
_MOST_CPUS, _MOST_SECONDS, _MOST_BYTES = 100_000, 30 * 86_400, 1 << 60  # beyond any machine; clocks and sums overflow later
_EXAMPLE = "Write {cpus: 8, stages: {student: {gpus: 0.5}}}."


class ResourceRequest(StrictSpec):
    """What one stage holds while it runs.

    Attributes:
        cpus: CPUs of the worker that runs it; the usual worker has one.
        gpus: share of a GPU, such as 0.5, or a number of GPUs; such a worker holds no CPU in Ray's accounts. None leaves it to
            `GpuShares`; 0 runs the stage on CPUs even where there are GPUs.
        memory_bytes: host memory that placement reserves on the node; 0 reserves nothing.
        helpers: how many more workers of the same shape it may borrow while they are idle.
    """

    cpus: float = Field(default=1.0, gt=0, le=_MOST_CPUS)
    gpus: float | None = Field(default=None, ge=0, le=_MOST_CPUS)
    memory_bytes: int = Field(default=0, ge=0, le=_MOST_BYTES)
    helpers: int = Field(default=0, ge=0, le=_MOST_CPUS)


DEFAULT_REQUEST = ResourceRequest()
SPLITTABLE = {name: ResourceRequest(helpers=63) for name in ("images", "features", "clusters", "pseudo_labels")}


class RuntimeSettings(StrictSpec):
    """Resources, limits and timeouts, from the file given with ``--runtime``.

    Attributes:
        cpus: CPUs for workers, None for all that the cluster has.
        stages: stage name -> request; a stage that is not named requests one CPU, or, if it is one of `GPU_STAGES` and the
            cluster has GPUs, a share of one of these and no CPU.
        heartbeat_seconds: time between two heartbeats of a worker.
        dead_after: seconds without a heartbeat after which a worker is killed and its stage starts elsewhere.
        idle_exit_seconds: how long a scheduler without a driver lives on.
        checkpoint_seconds: how much work a killed stage may lose.
        memmap_bytes: pixels above this are streamed instead of written to a memmap.
    """

    cpus: int | None = Field(default=None, ge=1, le=_MOST_CPUS)
    stages: Mapping[str, ResourceRequest] = SPLITTABLE
    heartbeat_seconds: float = Field(default=0.5, gt=0, le=_MOST_SECONDS)
    dead_after: float = Field(default=15.0, gt=0, le=_MOST_SECONDS)
    idle_exit_seconds: float = Field(default=30.0, gt=0, le=_MOST_SECONDS)
    checkpoint_seconds: float = Field(default=20.0, gt=0, le=_MOST_SECONDS)
    memmap_bytes: int = Field(default=20 << 30, ge=0, le=_MOST_BYTES)

    def resources_for(self, stage: str) -> ResourceRequest:
        """The request of the stage of this name."""
        return self.stages.get(stage, DEFAULT_REQUEST)


def load_runtime_settings(path: Path | None) -> RuntimeSettings:
    """The settings in a YAML file, such as ``{cpus: 8, stages: {student: {gpus: 0.5}}}``; the defaults without one.

    Raises:
        UserError: the file is unreadable, or a field is unknown or out of range.
    """
    if path is None:
        return RuntimeSettings()
    fields = _require_mapping(_none_as_empty_mapping(read_yaml(path)), str(path))
    stages: dict[str, Any] = {name: request.model_dump() for name, request in SPLITTABLE.items()}
    for name, entry in _require_mapping(_none_as_empty_mapping(fields.get("stages")), f"{path}: stages").items():
        if name not in STAGES:
            raise UserError(f"there is no stage {shown(name)}", f"{path}: stages.{name}", _suggestion(name, STAGES))
        stages[name] = stages.get(name, {}) | _require_mapping(entry, f"{path}: stages.{name}")
    try:
        return RuntimeSettings.model_validate({**fields, "stages": stages})
    except ValidationError as error:
        raise _runtime_file_error(error, path) from None


def _none_as_empty_mapping(value: Any) -> Any:
    return {} if value is None else value


def _require_mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{shown(value)} is not a mapping of names to values", where, _EXAMPLE)
    return value


def _suggestion(name: str, known: tuple[str, ...]) -> str:
    near = near_word(name, known)
    return f"Did you mean {near}?" if near else f"Known are {', '.join(known)}."


def _runtime_file_error(error: ValidationError, path: Path) -> UserError:
    """The first of pydantic's complaints, as one about the runtime file."""
    complaint = error.errors()[0]
    *outer, name = map(str, complaint["loc"])
    where = ": ".join([str(path), *filter(None, [".".join(outer)])])
    model: type[StrictSpec] = ResourceRequest if outer else RuntimeSettings
    if complaint["type"] == "extra_forbidden":
        return UserError(f"the field {shown(name)} is unknown", where, _suggestion(name, tuple(model.model_fields)))
    noun = "a whole number" if int in plain_types(model, name) else "a number"
    bounds = [*(f"from {limit.ge}" for limit in model.model_fields[name].metadata if hasattr(limit, "ge"))]
    bounds += [f"above {limit.gt}" for limit in model.model_fields[name].metadata if hasattr(limit, "gt")]
    bounds += [f"up to {limit.le:,}" for limit in model.model_fields[name].metadata if hasattr(limit, "le")]
    return UserError(f"{name}: {shown(complaint['input'])} is not {' '.join([noun, *bounds])}", where)


# ---- default shares of a GPU

GPU_STAGES = ("teacher", "student", "features", "clusters", "evaluation")
ON_EITHER = ("clusters",)  # of these, those whose result has the same bits on CPUs
DEFAULT_GPU_SHARE = 0.25  # small networks: four at once keep a GPU busier than one, and all kinds share the same warm workers
_SHARES = (0.25, 0.5, 1.0)
_ALLOCATOR_FACTOR = 1.2  # torch's allocator reserves more than the tensors need
_CUDA_CONTEXT_BYTES = 600 << 20  # what CUDA takes for each process


class GpuShares:
    """Requests of stages, with GPU shares that grow with recorded peaks. They never shrink, so that workers keep their shape.

    Args:
        resources_for: stage name -> request by the runtime file and its defaults. Where `gpus` is None, a stage that runs a
            network or k-means gets a share while the cluster has GPUs, and every other stage none.
        has_gpus: whether the cluster has GPUs now.
    """

    def __init__(self, resources_for: Callable[[str], ResourceRequest], has_gpus: Callable[[], bool]) -> None:
        self._resources_for, self._has_gpus = resources_for, has_gpus
        self._shares: dict[str, float] = {}
        self._requests: dict[tuple[str, float], ResourceRequest] = {}

    def __call__(self, stage: str) -> ResourceRequest:
        """The request of the stage of this name, its `gpus` a number."""
        request = self._resources_for(stage)
        if request.gpus is not None:
            return request
        gpus = self._shares.get(stage, DEFAULT_GPU_SHARE) if stage in GPU_STAGES and self._has_gpus() else 0.0
        if (stage, gpus) not in self._requests:  # every dispatch asks for each kind of stage
            self._requests[stage, gpus] = request.model_copy(update={"gpus": gpus})
        return self._requests[stage, gpus]

    def on_cpus(self, stage: str) -> ResourceRequest | None:
        """What the stage of this name requests where it runs on CPUs instead; None if it must not.

        That is for stages with the same result on both, unless the runtime file says where they run.
        """
        request = self._resources_for(stage)
        return request.model_copy(update={"gpus": 0.0}) if stage in ON_EITHER and request.gpus is None else None

    def learn_peak_memory(self, artifact: Artifact) -> None:
        """Learn from the peak in the record of a stage that ran on a GPU."""
        record = artifact.record
        peak, total = record.get("device_peak_bytes", 0), record.get("device_bytes", 0)
        if not peak or not total:
            return
        stage = kind_of(artifact.key)
        self._increase_share(stage, smallest_sufficient_share(peak, total))
        if record.get("after_out_of_memory"):  # the peak is that of a second run, which took smaller batches
            self.increase_after_out_of_memory(stage, DEFAULT_GPU_SHARE)

    def increase_after_out_of_memory(self, stage: str, share: float) -> None:
        """Give stages of this name more than `share`, with which one ran out of memory, whatever their peaks say."""
        if share:
            self._increase_share(stage, next((larger for larger in _SHARES if larger > share), 1.0))

    def _increase_share(self, stage: str, share: float) -> None:
        self._shares[stage] = max(self._shares.get(stage, DEFAULT_GPU_SHARE), share)


def smallest_sufficient_share(peak: int, total: int) -> float:
    """The smallest share of a GPU with `total` bytes that holds a process whose tensors take `peak` bytes."""
    needed = (peak * _ALLOCATOR_FACTOR + _CUDA_CONTEXT_BYTES) / total
    return next((share for share in _SHARES if share >= needed), 1.0)
