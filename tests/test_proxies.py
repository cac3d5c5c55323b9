"""The study of proxies: agreements are Kendall's, intervals are over teachers, and four pairs run from images to the table."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import proxies
from ktray.plugins import parse
from ktray.runs.pair_run import run_here
from ktray.runs.settings import make_settings
from ktray.runs.voc_composition import compose
from tests.source import ROOT


def tau_b(one, other):
    """Kendall's tau-b by its definition: of all pairs of pairs, those in the same order minus those in the other."""
    signs = [(np.sign(one[i] - one[j]), np.sign(other[i] - other[j])) for i, j in itertools.combinations(range(len(one)), 2)]
    first, second = np.array(signs).T
    return (first * second).sum() / np.sqrt((first != 0).sum() * (second != 0).sum())


def test_an_agreement_is_kendalls_tau_with_an_interval_over_teachers() -> None:
    random = np.random.default_rng(0)
    judge = random.normal(size=24).round(1)
    proxy = judge + random.normal(size=24).round(1)
    teachers = [f"teacher {index // 4}" for index in range(24)]
    found = proxies.agreement(proxy, judge, teachers)
    assert found.tau == pytest.approx(tau_b(proxy, judge), abs=1e-12)
    assert found.tau == pytest.approx(stats.kendalltau(proxy, judge).statistic, abs=1e-12)
    assert found.low < found.tau < found.high
    every = proxies.agreement(proxy, judge, [str(index) for index in range(24)])
    # Where the pairs of a teacher are alike, there is as much to learn as from one pair of each.
    alike = proxies.agreement(proxy[:6].repeat(4), judge[:6].repeat(4), teachers)
    assert alike.high - alike.low > every.high - every.low
    assert proxies.agreement(judge, judge, teachers).low == 1
    assert np.isnan(proxies.agreement(np.zeros(24), judge, teachers).tau)


def test_the_pairs_of_the_study_share_their_students_and_are_forty() -> None:
    found = proxies.pairs()
    parts = {name.rpartition(" | ")[2] for name in found}
    assert parts == {"whole", "early", "voc", "again"}
    assert len(found) == 40 * len(parts)
    whole, voc = (found[f"hog 8 | 50 | {part}"] for part in ("whole", "voc"))
    assert whole.student == voc.student
    assert whole.transfer == voc.transfer


def test_the_table_of_earlier_pairs_says_what_the_experiment_reports(capsys) -> None:
    proxies.main(ROOT / "experiments" / "tables" / "cifar10_pairs.parquet", None)
    printed = capsys.readouterr().out
    _, _, of_them = (proxies.__doc__ or "").partition("Of the 207 in the table")
    reported = [line.split("  ")[-1].strip() for line in of_them.splitlines() if " to +" in line]
    assert len(reported) == len(proxies.EARLIER)
    assert all(cell in printed for cell in reported)
    assert printed.startswith("207 pairs of 23 teachers")


@pytest.mark.slow
def test_four_pairs_run_from_images_to_the_table(tmp_path: Path, monkeypatch, capsys) -> None:
    objects = {"kind": "fashion_mnist_mini"}
    compose(parse("dataset", objects), tmp_path, images=24, size=64)
    names = [path.stem for path in (tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages").glob("*.jpg")]
    corner = np.random.default_rng(0).integers(0, 20, (30, 2))
    np.savez(tmp_path / "proposals.npz", **dict.fromkeys(names, np.hstack([corner, corner + 20])))
    detector = {**proxies.DETECTOR, "proposals": str(tmp_path / "proposals.npz"), "min_sizes": (64,), "steps": 2}
    cheap = {
        "TEACHERS": {name: {"descriptor": {"kind": name}} for name in ("hog", "raw_pixels")},
        "CLUSTERS": (5, 20),
        "OBJECTS": objects,
        "VOC_HALVES": {"kind": "voc", "path": str(tmp_path), "size": 32, "split": {"val": 0.5}},
        "STUDENT": {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"epochs": 2, "batch_size": 256}},
        "EARLY": 1,
        "ON_VOC": [proxies.ON_VOC[0], {**proxies.ON_VOC[1], **detector, "steps": 2, "width": 16}],
        "RESAMPLES": 50,
    }
    for name, value in cheap.items():
        monkeypatch.setattr(proxies, name, value)
    home = tmp_path / "home"
    results = run_here(proxies.pairs(), make_settings(home, verbosity=0))
    assert [result for result in results if isinstance(result, Exception)] == []
    proxies.main(home, tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [(row["teacher"], row["k"]) for row in rows] == list(itertools.product(("hog", "raw_pixels"), (5, 20)))
    assert all(0 <= row["stability"] <= 1 and 0 < row["entropy"] <= np.log(row["k"]) + 1e-9 for row in rows)
    assert all(row["early_knn"] != row["knn"] for row in rows)
    table = capsys.readouterr().out
    assert all(title in table for title in (*proxies.PROXIES.values(), *proxies.JUDGES.values()))
