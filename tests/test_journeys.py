"""A user with parquet files, and what the verbs say of themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ktray.cli import VERBS, main
from tests.pictures import noise, png
from tests.searches import Home

NAMES = list(VERBS)


def parquet_files(root: Path, train: int, test: int) -> Path:
    """CIFAR-10 as data-set hubs deliver it: a struct of bytes and path, an integer label, one file per split."""
    import pyarrow
    from pyarrow import parquet

    root.mkdir()
    for split, count in {"train": train, "test": test}.items():
        labels = [i % 10 for i in range(count)]
        rows = [{"bytes": png(noise(32, 32, seed=i) // 4 + np.uint8(19 * c)), "path": None} for i, c in enumerate(labels)]
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        table = pyarrow.table({"img": pyarrow.array(rows, kind), "label": labels})
        parquet.write_table(table, root / f"{split}-00000-of-00001.parquet")
    return root


PARQUET_PAIR = """
data: parquet:PATH?label=label&size=32
teacher: {descriptor: {kind: hog, cell: 8}}
transfer: {kind: clusters, k: 10}
student: {backbone: {kind: alexnet, width: 0.125}, schedule: {epochs: 2, batch_size: 32}}
evals: [{kind: knn}, {kind: knn, name: on_test, split: test}]
"""


@pytest.fixture
def parquet_pair(tmp_path: Path) -> Path:
    path = tmp_path / "pair.yaml"
    path.write_text(PARQUET_PAIR.replace("PATH", str(parquet_files(tmp_path / "cifar", 200, 40))))
    return path


def test_a_pair_runs_on_parquet_files_with_labels(
    parquet_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(parquet_pair), "--local", "--json", "--home", str(tmp_path / "home")]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["metrics"]["pseudo_labels/nmi"] > 0
    assert result["metrics"]["on_test/top1"] >= 0.1


@pytest.mark.slow
def test_a_pair_on_ray_is_the_pair_run_here(parquet_pair: Path, tmp_path: Path) -> None:
    here = Home(tmp_path / "here").run("run", parquet_pair, "--local", "--json").answer[0]
    there = Home(tmp_path / "there").run("run", parquet_pair, "--json").answer[0]
    assert there["keys"] == here["keys"]
    told = ("seconds", "images_per_s")
    assert {k: v for k, v in there["metrics"].items() if not k.endswith(told)} == {
        k: v for k, v in here["metrics"].items() if not k.endswith(told)
    }


def test_ktray_alone_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    help_ = capsys.readouterr().err
    assert all(f"    {name}" in help_ for name in NAMES)


@pytest.mark.parametrize("verb", NAMES)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: ktray {verb}")
    assert "--json" in out
