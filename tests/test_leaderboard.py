"""The leaderboard names each pair, and says what tells two of the same name apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ktray.cli.leaderboard import leaderboard
from ktray.search import history
from ktray.search.study import Study
from ktray.stores.file import FileStore
from tests.reports import HOME, page_of, trial
from tests.toy_space import end_segment, next_assignment, toy_space

HOG = {"teacher": "hog", "transfer.k": 5, "teacher.hog.descriptor.cell": 4}


def shown(folder: Path, *starts: dict[str, Any]) -> list[str]:
    """Lines of the leaderboard after these draws, each judged by its number."""
    space = toy_space(folder, start_with=list(starts), early_stop=None, budget={"trials": 9, "concurrent": 1})
    with Study.open(folder, space) as study:
        for _ in starts:
            end_segment(study, next_assignment(study), lambda trial, until: trial.number / 10)
    return leaderboard(history.read_study(folder, space.study_name), folder, 9).splitlines()


def test_pairs_of_one_name_are_told_apart_by_what_they_differ_in(tmp_path: Path) -> None:
    found = shown(tmp_path, {**HOG, "student.schedule.lr": 0.05}, {**HOG, "student.schedule.lr": 0.0123456})
    assert found[0].endswith("differs in")
    assert [line.rpartition("  ")[2] for line in found[2:4]] == ["lr 0.0123", "lr 0.05"]


def test_those_that_are_level_with_the_best_are_marked_and_the_mark_is_explained(tmp_path: Path) -> None:
    shown(tmp_path, *({**HOG, "student.schedule.lr": lr} for lr in (0.05, 0.06, 0.07)))
    study = history.read_study(tmp_path, "toy")
    found = leaderboard(study, tmp_path, 9, level={1}).splitlines()
    assert [line.partition("  ")[0] for line in found[2:5]] == ["2", "1 ~", "0"]
    assert sum(line.startswith("~ ") for line in found) == 1
    assert "~" not in leaderboard(study, tmp_path, 9)


def test_where_every_name_is_another_there_is_no_such_column(tmp_path: Path) -> None:
    found = shown(tmp_path, {**HOG, "student.schedule.lr": 0.05}, {**HOG, "transfer.k": 10})
    assert found[0].endswith("added")


def test_the_report_tells_them_apart_too_and_shows_no_path(tmp_path: Path) -> None:
    files = [f"{HOME}/secret/{name}.pth" for name in ("a", "b")]
    drawn = [{"student.schedule.lr": lr, "teacher.checkpoint": file} for lr, file in zip((0.05, 0.1), files, strict=True)]
    store = FileStore(tmp_path / "store")
    page = page_of([trial(number, 0.5, params=params) for number, params in enumerate(drawn)], store)
    head, *rows = page.rows["leaderboard"]
    assert head[4] == "differs in"
    assert [row[4] for row in rows if len(row) == len(head)] == ["lr 0.05, checkpoint …/a.pth", "lr 0.1, checkpoint …/b.pth"]
    assert "differs in" not in page_of([trial(0, 0.5)], store).rows["leaderboard"][0]


@pytest.mark.parametrize("modules", ["ktray.cli.leaderboard, ktray.runs.best_trials", "ktray.runs.study_status"])
def test_commands_that_read_a_study_import_neither_torch_nor_scipy_nor_ray(modules: str) -> None:
    code = f"import sys, {modules}; print(*({{'torch', 'scipy', 'ray', 'mlflow', 'pandas'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
