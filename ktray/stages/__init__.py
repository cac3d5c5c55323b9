"""What each stage is and does, one file per stage.

A function such as `stage_of` projects a pair to a `Stage`, whose spec is hashed; `run` executes that spec, the input artifacts
and the locations in `Stage.local`, and reads nothing else. Stages import tools and methods; `pipeline` wires them. Start with
`clusters_stage`, then `features_stage`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ktray.artifact import Artifact, Stage
from ktray.pool import StageContext

Run = Callable[[Stage, Mapping[str, Artifact], Path, StageContext, Path | None], Mapping[str, float]]
"""(stage, role -> input artifact, scratch directory, context, earlier snapshot to resume from) -> metrics."""

FamilyRun = Callable[
    [Sequence[Stage], Mapping[str, Artifact], Sequence[Path], StageContext], Sequence[tuple[Mapping[str, float], float]]
]
"""(stages, role -> input artifact, scratch directories, context) -> metrics and seconds alone of each stage."""


def work_of(name: str) -> Run:
    """What the stage of this name does. Its module is imported here: who decodes images need not wait for torch."""
    if name == "images":
        from ktray.stages import images_stage

        return images_stage.run
    from ktray.stages import (
        clusters_stage,
        evaluation_stage,
        features_stage,
        pseudo_labels_stage,
        student_stage,
        teacher_stage,
    )

    return {
        "teacher": teacher_stage.run,
        "features": features_stage.run,
        "clusters": clusters_stage.run,
        "pseudo_labels": pseudo_labels_stage.run,
        "student": student_stage.run,
        "evaluation": evaluation_stage.run,
    }[name]


def family_work_of(name: str) -> FamilyRun:
    """The function that makes several stages of one family (`Stage.family`) in one run."""
    from ktray.stages import features_stage

    return {"features": features_stage.run_family}[name]
