"""What workers of a scheduler are given: functions that import torch only when a worker calls them, not where they are named.

So a driver can start its workers while it still imports torch itself, and the first worker decodes images before it has torch.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

from ktray.artifact import Artifact, Stage
from ktray.pool import StageContext, release_gpu_memory
from ktray.stores import Store


def run_stage(stage: Stage, store: Store, attempt: str, context: StageContext) -> tuple[Artifact, bool]:
    """`execute.execute`: the artifact of `stage`, and whether this call published it."""
    from ktray.pipeline.execute import execute

    return execute(stage, store, attempt, context)


def prepare(device: str) -> None:
    """Load what the first stage of a new worker would wait for: libraries and, on a GPU, its context and kernels.

    There it trains a small network for one epoch. The first student of a fresh process would otherwise wait
    seconds for CUDA's context, cuDNN, cuBLAS and the modules that torch imports with the first step. A worker without a GPU
    is ready at once, to decode images, and imports torch meanwhile, in a thread that ends with it.
    """
    from ktray import images  # noqa: F401
    from ktray.pipeline import execute, record  # noqa: F401

    record.software()
    if device.startswith("cuda"):
        _train_a_little(device)
        release_gpu_memory()
    else:
        threading.Thread(target=_import_torch, name="import-torch", daemon=True).start()


def _import_torch() -> None:
    """Nothing of ktray is imported here: two threads that import modules of one package may wait for each other."""
    import torch  # noqa: F401


def _train_a_little(device: str) -> None:
    import numpy as np

    from ktray.backbones import alexnet
    from ktray.images import Images
    from ktray.spec import Augment, Schedule
    from ktray.training import classification, loop

    pixels = np.random.default_rng(0).integers(0, 256, (192, 32, 32, 3), dtype=np.uint8)
    images = Images(len(pixels), 32, lambda rows: pixels[rows])
    task = classification.task(np.arange(len(pixels)) % 10, 10, Augment(crop=2, flip=True))
    schedule = Schedule(epochs=1, batch_size=64, precision="bfloat16")
    network = loop.untrained_backbone(alexnet.Spec(width=0.125), seed=0)
    with tempfile.TemporaryDirectory() as out:
        loop.fit(network, task, images, schedule, 0, out=Path(out) / "snapshot", until=1, device=device)
