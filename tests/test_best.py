"""What the test split said is kept with the study."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from ktray.checksums import read_json, write_json
from ktray.cli import best_command
from ktray.runs.best_trials import FILE, default_top, keep_test_metrics


def test_a_verdict_of_the_test_split_is_kept_with_its_first_date(tmp_path: Path) -> None:
    path = tmp_path / FILE
    keep_test_metrics(path, {"3": {"knn/top1": 0.5}}, {"3": {"knn/top1": 0.01}})
    kept = read_json(path)
    kept["3"]["when"] = "2026-01-01T00:00:00+00:00"
    write_json(path, kept)
    keep_test_metrics(path, {"3": {"knn/top1": 0.5}, "4": {"knn/top1": 0.4}}, {"3": {"knn/top1": 0.01}})
    again = read_json(path)
    assert again["3"] == kept["3"]
    assert again["4"]["metrics"] == {"knn/top1": 0.4}
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_verdicts_of_the_test_split_that_were_damaged_are_not_believed_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / FILE
    keep_test_metrics(path, {"3": {"knn/top1": 0.5}}, {"3": {"knn/top1": 0.01}})
    path.write_text(path.read_text().replace("0.5", "0.7"))
    keep_test_metrics(path, {"4": {"knn/top1": 0.4}}, {})
    assert read_json(path).keys() == {"4"}
    assert f"{path} was damaged" in caplog.text


def test_only_the_best_pair_is_judged_on_test_unless_more_are_asked_for() -> None:
    parser = argparse.ArgumentParser()
    best_command.add_arguments(parser)
    for words, count in {"toy": 10, "toy --test": 1, "toy --test --top 3": 3, "toy --top 2": 2}.items():
        asked = parser.parse_args(words.split())
        assert default_top(asked.top, asked.test) == count
