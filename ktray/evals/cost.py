"""Cost of running the network: parameters, floating-point operations, and how long a batch takes on the machine that judges.

What is timed is the network up to its own features, without the classifier of pseudo-labels. `gflops` counts a multiplication
with its addition once, as torchvision's published figures do. Times depend on the machine: they compare networks that were
judged on the same one, which the record names, and `cost.json` has its processor and numbers of threads and repetitions.

Source: none; torch's `FlopCounterMode` for the operations.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from ktray import progress
from ktray.checkpoints import Attempt
from ktray.errors import UserError
from ktray.export import programs
from ktray.features.judged_network import JudgedNetwork
from ktray.images import Images
from ktray.ops.precision import computing_in
from ktray.spec import EvaluationFields, refuse_pool

REVISION = 1
NEEDS_LABELS = False
READS_NETWORK = True
DEPENDS_ON_MACHINE = True
BATCHES = {"latency_ms": 1, "images_per_s": 64}
DIRECTION: dict[str, Literal["max", "min"]] = {
    "parameters": "min",
    "gflops": "min",
    "file_mb": "min",
    "latency_ms": "min",
    "latency_ms_iqr": "min",
    "images_per_s": "max",
    "images_per_s_iqr": "min",
}
PLACES = ("cpu", "gpu", "onnx_cpu", "onnx_gpu")


class Spec(EvaluationFields):
    """Counts and times. Nothing but the network is read, so `layer`, `pool` and `split` do not apply."""

    kind: Literal["cost"] = "cost"
    layer: None = Field(default=None, description="always null")
    split: Literal["val"] = Field(default="val", description="always val: no images are judged")
    repetitions: int = Field(default=30, ge=3, le=10_000, description="timed batches of each size, after a few that are not")
    onnx: bool = Field(default=True, description="also time the exported ONNX, where onnxruntime is installed")

    @model_validator(mode="after")
    def _reads_no_features(self) -> Spec:
        refuse_pool(self)
        return self


def directions(spec: Spec) -> dict[str, Literal["max", "min"]]:
    """The metrics that this spec may give; those of a place are there only on a machine that has it."""
    timed = {name: mode for name, mode in DIRECTION.items() if name.startswith(tuple(BATCHES))}
    return {**DIRECTION, **{f"{place}_{name}": mode for place in PLACES for name, mode in timed.items()}}


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
    """`parameters`, `gflops` of an image, `file_mb` of the weights, and times with their spread (interquartile range).

    `latency_ms` is the median time of one image, `images_per_s` the median rate at 64 images, both on the device of the stage;
    `cpu_latency_ms`, `gpu_latency_ms`, `onnx_cpu_latency_ms` and so on say it for each place there is.
    """
    model = network.build().eval()
    size = judged.size or train.size
    metrics = {
        "parameters": float(sum(each.numel() for each in model.parameters())),
        "gflops": gflops(model.to("cpu"), size),
        "file_mb": sum(each.numel() * each.element_size() for each in model.state_dict().values()) / 1e6,
    }
    pixels = torch.randint(0, 256, (BATCHES["images_per_s"], size, size, 3), dtype=torch.uint8)
    inputs = network.inputs(pixels)
    timed = {"cpu": _torch_call(model, network, "cpu")}
    if device.startswith("cuda"):
        timed["gpu"] = _torch_call(network.build().eval(), network, device)
    with TemporaryDirectory() as folder:
        if spec.onnx:
            timed |= _onnx_calls(model, size, Path(folder), device)
        for place, call in timed.items():
            metrics |= {f"{place}_{name}": value for name, value in _times(call, inputs, spec.repetitions).items()}
    here = "gpu" if device.startswith("cuda") else "cpu"
    metrics |= {name: metrics[f"{here}_{name}"] for name in DIRECTION if f"{here}_{name}" in metrics}
    (out / "cost.json").write_text(json.dumps(_machine(spec, device, size), indent=1))
    return metrics


def gflops(model: nn.Module, size: int) -> float:
    """Billions of multiplications with their additions for one image of `size` px; element-wise operations do not count."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    return float(counter.get_total_flops()) / 2e9


Call = Callable[[Tensor], Callable[[], Any]]
"""Inputs (B, 3, H, W) on the CPU -> a function that runs the network on them once, and returns when it has finished."""


def _torch_call(model: nn.Module, network: JudgedNetwork, device: str) -> Call:
    model = model.to(device).to(memory_format=torch.channels_last)

    def prepared(inputs: Tensor) -> Callable[[], Any]:
        there = inputs.to(device)

        @torch.inference_mode()
        def run() -> None:
            with computing_in(network.precision, device):
                model(there)
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)

        return run

    return prepared


def _onnx_calls(model: nn.Module, size: int, folder: Path, device: str) -> dict[str, Call]:
    """Place -> the exported network there; empty where ONNX's packages are missing or the network cannot be exported."""
    try:
        path = programs.write_program(model.to("cpu").to(memory_format=torch.contiguous_format), None, size, "onnx", folder)
        import onnxruntime
    except (UserError, ImportError):
        return {}
    providers = {"onnx_cpu": "CPUExecutionProvider"}
    if device.startswith("cuda") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers["onnx_gpu"] = "CUDAExecutionProvider"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    found: dict[str, Call] = {}
    for place, provider in providers.items():
        with suppress(Exception):  # a provider that is listed may lack its libraries; that place is left out
            session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
            if provider in session.get_providers():
                found[place] = _session_call(session)
    return found


def _session_call(session: Any) -> Call:
    name = session.get_inputs()[0].name

    def prepared(inputs: Tensor) -> Callable[[], Any]:
        array = inputs.contiguous().numpy()
        return lambda: session.run(None, {name: array})

    return prepared


def _times(call: Call, inputs: Tensor, repetitions: int) -> dict[str, float]:
    """Medians and interquartile ranges of the milliseconds of one image, and of images per second at 64."""
    found: dict[str, float] = {}
    for name, batch in BATCHES.items():
        run = call(inputs[:batch])
        for _ in range(3):
            run()
        seconds = np.empty(repetitions)
        for index in range(repetitions):
            began = time.perf_counter()
            run()
            seconds[index] = time.perf_counter() - began
            progress.advance("batches")
        values = seconds * 1e3 if name == "latency_ms" else batch / seconds
        low, middle, high = np.percentile(values, [25, 50, 75])
        found |= {name: float(middle), f"{name}_iqr": float(high - low)}
    return found


def _machine(spec: Spec, device: str, size: int) -> dict[str, Any]:
    return {
        "depends_on_machine": True,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "repetitions": spec.repetitions,
        "size": size,
    }
