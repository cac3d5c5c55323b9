"""How much of a GPU a kind of stage gets where the runtime file does not say: a quarter, or what its recorded peaks ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ktray.artifact import Artifact
from ktray.scheduler.resources import ResourceRequest

ON_GPU = ("teacher", "student", "features", "evaluation")
USUAL = 0.25  # small networks: four at once keep a GPU busier than one, and all kinds share the same warm workers
SHARES = (0.25, 0.5, 1.0)
SPARE = 1.2  # torch's allocator holds more than its tensors need
CONTEXT_BYTES = 600 << 20  # what CUDA takes for a process


class GpuShares:
    """Needs of stages, with shares of a GPU that grow with what was recorded; they never shrink, so workers keep their shape.

    Args:
        needs: stage name -> needs by the runtime file and its defaults; where they do not say `gpus`, what runs a network gets
            a share while the cluster has GPUs, and all else none.
        has_gpus: whether the cluster has GPUs now.
    """

    def __init__(self, needs: Callable[[str], ResourceRequest], has_gpus: Callable[[], bool]) -> None:
        self._needs, self._has_gpus = needs, has_gpus
        self._least: dict[str, float] = {}

    def __call__(self, stage: str) -> ResourceRequest:
        """What the stage of this name needs; its `gpus` are a number."""
        needs = self._needs(stage)
        if needs.gpus is not None:
            return needs
        return replace(needs, gpus=self._least.get(stage, USUAL) if stage in ON_GPU and self._has_gpus() else 0.0)

    def note(self, artifact: Artifact) -> None:
        """Learn from a record of a stage that ran on a GPU."""
        record = artifact.record
        peak, whole = record.get("device_peak_bytes", 0), record.get("device_bytes", 0)
        if not peak or not whole:
            return
        name = artifact.key.rpartition("-")[0]
        self._widen(name, share_of(peak, whole))
        if record.get("after_out_of_memory"):  # its peak is that of a second run, which takes smaller pieces
            self.ran_out(name, USUAL)

    def ran_out(self, stage: str, share: float) -> None:
        """A stage of this name ran out of memory where it had this share: the next ones get more, whatever their peaks say."""
        if share:
            self._widen(stage, next((each for each in SHARES if each > share), 1.0))

    def _widen(self, stage: str, share: float) -> None:
        self._least[stage] = max(self._least.get(stage, USUAL), share)


def share_of(peak: int, whole: int) -> float:
    """The smallest share of a GPU with `whole` bytes that holds a process whose tensors take `peak` bytes."""
    part = (peak * SPARE + CONTEXT_BYTES) / whole
    return next((share for share in SHARES if share >= part), 1.0)
