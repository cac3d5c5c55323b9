"""The two lines that every leaderboard needs: the student as drawn, and the student that saw all labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktray import plugins
from ktray.images import Splits
from ktray.pipeline.check import Load, train_count
from ktray.spec import PairSpec

RANDOM = "random student"
CEILING = "supervised ceiling"


def reference_pairs(pair: Mapping[str, Any], transfer_data: Splits) -> dict[str, PairSpec]:
    """Name -> pair with the same student, data and judges as `pair`, but no teacher.

    Args:
        pair: the dump of the pair to compare with.
        transfer_data: splits of the transfer data; without labels there is no ceiling.
    """
    names = {RANDOM: "none"}
    if transfer_data.train.labels is not None:
        names[CEILING] = "labels"
    whole = PairSpec.model_validate(dict(pair))
    evals = [spec.model_dump() for spec in whole.evals if _judges_a_student(spec)]
    base = {"data": pair["data"], "student": pair["student"], "evals": evals}
    return {name: PairSpec.model_validate({**base, "transfer": {"kind": kind}}) for name, kind in names.items()}


def _judges_a_student(spec: Any) -> bool:
    reads_labels = getattr(plugins.module_of("evaluation", spec), "READS_PSEUDO_LABELS", False)
    return spec.of == "student" and not reads_labels


def on_test(pair: Mapping[str, Any]) -> PairSpec:
    """The same pair, judged on the test split instead of val."""
    whole = PairSpec.model_validate(dict(pair))
    evals = [spec.model_copy(update={"split": "test"}).model_dump() for spec in whole.evals]
    return PairSpec.model_validate({**pair, "evals": evals})


def labels_used(pair: Mapping[str, Any], load: Load) -> dict[str, int]:
    """Split -> number of labels that the judges of a pair read; empty if they read none."""
    whole = PairSpec.model_validate(dict(pair))
    if not any(plugins.module_of("evaluation", spec).NEEDS_LABELS for spec in whole.evals):
        return {}
    target = load(whole.data.target)
    if target.train.labels is None:
        return {}
    count = train_count(target, whole.data.target)
    held_out = len(target.val.names) if target.val is not None else len(target.train.names) - count
    return {"train": count, "val": held_out}
