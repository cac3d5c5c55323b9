"""A study in Python and in a notebook: opened by its name, typed, as tables, drawn, and live while it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ktray
from ktray.errors import UserError
from ktray.report.notebook import summary
from tests.reports import MARKUP, OBJECTIVES, REFERENCES, Page, trial
from tests.source import ROOT
from tests.synthetic_study import write_study

# What a user may write; mypy reads it with the strictest settings, as it is.
USERS_SCRIPT = """
from pathlib import Path

import ktray


def best(home: Path | str) -> list[str]:
    result = ktray.open("quickstart", home=home)
    found = [f"{row['trial']}: {row['objectives']['linear_probe/top1']:.3f}" for row in result.best(top=3, per="teacher")]
    rows: list[ktray.BestTrial] = result.best(1)
    frame = result.to_frame()
    frame.sort_values("linear_probe/top1")
    result.report(Path("a.html"))
    result.report("a.html")
    result.export("student", format="onnx", preprocessing=True)
    return [*found, str(rows[0]["level_with_best"])]


def compute() -> float:
    results = ktray.run({"data": "fashion_mnist_mini"}, local=True, home=Path("h"), store=Path("s"))
    student = ktray.load_student(Path("student")).eval()
    searched: ktray.SearchResult = ktray.search(Path("a.yaml"), trials="+3", home="h", tracking=Path("mlflow.db"), talk=0)
    return results[0]["metrics"]["knn/top1"] + results[0]["seconds"] + len(searched.name)
"""
MISTAKES = """
import ktray

ktray.open("a").best(per="layer")
ktray.run("a.yaml")[0]["metric"]
ktray.search("a.yaml", trails=3)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study") / "home", 30)


def test_a_study_is_opened_by_its_name_and_one_that_is_not_there_is_an_error(home: Path) -> None:
    for where in (home, str(home)):
        result = ktray.open("quickstart", home=where)
        assert (result.home, result.name) == (home, "quickstart")
    with pytest.raises(UserError, match="no study 'quikstart'") as refused:
        ktray.open("quikstart", home=home)
    assert "Did you mean 'quickstart'?" in refused.value.instead


def test_a_store_and_a_tracker_may_be_paths(home: Path, tmp_path: Path) -> None:
    result = ktray.open("quickstart", home=home, store=tmp_path / "store", tracking=tmp_path / "t.db")
    assert (result.store, result.tracking) == (f"file://{tmp_path}/store", f"sqlite:///{tmp_path}/t.db")


def test_tables_hold_what_the_rows_hold(home: Path) -> None:
    result = ktray.open("quickstart", home=home)
    best, rows = result.best_frame(top=5), result.best(top=5)
    assert list(best.index) == [row["trial"] for row in rows]
    assert list(best["linear_probe/top1"]) == [row["objectives"]["linear_probe/top1"] for row in rows]
    assert list(best.columns[:3]) == ["teacher", "transfer", "student"]
    effects = result.effects()
    teachers = effects[(effects["parameter"] == "teacher") & (effects["result"] == "knn/top1 at epoch 2")].set_index("level")
    assert teachers["effect"].idxmax() == "hog"  # of +0.06, +0.02 and -0.03 in the study that was written
    assert (effects["low"] <= effects["effect"]).all()
    assert (effects["effect"] <= effects["high"]).all()


def test_a_result_draws_itself_in_a_notebook_with_every_name_escaped(home: Path) -> None:
    html = ktray.open("quickstart", home=home)._repr_html_()
    page = Page(html)
    assert html.count("<svg") == 2
    assert "is the best of" in page.texts[""]
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "link", "img"}
    named = trial(0, 0.5, params={f"a{MARKUP}": "\u202e"}, pair={**trial(0, 0.5).pair, "transfer": {"kind": f"x.{MARKUP}"}})
    html = summary(f"s{MARKUP}", OBJECTIVES, [named, trial(1, 0.4)], REFERENCES, None, {})
    assert "script" not in {tag for tag, _ in Page(html).tags}
    assert MARKUP in Page(html).texts[""]
    assert "\u202e" not in html


@pytest.mark.slow  # mypy reads the whole package
def test_mypy_reads_the_script_of_a_user_and_finds_the_mistakes_of_another(tmp_path: Path) -> None:
    found = {}
    for name, text in (("script", USERS_SCRIPT), ("mistakes", MISTAKES)):
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\nignore_missing_imports = true\nfollow_imports = silent\n")
        command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", f"{name}.py"]
        environment = {**os.environ, "MYPYPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        found[name] = [line for line in done.stdout.splitlines() if "error:" in line]
    assert found["script"] == []
    assert [line.split(":")[1] for line in found["mistakes"]] == ["4", "5", "6"]


def outputs(notebook: Any, cell: int) -> str:
    return "".join(str(output.get("data", output.get("text", ""))) for output in notebook.cells[cell]["outputs"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook_of_the_documentation_runs_and_shows_its_search_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("KTRAY_HOME", raising=False)
    notebook = nbformat.read(ROOT / "docs" / "search.ipynb", as_version=4)
    nbformat.validate(notebook)
    shown: list[str] = []

    class Client(nbclient.NotebookClient):  # type: ignore[misc, name-defined, unused-ignore]
        def process_message(self, message: Any, cell: Any, index: int) -> Any:
            if message["msg_type"] == "update_display_data":
                shown.append(message["content"]["data"]["text/html"])
            return super().process_message(message, cell, index)

    Client(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    searched = next(number for number, cell in enumerate(notebook.cells) if "ktray.search(" in cell["source"])
    assert len(shown) > 3, "the table was redrawn while the search ran"
    assert "4 of 4 trials" in shown[-1] or "4 finished" in shown[-1], shown[-1][:2000]
    assert shown[-1] in outputs(notebook, searched) or "notebook" in outputs(notebook, searched)
    assert "<svg" in outputs(notebook, searched + 2)
    assert "differs_in" in outputs(notebook, searched + 3) or "knn/top1" in outputs(notebook, searched + 3)
    assert (tmp_path / "notebook_student" / "README.md").exists()
    shutil.rmtree(tmp_path / ".ktray", ignore_errors=True)
