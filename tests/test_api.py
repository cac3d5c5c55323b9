"""The verbs as Python functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ktray
from ktray.cli import main
from ktray.errors import SearchStopped, StageFailed, UserError
from ktray.runs import best_trials, search_run, student_export
from ktray.runs.interruption import Interruption
from ktray.runs.settings import Settings
from ktray.runs.simulation import _NoTracker
from ktray.search.study import Study
from ktray.tracking import Unwritten
from tests.searches import Home
from tests.searches import toy_space as search_space
from tests.toy_space import drive, toy_space
from tests.toys import toy_pair, toy_spec


def python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_ktray_loads_nothing() -> None:
    heavy = ["torch", "numpy", "ray", "optuna", "mlflow", "pydantic", "yaml"]
    assert python(f"import ktray, sys; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_a_name_that_ktray_lacks_is_an_attribute_error_and_its_verbs_are_listed() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'sarch'"):
        ktray.sarch  # noqa: B018
    assert {"run", "search", "open", "load_student", "SearchResult"} == set(ktray.__all__) - {"BestTrial", "PairResult"}
    assert set(ktray.__all__) <= set(dir(ktray))
    assert all(getattr(ktray, name) is not None for name in ktray.__all__)


def test_search_is_a_verb_whether_its_package_was_imported_before_or_not(tmp_path: Path) -> None:
    from ray import cloudpickle

    missing = tmp_path / "no.yaml"
    for before in ("", "import ktray.search.study; "):
        script = f"{before}import ktray\ntry: ktray.search({str(missing)!r}, home={str(tmp_path)!r})\n"
        assert "there is no file" in python(f"{script}except Exception as error: print(error)")
    assert cloudpickle.loads(cloudpickle.dumps(ktray.search)) is ktray.search


def test_a_pair_runs_from_a_spec_from_plain_data_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(toy_spec()))
    (first,) = ktray.run(toy_pair(), home=tmp_path, local=True, talk=0)
    assert first["metrics"]["knn/top1"] > 0
    for pair in (toy_spec(), path, str(path)):
        (again,) = ktray.run(pair, home=tmp_path, local=True, talk=0)
        assert again["keys"] == first["keys"]
        assert again["computed"] == {}


def test_artifacts_live_in_the_store_that_is_named_and_not_in_the_home(tmp_path: Path) -> None:
    pair = toy_spec(teacher=None, transfer="none")
    (first,) = ktray.run(pair, home=tmp_path / "one", local=True, talk=0, store=f"file://{tmp_path / 'shared'}")
    assert (tmp_path / "shared" / first["keys"]["student"]).is_dir()
    assert not (tmp_path / "one" / "store").exists()
    (again,) = ktray.run(pair, home=tmp_path / "two", local=True, talk=0, store=f"file://{tmp_path / 'shared'}")
    assert again["computed"] == {}


def test_what_is_wrong_with_a_pair_is_raised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'hog'"):
        ktray.run(toy_spec(teacher={"descriptor": "hogg"}), home=tmp_path, local=True)
    with pytest.raises(UserError, match=r"transfer\.k"):
        ktray.run(toy_spec(transfer={"kind": "clusters", "k": 10_000}), home=tmp_path, local=True)
    with pytest.raises(StageFailed, match="fewer than min_size"):
        ktray.run(toy_spec(transfer={"kind": "clusters", "k": 5, "min_size": 200}), home=tmp_path, local=True, talk=0)


@pytest.mark.parametrize("concurrent", [0, -1, 1.5, True, "4"])
def test_a_call_in_which_nothing_could_run_at_a_time_is_refused_in_one_sentence(tmp_path: Path, concurrent: Any) -> None:
    said = rf"^concurrent={concurrent!r} is no whole number from 1\.?$"
    with pytest.raises(UserError, match=said):
        ktray.search(search_space(tmp_path), home=tmp_path / "home", concurrent=concurrent, talk=0)
    for local in (False, True):
        with pytest.raises(UserError, match=said):
            ktray.run(toy_pair(), home=tmp_path / "home", concurrent=concurrent, local=local, talk=0)
    assert not list((tmp_path / "home").rglob("*.log"))


def test_a_space_never_gets_a_number_of_trials_at_a_time_that_its_file_could_not_have(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    assert search_run.with_concurrent(space, 3).budget == space.budget.model_copy(update={"concurrent": 3})
    assert search_run.with_concurrent(space, None) is space
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        search_run.with_concurrent(space, 0)


def test_no_more_than_64_trials_run_at_a_time_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def only_draw(coordinator: Any, scheduler: Any) -> SearchStopped:
        drawn.append(len(coordinator.first_segments(coordinator.space.budget.concurrent)[0]))
        return SearchStopped("it is enough")

    monkeypatch.setattr(search_run, "_make_images", lambda *given: None)
    monkeypatch.setattr(search_run, "_run_trials", only_draw)
    space = toy_space(tmp_path, budget={"trials": 70, "concurrent": 500}, sampler="random", early_stop=None)
    settings = Settings(tmp_path, f"file://{tmp_path / 'store'}")
    said: list[str] = []
    display: Any = type("Heard", (_NoTracker,), {"say": staticmethod(said.append)})()
    answers = {"close": lambda self, *given: None, "unwritten": lambda self: Unwritten(waiting=1)}
    tracker: Any = type("Deaf", (_NoTracker,), answers)()
    search_run.search_study(space, search_run.SearchOptions("toy"), settings, tracker, Interruption(), display)
    assert drawn == [64]
    assert said == ["64 trials run at a time, not 500: each waits in a process on this machine"]


def test_a_study_tells_its_trials_as_a_table_and_its_best_first(tmp_path: Path) -> None:
    with Study.open(tmp_path, toy_space(tmp_path)) as begun:
        drive(begun)
        begun.prune_and_close()
    study = ktray.SearchResult(tmp_path, "toy")
    frame = study.to_frame()
    assert set(frame["state"]) == {"completed", "pruned"}
    assert len(frame) == len(study.history().trials)
    best = study.best()
    assert best[0]["trial"] == frame["linear_probe/top1"].idxmax()
    assert frame.loc[best[0]["trial"], "params.transfer.k"] == best[0]["params"]["transfer.k"]
    assert study.report(tmp_path / "toy.html").read_text().startswith("<!doctype html>")
    assert study.best(1) == best[:1]
    with pytest.raises(UserError, match="no study 'tui'"):
        ktray.SearchResult(tmp_path, "tui").best()


def driven(home: Path, pair: dict[str, Any] | None = None, **fields: Any) -> ktray.SearchResult:
    """A study whose trials were told and not computed."""
    with Study.open(home, toy_space(home, pair, **fields)) as begun:
        drive(begun)
        begun.prune_and_close()
    return ktray.SearchResult(home, "toy")


def test_the_best_of_a_study_are_those_of_the_command(tmp_path: Path, capsys: Any) -> None:
    goals = [{"metric": "linear_probe/top1", "mode": "max"}, {"metric": "cost/seconds", "mode": "min"}]
    study = driven(tmp_path, objectives=goals, early_stop=None, budget={"trials": 12, "concurrent": 2})
    asked: list[tuple[str, dict[str, Any]]] = [
        ("", {}),
        ("--top 2", {"top": 2}),
        ("--pareto", {"pareto": True}),
        ("--per teacher", {"per": "teacher"}),
        ("--per student --pareto --top 3", {"per": "student", "pareto": True, "top": 3}),
    ]
    for words, named in asked:
        assert main(["best", "toy", "--home", str(tmp_path), "--json", *words.split()]) == 0
        assert study.best(**named) == json.loads(capsys.readouterr().out)
    assert len(study.best()) == 10
    assert 1 < len(study.best(per="teacher")) < 10
    assert 0 < len(study.best(pareto=True)) < 10
    with pytest.raises(UserError, match="top=0 is no whole number"):
        study.best(0)


def test_winners_are_judged_on_test_one_unless_more_are_asked_for_and_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best_trials, "_judge_on_test", lambda pair, study, settings: ({"knn/top1": 0.01}, {}))
    study = driven(tmp_path, early_stop=None)
    (only,) = study.best(test=True)
    assert only["test"] == {"knn/top1": 0.01}
    assert only["trial"] == study.best()[0]["trial"]
    assert json.loads((tmp_path / "studies/toy" / best_trials.FILE).read_text()).keys() - {"checksum"} == {str(only["trial"])}
    assert len(study.best(2, test=True)) == 2


def test_an_export_takes_format_head_and_registry_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(student_export, "export_trial", lambda *given: heard.append(given) or [tmp_path / "card"])
    monkeypatch.setattr(student_export, "register_student", lambda settings, *given: heard.append((settings.tracking, *given)))
    study = ktray.SearchResult(tmp_path, "toy", tracking="sqlite:///mine.db")
    assert study.export(tmp_path / "out") == [tmp_path / "card"]
    study.export(tmp_path / "out", 0, format="onnx", head="classifier", preprocessing=True, register=True)
    assert [given[1:] for given in heard[:2]] == [
        ("toy", "", tmp_path / "out", "none", "safetensors", False),
        ("toy", "0", tmp_path / "out", "classifier", "onnx", True),
    ]
    assert heard[2:] == [("sqlite:///mine.db", "toy", "0", tmp_path / "out")]


def test_every_option_of_a_search_arrives_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: dict[str, Any] = {}

    def searched(space: Any, options: Any, settings: Any, tracker: Any, *others: Any) -> search_run.SearchOutcome:
        heard.update(vars(options), space=space, tracker=tracker)
        return search_run.SearchOutcome(options.name)

    monkeypatch.setattr(search_run, "search_study", searched)
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "")
    study = ktray.search(
        search_space(tmp_path),
        home=tmp_path / "home",
        name="other",
        trials="+3",
        concurrent=2,
        warm_start="old",
        address="auto",
        share_images=True,
        retry=True,
        overrides=["transfer.iterations=7"],
        allow_plugins=["my_lab"],
        tracking="sqlite:///mine.db",
        talk=0,
    )
    assert (heard["name"], heard["trials"], heard["warm_start"], heard["address"]) == ("other", "+3", "old", "auto")
    assert heard["retry"] is True
    assert heard["space"].budget.concurrent == 2
    assert heard["space"].document.pair["transfer"]["iterations"] == 7
    assert heard["tracker"]._share_images is True
    assert os.environ["KTRAY_ALLOW_PLUGINS"] == "my_lab"
    assert study == ktray.SearchResult(tmp_path / "home", "other", tracking="sqlite:///mine.db")


def test_a_space_may_be_plain_data_and_is_the_same_as_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []

    def searched(space: Any, options: Any, *others: Any) -> search_run.SearchOutcome:
        heard.append(space)
        return search_run.SearchOutcome(options.name)

    monkeypatch.setattr(search_run, "search_study", searched)
    file = search_space(tmp_path)
    content = yaml.safe_load(file.read_text())
    for each in (file, content):
        assert ktray.search(each, home=tmp_path / "home", talk=0).name == "toy"
    assert heard[0].document == heard[1].document
    with pytest.raises(UserError, match=r"^space: pair\.tranfer: there is no field 'tranfer'"):
        ktray.search({**content, "pair": {**content["pair"], "tranfer": 1}}, home=tmp_path / "home", talk=0)
    with pytest.raises(UserError, match=r"^space: this is a pair, .* Use ktray run space\.$"):
        ktray.search(content["pair"], home=tmp_path / "home", talk=0)
    for wrong in (file.open, {"pair": tmp_path}):
        with pytest.raises(UserError, match=r"no plain data .* Give a YAML file's name"):
            ktray.search(wrong, home=tmp_path / "home", talk=0)  # type: ignore[arg-type]


def test_only_the_named_pairs_of_an_experiment_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "")
    path = tmp_path / "two.py"
    spec = toy_spec(teacher=None, transfer="none")
    body = "{name: parse_pair(SPEC, name) for name in ('one', 'two')}"
    path.write_text(f"from ktray.search.space import parse_pair\n\nSPEC = {spec!r}\n\ndef pairs():\n    return {body}\n")
    (result,) = ktray.run(path, home=tmp_path, only=["two"], allow_plugins=["my_lab"], local=True, talk=0)
    assert result["name"] == "two"
    assert os.environ["KTRAY_ALLOW_PLUGINS"] == "my_lab"
    with pytest.raises(UserError, match=r"there is no pair 'three'\. Known: one, two"):
        ktray.run(path, home=tmp_path, only=["three"], local=True, talk=0)


@pytest.mark.slow
def test_a_search_in_python_is_the_search_of_the_command(tmp_path: Path) -> None:
    space = search_space(tmp_path, budget__trials=2)
    script = f"""
import ktray, torch
study = ktray.search({str(space)!r}, home={str(tmp_path / "home")!r}, trials=2, talk=0)
print(study.name, len(study.best()), len(study.export({str(tmp_path / "student")!r})))
"""
    assert python(script).split()[0] == "toy"
    student = ktray.load_student(tmp_path / "student")
    assert student(torch.zeros(2, 3, 28, 28)).shape == (2, student.feature_dim)
    again: Any = Home(tmp_path / "home").run("search", space, "--trials", "2", "--json").answer
    assert again["stages"]["computed"] == {}
