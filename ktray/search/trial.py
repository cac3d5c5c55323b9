"""A trial: a drawn pair with its state, scores at rungs, metrics and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

State = Literal["completed", "pruned", "paused", "running", "interrupted", "failed", "duplicate"]
STATES: tuple[State, ...] = get_args(State)
"""All states, in the order in which reports list them."""

PREFIX_STATES = frozenset({"running", "interrupted", "paused", "completed", "pruned"})
"""States of trials with stages before the student that are in the store or being computed."""


@dataclass(frozen=True)
class Trial:
    """One draw of a study, and what became of it.

    Attributes:
        number: 0, 1, ... in the order of the draws; stays the same when the study is resumed.
        params: dotted path -> drawn scalar; for a choice between lists or mappings the JSON text of the option.
        pair: the drawn pair as plain data with all defaults; `PairSpec.model_validate` reads it.
        state: `interrupted`: running when its search ended, and goes on with the next one; only readers of a study that nobody
            searches see it, because the journal has `running`. `paused`: stopped at a rung. `pruned`: still paused when the
            study ended. `duplicate`: equals an earlier trial.
        epoch: student epochs that are trained and evaluated.
        scores: epoch of a rung -> value of the early-stop metric there.
        teacher_score: value of the early-stop metric for teachers, measured before the student; None if there is none.
        metrics: all metrics of the completed pair.
        objectives: metric -> value of what the study optimises.
        keys: stage -> key of its artifact so far (evaluation -> name -> key).
        attributed_costs: ``{"prefix": {key: seconds}, "suffix": {...}}`` of the stages that it is the first to need: expected
            seconds, replaced by recorded ones when a segment ends. The prefix is everything before the student.
        cost: `seconds` without any sharing, and `marginal_seconds` that it added; before its end only the latter.
        cause: why it failed or was pruned, in one line.
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
    def last_rung_and_score(self) -> tuple[int, float] | None:
        """(rung, score) of the last rung that it reached, where rung 0 is the score of its teacher; None before."""
        if self.scores:
            epoch = max(self.scores)
            return epoch, self.scores[epoch]
        return None if self.teacher_score is None else (0, self.teacher_score)

    @property
    def is_stopped_at_teacher_rung(self) -> bool:
        """Whether it is paused or pruned at rung 0, where teachers are judged; a paused one may be promoted at any time."""
        return self.state in ("paused", "pruned") and self.teacher_score is not None and not self.scores

    @property
    def total_epochs(self) -> int:
        """Epochs of the full student."""
        return int(self.pair["student"]["schedule"]["epochs"])

    @property
    def artifact_keys(self) -> set[str]:
        """The keys of all its artifacts so far: the values in `keys`, as one set."""
        return set(keys_in(self.keys))


def keys_in(keys: Mapping[str, Any]) -> list[str]:
    """The keys of artifacts in the `keys` of a pair, in the order of its stages, evaluations included."""
    nested = (value.values() if isinstance(value, Mapping) else [value] for value in keys.values())
    return [key for values in nested for key in values]
