"""Short names of trials for tables: the kinds of their parts, then the parameters in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ktray.pipeline.naming import student_name, teacher_name, transfer_name
from ktray.search.trial import Trial

MAX_PARAMS = 4  # listed per trial; `ktray show STUDY/NUMBER` lists all


def names(trial: Trial) -> tuple[str, str, str]:
    """Names of teacher, transfer and student, such as ``("hog", "k=50", "alexnet w0.25")``."""
    return teacher_name(trial.pair), transfer_name(trial.pair), student_name(trial.pair)


def distinguishing_params(trials: Sequence[Trial]) -> dict[int, str]:
    """Number of a trial -> the parameters that distinguish it from trials with the same names, such as ``cell 4, lr 0.052``.

    Empty if no two trials with the same names differ.
    """
    alike: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        alike.setdefault(names(trial), []).append(trial)
    differing = {
        name
        for group in alike.values()
        for name in {name for trial in group for name in trial.params}
        if len({str(trial.params.get(name)) for trial in group}) > 1
    }
    ends = Counter(name.rpartition(".")[2] for name in differing)
    short = {name: end if ends[end := name.rpartition(".")[2]] == 1 else f"{name.split('.')[0]} {end}" for name in differing}
    texts = {}
    for group in alike.values():
        for trial in group:
            shown = [
                f"{short[name]} {value:.3g}" if isinstance(value, float) else f"{short[name]} {value}"
                for name, value in trial.params.items()
                if name in differing and len(group) > 1
            ]
            texts[trial.number] = ", ".join(shown[:MAX_PARAMS])
    return texts if differing else {}
