"""A preset stands for what the data at hand can be judged by, with values whose sources are named."""

from __future__ import annotations

import json

import pytest
import torch

from ktray import evaluation_presets, plugins
from ktray.cli import main
from ktray.features.extraction import _pooled
from ktray.spec import PairSpec, Pooling
from tests.toys import toy_spec


def evaluations(evals, **fields):
    return PairSpec.model_validate(toy_spec(evals=evals, **fields)).evals


@pytest.mark.parametrize("preset", evaluation_presets.PRESETS)
def test_every_entry_of_a_preset_is_a_valid_spec_with_a_source(preset):
    for entry in evaluation_presets.PRESETS[preset]:
        more = {"layer": "conv1", "name": "x/conv1"} if entry.per_layer else {}
        spec = plugins.parse("evaluation", {**entry.spec, **more})
        assert spec.kind == entry.spec["kind"]
        assert len(entry.source) > 20


def test_a_preset_is_expanded_for_the_data_and_the_student():
    found = evaluations("paper", data="fashion_mnist_mini")
    names = [each.name or "" for each in found]
    assert [name for name in names if name.startswith("linear_probe/")] == [f"linear_probe/conv{n}" for n in range(1, 6)]
    assert {each.kind for each in found} == {"linear_probe", "nonlinear_probe"}  # one label per image, no boxes, no masks
    assert found[0].pool == Pooling(kind="max", grid="under_9000")


def test_reading_a_pair_with_a_preset_touches_no_file_of_the_data(tmp_path):
    data = {**dict.fromkeys(("pretext", "cluster", "transfer"), "fashion_mnist_mini")}
    found = evaluations("paper", data={**data, "target": {"kind": "voc", "path": str(tmp_path / "absent")}})
    assert [each.kind for each in found] == ["voc07_cls_finetune", "voc_det"]
    found = evaluations("paper", data={**data, "target": {"kind": "voc", "path": "absent", "task": "segmentation"}})
    assert [each.kind for each in found] == ["voc12_seg"]
    with pytest.raises(ValueError, match="the target data have none of these"):
        evaluations("vissl", data={**data, "target": {"kind": "folder", "path": "absent"}})


@pytest.mark.parametrize("kind", plugins.kinds("backbone"))
def test_the_layers_of_a_network_are_known_without_weights(kind):
    spec = plugins.parse("backbone", kind)
    assert evaluation_presets._layers(spec) == tuple(plugins.module("backbone", kind).build(spec).layers)


def test_presets_stand_beside_kinds_and_a_pair_that_was_read_is_not_expanded_again():
    found = evaluations(["quick", {"kind": "cost"}])
    assert [each.kind for each in found] == ["knn", "linear_probe", "effective_rank", "cost"]
    pair = PairSpec.model_validate(toy_spec(evals=["quick"]))
    assert PairSpec.model_validate(pair.model_dump()).evals == pair.evals


def test_dinov2_judges_with_its_45_costs_and_four_numbers_of_neighbours():
    knn, probe = evaluations("dinov2")
    assert sorted(knn.k) == [10, 20, 100, 200]
    assert (probe.l2, probe.precision, probe.scaling) == ("dinov2", "float64", "none")


@pytest.mark.parametrize(("channels", "side", "grid"), [(96, 13, 9), (256, 13, 5), (384, 13, 4), (384, 2, 2), (10_000, 7, 1)])
def test_features_are_pooled_to_fewer_than_nine_thousand(channels, side, grid):
    pooled = _pooled(torch.zeros(2, channels, side, side), Pooling(grid="under_9000"))
    assert pooled.shape == (2, channels * grid**2)
    assert channels * grid**2 < 9000 or grid == 1


def test_show_evals_names_the_source_of_each_value(capsys):
    assert main(["show", "evals", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.keys() == evaluation_presets.PRESETS.keys()
    assert main(["show", "evals"]) == 0
    text = capsys.readouterr().out
    assert "45 values of C" in text
    assert "temperature: 0.07" in text
