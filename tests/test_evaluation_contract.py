"""What an evaluation gets that asks for more than features: the judged network, all splits, and a way to survive a kill."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from ktray import plugins
from ktray.errors import UserError
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_check import check_pair, data_loader
from ktray.pipeline.pair_graph import build
from ktray.pool import StageContext
from ktray.stores.file import FileStore
from tests.toys import HOG, toy_pair

# It adds up the activations of the judged images, one batch a step, and can be killed after any of them.
LAB = """
import json
import os
import numpy as np
import torch
from typing import Literal
from ktray.spec import EvaluationFields, Pooling
REVISION = 1
NEEDS_LABELS, READS_NETWORK, READS_SPLITS, DIRECTION = False, True, True, {"total": "max"}
class Spec(EvaluationFields):
    kind: Literal["lab_of_networks.total"] = "lab_of_networks.total"
def evaluate(spec, *, features, train, judged, pseudo_labels, out, device, network, attempt, images_of):
    built, again = network.build(), network.build()
    first = next(again.parameters())
    assert built is not again and next(built.parameters()).data_ptr() != first.data_ptr() and not built.training
    with torch.no_grad():
        first.zero_()  # ours alone
    total = float(np.load(attempt.start / "total.npy")) if attempt.start else 0.0
    steps = [judged.read(np.arange(at, at + 6)) for at in range(0, len(judged), 6)]
    for step, pixels in enumerate(steps[attempt.done:], attempt.done + 1):
        with torch.inference_mode(), network.computing():
            total += float(built(network.inputs(torch.from_numpy(pixels).to(device))).double().sum())
        attempt.report({"step": step, "of": len(steps)})
        attempt.save(step, lambda directory: np.save(directory / "total.npy", total))
        if str(step) == os.environ.get("LAB_DIES_AFTER"):
            raise KeyboardInterrupt
    own, whole = network.features(judged, [("conv1", Pooling(grid=2)), (None, Pooling())])
    (out / "seen.json").write_text(json.dumps({
        "began_at": attempt.done, "classes": built.feature_dim, "layers": built.layers, "conv1": own.shape,
        "same": bool(np.array_equal(whole, features(judged))), "sum": float(whole.astype(np.float64).sum()),
        "splits": {name: len(found) if (found := images_of(name)) else None for name in ("train", "val", "test")},
    }))
    return {"total": total}
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    (tmp_path / "lab_of_networks").mkdir()
    (tmp_path / "lab_of_networks" / "total.py").write_text(LAB)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "lab_of_networks")
    for name in [name for name in sys.modules if name.split(".")[0] == "lab_of_networks"]:
        monkeypatch.delitem(sys.modules, name)


EVALUATION = {"kind": "lab_of_networks.total"}
UNTRAINED = {"transfer": {"kind": "none"}, "teacher": None}


@pytest.fixture
def stages(lab):
    return build(toy_pair(**UNTRAINED, evals=[EVALUATION]), data_identity()).stages


def seen(artifact):
    return json.loads((artifact.directory / "seen.json").read_text())


def test_an_evaluation_may_read_the_network_several_layers_and_all_splits(tmp_path, stages):
    store = FileStore(tmp_path / "store")
    artifacts = {stage.name: execute(stage, store, "a", StageContext())[0] for stage in stages}
    found = seen(artifacts["evaluation"])
    assert found["began_at"] == 0
    assert found["same"]
    assert found["sum"] == pytest.approx(artifacts["evaluation"].metrics["total"], rel=1e-5)
    assert found["splits"] == {"train": 216, "val": 24, "test": 200}
    weights = load_file(artifacts["student"].directory / "weights.safetensors")
    assert found["conv1"] == [24, 4 * len(weights["backbone.conv1.0.weight"])]


def test_a_killed_evaluation_goes_on_from_its_checkpoint_and_its_cost_counts_the_whole(tmp_path, stages, monkeypatch):
    store, context = FileStore(tmp_path / "store"), StageContext(checkpoint_seconds=0.0)
    *before, evaluation = stages
    for stage in before:
        execute(stage, store, "a", context)
    monkeypatch.setenv("LAB_DIES_AFTER", "2")
    with pytest.raises(KeyboardInterrupt):
        execute(evaluation, store, "killed", context)
    monkeypatch.delenv("LAB_DIES_AFTER")
    reports = []
    artifact, _ = execute(evaluation, store, "b", replace(context, progress=reports.append))
    assert seen(artifact)["began_at"] == 2
    assert [report["step"] for report in reports if "step" in report] == [3, 4]
    assert artifact.record["started_from"] == "checkpoint-000002"
    assert artifact.record["seconds_alone"] > artifact.record["seconds"]
    assert not [name for name in artifact.directory.iterdir() if name.name.startswith("checkpoint")]
    whole, other = FileStore(tmp_path / "whole"), None
    for stage in stages:
        other, _ = execute(stage, whole, "a", context)
    assert artifact.metrics == other.metrics


def test_a_damaged_checkpoint_of_an_evaluation_gives_way_to_the_beginning(tmp_path, stages, monkeypatch):
    store, context = FileStore(tmp_path / "store"), StageContext(checkpoint_seconds=0.0)
    *before, evaluation = stages
    for stage in before:
        execute(stage, store, "a", context)
    monkeypatch.setenv("LAB_DIES_AFTER", "2")
    with pytest.raises(KeyboardInterrupt):
        execute(evaluation, store, "killed", context)
    monkeypatch.delenv("LAB_DIES_AFTER")
    path = next(store.checkpoints(evaluation.key)[0].glob("*.npy"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    artifact, _ = execute(evaluation, store, "b", context)
    assert seen(artifact)["began_at"] == 0


def test_a_descriptor_has_no_network_to_read_and_no_precision(lab):
    with pytest.raises(UserError, match=r"needs a network, and the teacher is the descriptor hog.*Judge the student"):
        check_pair(toy_pair(teacher=HOG, evals=[{**EVALUATION, "of": "teacher"}]), data_loader())
    pair = toy_pair(teacher=HOG, evals=[{"kind": "knn", "of": "teacher", "network_precision": "bfloat16"}])
    with pytest.raises(UserError, match="no network_precision"):
        check_pair(pair, data_loader())


@pytest.mark.parametrize("kind", plugins.kinds("evaluation"))
def test_an_evaluation_takes_what_it_says_that_it_reads(kind):
    module = plugins.module("evaluation", kind)
    taken = set(inspect.signature(module.evaluate).parameters)
    usual = {"spec", "features", "train", "judged", "pseudo_labels", "out", "device"}
    network = {"network", "attempt"} if getattr(module, "READS_NETWORK", False) else set()
    splits = {"images_of"} if getattr(module, "READS_SPLITS", False) else set()
    assert taken == usual | network | splits
    assert not (network and getattr(module, "READS_PSEUDO_LABELS", False))


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_the_precision_of_a_network_is_in_the_keys_of_what_reads_it_and_changes_its_features_a_little(precision, tmp_path):
    def evaluated(**fields):
        pair = toy_pair(**UNTRAINED, evals=[{"kind": "effective_rank", **fields}])
        *before, evaluation = build(pair, data_identity()).stages
        store = FileStore(tmp_path / "store")
        for stage in before:
            execute(stage, store, "a", StageContext())
        return evaluation.key, execute(evaluation, store, "a", StageContext())[0].metrics["rank"]

    key, rank = evaluated()
    other_key, other = evaluated(network_precision=precision)
    assert key != other_key
    assert other == pytest.approx(rank, rel=0.2)
    assert (other == rank) == (precision == "tf32")  # which is float32 on a CPU
