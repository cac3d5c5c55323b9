"""Experiments on a generated VOC set: pairs, the table, and a search for detection and latency with its Pareto front."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

import ktray
from experiments import voc_small
from ktray.pipeline.pair_check import data_loader
from ktray.pipeline.references import reference_pairs
from ktray.plugins import parse
from ktray.runs.pair_run import run_here
from ktray.runs.settings import make_settings
from ktray.runs.voc_composition import compose
from ktray.search.space import parse as parse_space
from tests.source import ROOT

WIDTHS = [0.0625, 0.125, 0.25]


def test_every_backbone_is_judged_three_ways_under_each_seed() -> None:
    found = voc_small.pairs()
    assert Counter(name.partition(" | ")[0] for name in found) == dict.fromkeys(voc_small.methods(0), len(voc_small.SEEDS))
    for name, pair in found.items():
        assert [spec.kind for spec in pair.evals] == ["voc07_cls_finetune", "voc07_cls", "voc_det"]
        assert {spec.split for spec in pair.evals} == {"test"}
        seed = int(name.rpartition(" | ")[2])
        assert {spec.seed for spec in pair.evals if hasattr(spec, "seed")} == {pair.student.seed, seed}


def test_the_table_has_means_and_intervals_over_seeds_and_leaves_out_what_was_not_judged() -> None:
    values = {"random": {"voc_det/map": [0.1, 0.2, 0.3]}, "supervised": {"voc_det/map": [0.4], "voc07_cls/map": [0.5, 0.5]}}
    lines = voc_small.table(values).splitlines()
    half = stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    assert " ".join(lines[1].split()) == f"random 20.0 ({20 - 100 * half:.1f} to {20 + 100 * half:.1f}, n = 3)"
    assert " ".join(lines[2].split()) == "supervised 50.0 (50.0 to 50.0, n = 2) 40.0 (n = 1)"


@pytest.mark.slow
def test_a_search_for_detection_and_latency_shows_its_pareto_front(tmp_path: Path, monkeypatch, capsys) -> None:
    from ktray.cli import main

    compose(parse("dataset", "fashion_mnist_mini"), tmp_path / "voc_small", images=24, size=64)
    names = [path.stem for path in (tmp_path / "voc_small/VOCdevkit/VOC2007/JPEGImages").glob("*.jpg")]
    corner = np.random.default_rng(0).integers(0, 20, (30, 2))
    np.savez(tmp_path / "voc_small" / "proposals.npz", **dict.fromkeys(names, np.hstack([corner, corner + 20])))
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((ROOT / "experiments" / "voc_small.yaml").read_text())
    pair = content["pair"]
    pair["data"] |= dict.fromkeys(("pretext", "cluster", "transfer"), "fashion_mnist_mini")
    pair["data"]["target"]["size"] = 32
    pair["transfer"] = {"kind": "clusters", "k": 5}
    pair["student"]["backbone"] = {"kind": "alexnet", "width": {"choice": WIDTHS}}
    pair["student"]["schedule"] = {"epochs": 1, "batch_size": 256}
    pair["evals"][0] |= {"min_sizes": [64], "steps": 3, "width": 16, "batch_size": 2}
    pair["evals"][1] |= {"repetitions": 5}
    content["budget"] = {"trials": 3, "concurrent": 2}
    space = parse_space(json.dumps(content), [], "space")
    draws = [space.fill_with_first_values({"student.backbone.width": width}) for width in WIDTHS]
    pairs = {str(number): space.pair(draw) for number, draw in enumerate(draws)}
    data = data_loader()(pairs["0"].data.transfer)
    for number in list(pairs):
        lines = reference_pairs(pairs[number].model_dump(mode="json"), data)
        pairs |= {f"{number} {name}": pair for name, pair in lines.items()}
    results = run_here(pairs, make_settings(tmp_path / "home", verbosity=0))
    assert [result for result in results if isinstance(result, Exception)] == []
    result = ktray.search(content, home=tmp_path / "home", talk=0)  # which finds all of it in the store
    trials = result.best(top=10)
    assert len(trials) == 3
    front = result.best(top=10, pareto=True)
    values = {row["trial"]: (row["objectives"]["voc_det/map"], -row["objectives"]["cost/latency_ms"]) for row in trials}

    def beaten(value: tuple[float, float]) -> bool:
        return any(other != value and all(a >= b for a, b in zip(other, value, strict=True)) for other in values.values())

    assert {row["trial"] for row in front} == {number for number, value in values.items() if not beaten(value)}
    assert main(["best", "voc-small", "--pareto", "--home", str(tmp_path / "home")]) == 0
    assert "voc_det/map" in capsys.readouterr().out
    sheet = str(tmp_path / "sheet.png")
    assert main(["compare", "voc-small/0", "voc-small/1", "--json", "-o", sheet, "--home", str(tmp_path / "home")]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert {row["metric"] for row in compared["metrics"]} == {"voc_det/map", "voc_det/map_area"}
    report = result.report(tmp_path / "report.html").read_text()
    assert "Pareto" in report
