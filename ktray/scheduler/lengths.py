"""How long stages are thought to run, from what others of their kind took: enough to tell long paths from short ones."""

from __future__ import annotations

from ktray.artifact import Artifact, Stage


class StageLengths:
    """Mean seconds per kind of stage, of a training per epoch; before the first record, a second each."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._seen: set[str] = set()

    def __call__(self, stage: Stage) -> float:
        """Seconds that `stage` is thought to run, from its beginning."""
        spent, units = self._sums.get(stage.name, (1.0, 1))
        return spent / units * _epochs(stage.spec.get("epoch"))

    def note(self, artifact: Artifact) -> None:
        """Learn from a record; each counts once."""
        seconds = artifact.record.get("seconds_alone")
        if seconds is None or artifact.key in self._seen:
            return
        self._seen.add(artifact.key)
        name = artifact.key.rpartition("-")[0]
        spent, units = self._sums.get(name, (0.0, 0))
        epochs = _epochs(artifact.record.get("spec", {}).get("epoch"))
        self._sums[name] = (spent + float(seconds), units + epochs)


def _epochs(given: object) -> int:
    return max(1, given) if isinstance(given, int) else 1
