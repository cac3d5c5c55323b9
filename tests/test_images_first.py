"""A search decodes its images before any trial is drawn: what is wrong with them is one error, and can be mended."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ktray.cli import main
from ktray.search.history import read_study
from tests.pictures import noise, png


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """A space over 40 images, of which three cannot be read, and with two pairs."""
    (tmp_path / "photos").mkdir()
    for number in range(40):
        content = b"no image" if number < 3 else png(noise(32, 32, seed=number))
        (tmp_path / "photos" / f"{number:02d}.png").write_bytes(content)
    student = {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"epochs": 1, "batch_size": 8}}
    pair: dict[str, Any] = {
        "data": {"kind": "folder", "path": str(tmp_path / "photos"), "size": 32},
        "teacher": {"descriptor": {"kind": "hog", "cell": 8}},
        "transfer": {"kind": "clusters", "k": {"choice": [2, 3]}},
        "student": student,
        "evals": [{"kind": "effective_rank"}],
    }
    content = {"study": "photos", "objectives": [{"metric": "effective_rank/rank"}], "budget": {"trials": 50}, "pair": pair}
    path = tmp_path / "photos.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_too_many_unreadable_images_are_one_error_before_any_trial_and_a_larger_tolerance_goes_on(
    space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ["--home", str(tmp_path / "home")]
    assert main(["search", str(space), *home]) == 2
    said = capsys.readouterr()
    assert "the space has 2 pairs, so that 2 trials are drawn and not 50" in said.err
    errors = [line for line in said.err.splitlines() if line.startswith("ktray: ") and "unreadable, more than" in line]
    assert len(errors) == 1
    assert "3 of 40 images are unreadable, more than max_unreadable=0.01 allows: " in errors[0]
    assert read_study(tmp_path / "home", "photos").trials == []
    assert main(["search", str(space), *home, "--set", "data.max_unreadable=0.1"]) == 0
    said = capsys.readouterr()
    assert re.search(r"2 of 2 trials: 2 completed", said.out)
    assert main(["search", str(space), *home, "--set", "data.max_unreadable=0.5"]) == 0
    said = capsys.readouterr()
    assert "0 stages computed" in said.out
    assert main(["search", str(space), *home, "--trials", "+1"]) == 0  # nothing is left to draw, so nothing is asked again
