"""The report says why a pair is best: scores of all trials, effects with intervals that hold, and a script that is safe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from ktray.report.effects import level_effects, levels_of, posterior, student_quantile
from ktray.report.worker_timeline import workers_timeline
from ktray.runs.worker_log import FILE, noting_what_workers_run, read_runs
from ktray.stores.file import FileStore
from tests.chromium import Browser, browser
from tests.reports import MARKUP, OBJECTIVES, html_of, page_of, pair, trial
from tests.synthetic_study import write_study

STOP = {"metric": "knn/top1", "rungs": [2, 4, 8], "reduction": 2, "mode": "max", "teacher": None}
HOSTILE = ["</script>" + MARKUP, "\"'`${alert(1)}", "a\u202egnp.exe", "<!--<script>", "\\u003c/script>", "&lt;b&gt;"]


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def test_pruned_trials_are_in_the_row_of_their_pair_with_its_best_score_at_each_rung(store: FileStore) -> None:
    trials = [
        trial(0, 0.6, scores={2: 0.40, 4: 0.55}, params={"lr": 0.1}),
        trial(1, 0.0, scores={2: 0.45}, state="pruned", params={"lr": 0.2}, objectives={}, metrics={}),
        trial(2, 0.0, scores={2: 0.30}, state="pruned", pair=pair(50, "alexnet"), objectives={}, metrics={}, params={}),
        trial(3, 0.9, state="duplicate"),
    ]
    head, *rows = page_of(trials, store, early_stop=STOP).rows["pairs"]
    assert head[3:] == [*("knn/top1 at epoch 2", "knn/top1 at epoch 4"), OBJECTIVES[0][0], "trials", "what varied among them"]
    name = "rotation-alexnet/conv4"
    assert rows[0] == [
        name,
        "k=5",
        "resnet18",
        "0.4500trial 1",
        "0.5500trial 0",
        "0.6000trial 0",
        "1 completed1 pruned",
        "lr 0.1, 0.2",
    ]
    assert rows[1] == [name, "k=50", "alexnet w0.25", "0.3000trial 2", "–", "–", "1 pruned", ""]
    assert len(rows) == 2


def test_every_parameter_that_varies_has_a_column_and_every_trial_a_row(store: FileStore) -> None:
    drawn = [{"a": n, "b": "x", "c": 0.1 * n, "d": n % 2 == 0, "e": f"w{n}", "f": [1, 2][n % 2]} for n in range(3)]
    head, *rows = page_of([trial(n, 0.5, params=params) for n, params in enumerate(drawn)], store).rows["trials"]
    assert head[5:10] == ["a", "c", "d", "e", "f"]
    assert [row[5:10] for row in rows] == [
        ["0", "0", "True", "w0", "1"],
        ["1", "0.1", "False", "w1", "2"],
        ["2", "0.2", "True", "w2", "1"],
    ]
    assert len({tuple(row[1:]) for row in rows}) == 3


def test_the_verdict_of_the_test_split_comes_with_its_distance_to_the_references_in_errors(store: FileStore) -> None:
    metric = OBJECTIVES[0][0]
    verdicts = {"1": (0.7, 0.03), "random student": (0.5, 0.04), "supervised ceiling": (0.75, 0.03)}
    test = {name: {"metrics": {metric: value}, "errors": {metric: error}} for name, (value, error) in verdicts.items()}
    page = page_of([trial(0, 0.4), trial(1, 0.6)], store, certainty={"test": test})
    text = page.text("headline")
    assert f"0.7000 ± 0.0300 {metric} on test (higher is better); 0.6000 on val" in text
    rows = page.rows["headline"]
    assert rows[0] == ["random student", "0.5000 ± 0.0400", "0.2000 worse", "4.0 standard errors"]  # 0.2 / hypot(0.03, 0.04)
    assert rows[1] == ["supervised ceiling", "0.7500 ± 0.0300", "0.0500 better", "1.2 standard errors"]
    assert "ktray best toy --test" not in text
    assert "ktray export toy/1 student/" in text


def test_the_effects_are_those_of_ridge_regression_for_one_ratio_of_the_variances() -> None:
    draws = np.random.default_rng(0)
    design = (draws.random((30, 6)) < 0.4).astype(float)
    results = design @ np.array([1.0, -1, 0.5, 0, 0, 2]) + draws.normal(0, 0.3, 30)
    mean, covariance = posterior(design, results, np.array([0.7]))
    assert np.allclose(mean, Ridge(alpha=0.7).fit(design, results).coef_)
    centred, values = design - design.mean(0), results - results.mean()
    noise = values @ np.linalg.solve(np.eye(30) + centred @ centred.T / 0.7, values) / 29
    assert np.allclose(covariance, noise * np.linalg.inv(centred.T @ centred + 0.7 * np.eye(6)))


def test_intervals_of_effects_hold_the_true_effect_nineteen_times_of_twenty() -> None:
    from scipy.stats import t

    assert all(abs(student_quantile(n) / t.ppf(0.975, n) - 1) < 0.01 for n in (4, 6, 10, 30, 1000))
    draws, inside, count = np.random.default_rng(1), 0, 0
    for _ in range(200):
        teachers, others = draws.normal(0, 1, 3), draws.normal(0, 1, 2)
        trials = []
        for number in range(20):
            teacher, k = draws.integers(3), draws.integers(2)
            value = teachers[teacher] + others[k] + draws.normal(0, 1)
            trials.append(trial(number, float(value), params={"teacher": f"t{teacher}", "transfer.k": int(k)}))
        levels = levels_of(trials)
        found = level_effects({each.number: each.objectives[OBJECTIVES[0][0]] for each in trials}, levels).get("teacher", [])
        weights = {effect.label: effect.count / 20 for effect in found}
        average = sum(weight * teachers[int(label[1])] for label, weight in weights.items())
        for effect in found:
            truth = teachers[int(effect.label[1])] - average
            inside, count = inside + (effect.low <= truth <= effect.high), count + 1
    assert 0.92 < inside / count < 0.985


def test_a_parameter_without_an_effect_is_not_said_to_have_one_and_a_large_one_is(store: FileStore) -> None:
    draws = np.random.default_rng(2)
    trials = [
        trial(n, 0.5 + 0.1 * (n % 2) + draws.normal(0, 0.01), params={"good": n % 2, "idle": int(draws.integers(2))})
        for n in range(40)
    ]
    text = page_of(trials, store).text("effects")
    assert "good = 1: +0.0" in text
    assert "idle = " not in text


def test_what_workers_ran_is_noted_and_drawn_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    note = noting_what_workers_run(tmp_path)
    status = {"name": "abc"}
    event = {"key": "student-1", "stage": "student", "worker": "worker-1", "time": 10.0, "event": "started"}
    note([event], status)
    note([event | {"time": 14.0, "event": "published"}], status)
    note([event, event | {"time": 15.0, "event": "failed"}], status)
    with open(tmp_path / FILE, "a") as file:
        file.write('{"key": "stu')
    runs = read_runs(tmp_path)
    assert [(run["began"], run["ended"], run["outcome"]) for run in runs] == [(10.0, 14.0, ""), (10.0, 15.0, "failed")]
    drawn = workers_timeline(runs[:1], {"student-1"})
    assert drawn is not None
    assert drawn["sentence"] == "1 stage on 1 worker in 4.00 s; 4.00 s of stages, 1.0 at a time on average."
    assert workers_timeline(runs[:1], {"student-2"}) is None


def test_a_report_and_the_best_of_a_thousand_trials_need_neither_torch_nor_pydantic(tmp_path: Path) -> None:
    home = write_study(tmp_path / "home", 1000)
    out = tmp_path / "r.html"
    script = f"""
import sys
from ktray.cli import main
assert main(["best", "quickstart", "--home", {str(home)!r}]) == 0
assert main(["report", "quickstart", "--home", {str(home)!r}, "-o", {str(out)!r}]) == 0
print(sorted({{"torch", "pydantic", "optuna", "ray", "pandas", "matplotlib", "scipy"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert out.read_text().count("<tr data-t=") == 1000


def hostile_page(folder: Path, store: FileStore) -> Path:
    trials = [
        trial(n, 0.5 + n / 100, params={"p": name, f"q{name}": n}, pair=pair(transfer={"kind": f"x.{name}", "k": n}))
        for n, name in enumerate(HOSTILE)
    ]
    trials.append(replace(trials[0], number=9, state="failed", cause=HOSTILE[0]))
    path = folder / "report.html"
    path.write_text(html_of(trials, store, study=f"s{HOSTILE[0]}", early_stop=STOP), encoding="utf-8")
    return path


def place_of(page: Browser, selector: str) -> list[float]:
    found: list[float] = page.value(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
        " const r = e.getBoundingClientRect(); return [r.x + Math.min(r.width / 2, 20), r.y + r.height / 2]; })()"
    )
    return found


def clicked(page: Browser, selector: str) -> None:
    page.click(*place_of(page, selector))


def fill(page: Browser, selector: str, text: str) -> None:
    field = f"document.querySelector({json.dumps(selector)})"
    page.value(f"{field}.value = {json.dumps(text)}; {field}.dispatchEvent(new Event('input'))")


@pytest.mark.browser
def test_in_a_browser_the_table_sorts_and_filters_and_a_click_shows_the_spec_with_hostile_names_as_text(
    tmp_path: Path, store: FileStore
) -> None:
    path = hostile_page(tmp_path, store)
    numbers = "[...document.querySelectorAll('#trials tbody tr')].filter((row) => !row.hidden).map((row) => row.dataset.t)"
    with browser() as page:
        page.open(path.as_uri())
        assert page.value(numbers) == ["0", "1", "2", "3", "4", "5", "9"]
        clicked(page, "#trials thead th button")
        assert page.value(numbers) == ["9", "5", "4", "3", "2", "1", "0"]
        clicked(page, "#trials thead th button")
        fill(page, "#trials input", "failed")
        assert page.value(numbers) == ["9"]
        clicked(page, "#trials tbody tr[data-t='9'] th")
        assert page.value("document.querySelector('dialog').open")
        spec = page.value("document.querySelector('dialog pre').textContent")
        assert f"transfer.kind: x.{HOSTILE[0]}" in spec
        assert "student.backbone.kind: resnet" in spec
        page.value("document.querySelector('dialog').close()")
        fill(page, "#trials input", "")
        page.hover(*place_of(page, "#history circle[data-t='2']"))
        assert page.value("[...document.querySelectorAll('tr.hot')].map((row) => row.dataset.t)") == ["2"]
        clicked(page, "#history circle[data-t='2']")
        assert "a\\u202egnp.exe" in page.value("document.querySelector('dialog pre').textContent")
        assert "\u202e" not in page.value("document.documentElement.textContent")
        assert page.value("[...document.scripts].length") == 2
        assert page.log == []
        page.value("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.foreign = 1'}))")
        assert page.value("typeof window.foreign") == "undefined"  # refused by the page's policy
        page.open(path.as_uri(), script=False)
        page.call("Emulation.setScriptExecutionDisabled", value=False)
        assert len(page.value(numbers)) == 7  # complete without the script
        for width in (1280, 390):
            page.open(path.as_uri(), width)
            assert page.value("document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_a_report_of_a_thousand_trials_opens_and_sorts(tmp_path: Path) -> None:
    from ktray.runs.settings import make_settings
    from ktray.runs.study_report import write_report

    home = write_study(tmp_path / "home", 1000)
    path = write_report("quickstart", make_settings(home, verbosity=0), tmp_path / "report.html")
    with browser() as page:
        began = time.monotonic()
        page.open(path.as_uri())
        print(f"opened in {time.monotonic() - began:.2f} s")
        assert page.value("document.querySelector('#trials .count').textContent") == "1000 of 1000 rows"
        clicked(page, "#trials thead th:last-child button")
        assert page.log == []
