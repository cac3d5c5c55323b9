"""One drawn pair with its state, rungs, metrics and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

State = Literal["completed", "pruned", "paused", "running", "failed", "duplicate"]
STATES: tuple[State, ...] = get_args(State)
"""All states, in the order in which reports list them."""

PREFIX_STATES = frozenset({"running", "paused", "completed", "pruned"})
"""States in which the stages before the student are in the store or on their way there."""


@dataclass(frozen=True)
class Trial:
    """What the study knows of one draw.

    Attributes:
        number: 0, 1, ... in the order of the draws; the same over resumes.
        params: dotted path -> drawn scalar; a choice between lists or mappings holds the option's JSON text.
        pair: the drawn pair as plain data, defaults included; `PairSpec.model_validate` reads it.
        state: `paused` waits at a rung, `pruned` waited there when the study ended, `duplicate` equals an earlier trial.
        epoch: student epochs that are done and judged.
        scores: epoch of a rung -> value of the early-stop metric there.
        teacher_score: value of the early-stop metric of teachers, judged before the student; None if it was not.
        metrics: all metrics of the finished pair.
        objectives: metric -> value of what the study optimises.
        keys: stage -> key of its artifact (evaluation -> name -> key), up to where the trial is.
        attributed_costs: ``{"prefix": {key: seconds}, "suffix": {...}}`` of the stages that it was the first to need: expected
            seconds, and recorded ones once its segment ended. The prefix is all before the student.
        cost: `seconds` as if it had run alone, `marginal_seconds` that it added; before its end only the latter, so far.
        cause: one line: why it failed or was pruned.
        duplicate_of: number of the earlier trial with the same pair.
        started: clock at the draw, in seconds.
        ended: clock when its state became final.
        planned: position in the space's `start_with`, if the draw came from there.
    """

    number: int
    params: Mapping[str, Any]
    pair: Mapping[str, Any]
    state: State = "running"
    epoch: int = 0
    scores: Mapping[int, float] = field(default_factory=dict)
    teacher_score: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    objectives: Mapping[str, float] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    attributed_costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    cause: str | None = None
    duplicate_of: int | None = None
    started: float | None = None
    ended: float | None = None
    planned: int | None = None

    @property
    def furthest(self) -> tuple[int, float] | None:
        """The last rung where it was judged and its score there; rung 0 judges its teacher. None before."""
        if self.scores:
            epoch = max(self.scores)
            return epoch, self.scores[epoch]
        return None if self.teacher_score is None else (0, self.teacher_score)

    @property
    def waits_for_teacher(self) -> bool:
        """Whether its teacher was judged and has earned it no student so far."""
        return self.state in ("paused", "pruned") and self.teacher_score is not None and not self.scores

    @property
    def epochs(self) -> int:
        """Epochs of the full student."""
        return int(self.pair["student"]["schedule"]["epochs"])

    @property
    def artifacts(self) -> set[str]:
        """All of its `keys` in one set."""
        nested = (value.values() if isinstance(value, Mapping) else [value] for value in self.keys.values())
        return {key for values in nested for key in values}
