"""How much of a GPU a kind of stage gets where the runtime file does not say: a quarter, or what its recorded peaks ask for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from ktray.artifact import Artifact
from ktray.crew.needs import Needs

ON_GPU = ("teacher", "student", "features", "evaluation")
USUAL = 0.25  # small networks: four at once keep a GPU busier than one, and all kinds share the same warm workers
SHARES = (0.25, 0.5, 1.0)
SPARE = 1.2  # torch's allocator holds more than its tensors need
CONTEXT_BYTES = 600 << 20  # what CUDA takes for a process


class Shares:
    """Needs of stages, with shares of a GPU that grow with what was recorded; they never shrink, so workers keep their shape.

    Args:
        needs: stage name -> needs by the runtime file and its defaults.
        learned: names of the stages whose share of a GPU is not given; while the cluster has none, they need none.
        has_gpus: whether the cluster has GPUs now.
    """

    def __init__(self, needs: Callable[[str], Needs], learned: Collection[str], has_gpus: Callable[[], bool]) -> None:
        self._needs, self._learned, self._has_gpus = needs, frozenset(learned), has_gpus
        self._least: dict[str, float] = {}

    def __call__(self, stage: str) -> Needs:
        """What the stage of this name needs."""
        needs = self._needs(stage)
        if stage not in self._learned or not self._has_gpus():
            return needs
        return replace(needs, gpus=self._least.get(stage, USUAL))

    def ran_out(self, stage: str, had: float) -> None:
        """Learn from a stage that ran out of memory with the share `had`: the next of its name get the next larger one.

        The record of its second attempt may not tell, which holds few images at a time.
        """
        if had:
            larger = next((share for share in SHARES if share > had), 1.0)
            self._least[stage] = max(self._least.get(stage, USUAL), larger)

    def note(self, artifact: Artifact) -> None:
        """Learn from a record of a stage that ran on a GPU."""
        record = artifact.record
        peak, whole = record.get("device_peak_bytes", 0), record.get("device_bytes", 0)
        if not peak or not whole:
            return
        name = artifact.key.rpartition("-")[0]
        self._least[name] = max(self._least.get(name, USUAL), share_of(peak, whole))


def share_of(peak: int, whole: int) -> float:
    """The smallest share of a GPU with `whole` bytes that holds a process whose tensors take `peak` bytes."""
    part = (peak * SPARE + CONTEXT_BYTES) / whole
    return next((share for share in SHARES if share >= part), 1.0)
