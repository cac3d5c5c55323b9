"""The two references of every leaderboard, the untrained and the supervised student; and the labels that evaluations read.

Commands that only read a study import this, so torch is imported only by the functions that build stages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ktray import plugins
from ktray.artifact import Artifact
from ktray.checksums import read_json, write_json
from ktray.errors import UserError
from ktray.fingerprint import canonical
from ktray.stores import Store, intact_file, intact_file_or_none

if TYPE_CHECKING:
    from ktray.images import Splits
    from ktray.pipeline.pair_graph import Graph, Identity
    from ktray.spec import EvaluationSpec, PairSpec

RANDOM = "random student"
CEILING = "supervised ceiling"
FILE = "references.json"


def reference_pairs(pair: Mapping[str, Any], transfer_data: Splits) -> dict[str, PairSpec]:
    """Name -> pair with the same student, data and evaluations as `pair`, but no teacher.

    Args:
        pair: the dump of the pair to compare with.
        transfer_data: splits of the transfer data; without labels there is no ceiling.
    """
    from ktray.spec import PairSpec

    names = {RANDOM: "none"}
    if transfer_data.train.labels is not None:
        names[CEILING] = "labels"
    whole = PairSpec.model_validate(dict(pair))
    evals = [spec.model_dump() for spec in whole.evals if _judges_student(spec)]
    base = {"data": pair["data"], "student": pair["student"], "evals": evals}
    return {name: PairSpec.model_validate({**base, "transfer": {"kind": kind}}) for name, kind in names.items()}


def _judges_student(spec: EvaluationSpec) -> bool:
    from ktray.stages.evaluation_stage import reads_pseudo_labels

    return spec.of == "student" and not reads_pseudo_labels(spec)


def reference_graphs(pair: Mapping[str, Any], data: Splits, identity: Identity) -> dict[str, Graph]:
    """Name -> stages of the reference pairs of `pair`; the arguments are those of `reference_pairs`."""
    from ktray.pipeline import pair_graph

    return {name: pair_graph.build(each, identity) for name, each in reference_pairs(pair, data).items()}


def save_if_complete(graphs: Mapping[str, Graph], store: Store, folder: Path) -> dict[str, dict[str, Any]] | None:
    """Read the references' metrics from the store and save them in the study's folder; None if a stage is missing."""
    from ktray.pipeline import pair_metrics

    found: dict[str, dict[str, Any]] = {}
    for name, graph in graphs.items():
        artifacts = pair_metrics.published_artifacts(graph, store)
        if artifacts is None:
            return None
        found[name] = {"metrics": pair_metrics.metrics(graph, artifacts), "keys": dict(graph.keys)}
    write_json(folder / FILE, found)
    return found


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The references of a study; empty before its first search has ended."""
    try:
        return read_json(folder / FILE)
    except (FileNotFoundError, ValueError):  # damaged: the next search writes it again
        return {}


def with_test_split(pair: Mapping[str, Any]) -> PairSpec:
    """The same pair, judged on the test split instead of val."""
    from ktray.spec import PairSpec

    whole = PairSpec.model_validate(dict(pair))
    evals = [_on_test(spec).model_dump() for spec in whole.evals]
    return PairSpec.model_validate({**pair, "evals": evals})


def _on_test(spec: EvaluationSpec) -> EvaluationSpec:
    """The evaluation on the test split; the same where it judges no images, as `cost`."""
    fields = plugins.module_of("evaluation", spec).Spec.model_fields
    judges = "test" in get_args(fields["split"].annotation)
    return spec.model_copy(update={"split": "test"}) if judges else spec


def has_test_split(keys: Mapping[str, Any], store: Store) -> bool:
    """Whether the target data of a trial have a test split. Data that are not in the store any more count as having one.

    Args:
        keys: of the trial, with evaluation -> name -> key.
    """
    evaluations = filter(None, map(store.find, keys.get("evaluation", {}).values()))
    images = filter(None, (store.find(each.record["inputs"]["images.target"]) for each in evaluations))
    summaries = filter(None, (intact_file_or_none(each, "splits.json") for each in images))
    return all("test" in json.loads(path.read_text())["splits"] for path in summaries)


def labels_used(keys: Iterable[Mapping[str, Any]], store: Store) -> dict[str, int]:
    """Split -> number of labelled images that the evaluations of finished trials read; empty if they read none.

    Labels of one data set count once, whatever the number of readers and the size of the images. Data sets are summed. An image
    with several labels, with boxes or with a mask counts once.

    Args:
        keys: of each trial: stage -> key, evaluation -> name -> key.

    Raises:
        UserError: the images are no longer in the store.
        MissingInput: they were damaged.
    """
    evaluations = dict.fromkeys(key for each in keys for key in each.get("evaluation", {}).values())
    read = dict.fromkeys(labels for each in filter(None, map(store.find, evaluations)) for labels in _labels_read_by(each))
    counts: dict[tuple[str, str], int] = {}
    for key, split in read:
        images = store.find(key)
        if images is None:
            raise UserError(f"{key} is no longer in the store, so the labels read cannot be counted", instead="Search again.")
        stated = [f"{split}-{what}.npy" for what in ("labels", "presence", "sizes")]
        if found := [name for name in stated if name in images.record["files"]]:
            file = intact_file(images, found[0])
            same = canonical({name: value for name, value in images.record["spec"].items() if name != "size"})
            counts[split, same] = len(np.load(file, mmap_mode="r", allow_pickle=False))
    splits = dict.fromkeys(split for split, _ in counts)
    return {split: sum(count for (of, _), count in counts.items() if of == split) for split in splits}


def _labels_read_by(evaluation: Artifact) -> list[tuple[str, str]]:
    """(key of the images, split) of all labels that an evaluation reads."""
    spec, inputs = evaluation.record["spec"], evaluation.record["inputs"]
    labels = {
        "train": (inputs["images.transfer" if "pseudo_labels" in inputs else "images.target"], "train"),
        "judged": (inputs["images.target"], spec["split"]),
    }
    try:
        needs = plugins.stated("evaluation", spec["kind"], "NEEDS_LABELS", False) or plugins.stated(
            "evaluation", spec["kind"], "NEEDS_ANNOTATIONS"
        )
        read = labels if needs else plugins.stated("evaluation", spec["kind"], "MAY_READ_LABELS")
    except UserError:  # a plugin that this command does not trust; it may have read all labels, so count them all
        return [*labels.values()]
    return [labels[name] for name in read]
