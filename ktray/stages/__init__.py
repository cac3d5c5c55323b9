"""What each stage does: one file per stage, one function `run` each, found by the stage's name in `WORK`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from ktray.artifact import Artifact, Stage
from ktray.pool import StageContext
from ktray.stages import (
    clusters_stage,
    evaluation_stage,
    features_stage,
    images_stage,
    pseudo_labels_stage,
    student_stage,
    teacher_stage,
)

Run = Callable[[Stage, Mapping[str, Artifact], Path, StageContext, Path | None], Mapping[str, float]]
"""(stage, role -> input artifact, scratch directory, means, earlier snapshot to start from) -> metrics."""

WORK: Mapping[str, Run] = {
    "images": images_stage.run,
    "teacher": teacher_stage.run,
    "features": features_stage.run,
    "clusters": clusters_stage.run,
    "pseudo_labels": pseudo_labels_stage.run,
    "student": student_stage.run,
    "evaluation": evaluation_stage.run,
}
MODULES: Mapping[str, ModuleType] = {name: sys.modules[run.__module__] for name, run in WORK.items()}
"""Whose `REVISION` is part of the key of each stage."""

FamilyRun = Callable[
    [Sequence[Stage], Mapping[str, Artifact], Sequence[Path], StageContext], Sequence[tuple[Mapping[str, float], float]]
]
"""(stages, role -> input artifact, scratch directories, means) -> for each its metrics and the seconds it would cost alone."""

FAMILY_WORK: Mapping[str, FamilyRun] = {"features": features_stage.run_family}
"""How stages of one family (`Stage.family`) are made in one run."""
