"""The report agrees with trials and artifacts, reveals no path and no machine, and escapes markup."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import platform
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ktray.report.figures import value_axis
from ktray.report.formatting import anonymised, cause_without_keys, duration
from ktray.search.ranking import ranked
from ktray.stores.file import FileStore
from tests.reports import (
    HOME,
    MARKUP,
    OBJECTIVES,
    Page,
    html_of,
    key,
    keys_of_student,
    page_of,
    pair,
    publish,
    shared_prefix,
    trial,
)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def test_the_headline_compares_the_best_trial_with_both_references(store: FileStore) -> None:
    text = page_of([trial(0, 0.4), trial(1, 0.6), trial(2, 0.5)], store).text("headline")
    assert "0.6000 linear_probe/top1 (higher is better)" in text
    assert "rotation-alexnet/conv4 k=5 → resnet18 is the best of 3 completed trials (trial 1)" in text
    assert "0.3000 better than the random student (0.3000) and 0.2000 worse than the supervised ceiling (0.8000)" in text
    assert "60 % of the way from the random student to the supervised ceiling" in text
    assert "Trained without labels, selected with 1,000 labels of val." in text
    assert "One standard error of a share of 1,000 images is 0.0155." in text  # sqrt(0.6 * 0.4 / 1000)


def test_trials_that_tie_with_the_best_are_named(store: FileStore) -> None:
    text = page_of([trial(0, 0.6), trial(1, 0.6), trial(2, 0.5), trial(3, 0.6)], store).text("headline")
    assert "(trial 0; level with it: 1 and 3)" in text


def test_ties_are_broken_by_the_second_objective(store: FileStore) -> None:
    trials = [trial(0, 0.6, 90.0), trial(1, 0.6, 50.0), trial(2, 0.6, 70.0)]
    page = page_of(trials, store, references={})
    assert "(trial 1; level with it: 2 and 0)" in page.text("headline")
    assert [row[0] for row in page.rows["leaderboard"][1:]] == ["1", "2", "0"]
    assert ranked(trials, OBJECTIVES)[0].number == 1  # best and export


def test_a_lower_value_is_the_best_of_an_objective_that_is_minimised(store: FileStore) -> None:
    text = page_of([trial(0, 0.4, 50.0), trial(1, 0.6, 90.0)], store, objectives=OBJECTIVES[::-1]).text("headline")
    assert "50.0 s cost/seconds (lower is better)" in text
    assert "48.0 s worse than the random student (2.00 s) and 10.0 s better than the supervised ceiling (1 min 00 s)" in text
    assert "% of the way" not in text


@pytest.mark.parametrize("labels_used", [{}, {"val": 0}])
def test_a_study_without_labels_says_so(store: FileStore, labels_used: dict[str, int]) -> None:
    text = page_of([trial(0, 0.4)], store, labels_used=labels_used, references={}).text("headline")
    assert "No labels were used" in text
    assert "supervised" not in text


def test_a_pair_trained_with_labels_is_not_said_to_be_trained_without(store: FileStore) -> None:
    text = page_of([trial(0, 0.4, pair=pair(transfer={"kind": "labels"}, teacher=None))], store).text("headline")
    assert "Trained with the labels of its training images, selected with 1,000 labels of val." in text
    assert "without labels" not in text


def test_the_training_of_a_teacher_from_a_file_is_said_to_be_unknown(store: FileStore) -> None:
    loaded = {"checkpoint": f"{HOME}/dino.pt", "backbone": {"kind": "resnet", "depth": 50}, "layer": "layer4"}
    text = page_of([trial(0, 0.4, pair=pair(teacher=loaded))], store).text("headline")
    assert "dino-resnet50/layer4 k=5 → resnet18" in text
    assert "what they were trained with is not known here" in text


def test_references_are_in_the_leaderboard_at_their_rank(store: FileStore) -> None:
    page = page_of([trial(0, 0.2), trial(1, 0.6, state="pruned"), trial(2, 0.5)], store)
    head, *rows = page.rows["leaderboard"]
    assert head == ["trial", "teacher", "transfer", "student", "linear_probe/top1", "cost/seconds", "cost/marginal_seconds"]
    assert [row[0] for row in rows] == ["supervised ceiling", "2", "random student", "0"]
    assert rows[1] == ["2", "rotation-alexnet/conv4", "k=5", "resnet18", "0.5000", "1 min 40 s", "25.0 s"]
    assert "1 pruned at a rung" in page.text("leaderboard")


def test_the_leaderboard_ends_after_twenty_and_counts_the_rest(store: FileStore) -> None:
    page = page_of([trial(number, number / 100) for number in range(23)], store, references={})
    assert [row[0] for row in page.rows["leaderboard"][1:]] == [str(number) for number in range(22, 2, -1)]
    assert "3 more completed" in page.text("leaderboard")


def test_teachers_and_students_show_the_best_value_of_each_cell(store: FileStore) -> None:
    hog, raw = ({"descriptor": {"kind": kind}} for kind in ("hog", "raw_pixels"))
    trials = [
        trial(0, 0.4),
        trial(1, 0.6),
        trial(2, 0.5, pair=pair(backbone="alexnet")),
        trial(3, 0.3, pair=pair(teacher=hog)),
        trial(4, 0.2, pair=pair(teacher=raw), state="pruned"),
        trial(5, 0.2, pair=pair(teacher=raw), state="pruned"),
    ]
    rows = page_of(trials, store).rows["teachers-students"]
    assert rows == [
        ["", "resnet18", "alexnet w0.25"],
        ["rotation-alexnet/conv4", "0.6000trial 1", "0.5000trial 2"],
        ["hog", "0.3000trial 3", "–"],
        ["raw_pixels", "2 pruned", "–"],
    ]
    html = html_of(trials, store).split('id="teachers-students"')[1]
    assert [int(heat) for heat in re.findall(r"--heat: (\d+)%", html)] == [100, 67, 0]


def test_the_pareto_front_has_the_trials_that_no_other_beats_in_both_objectives(store: FileStore) -> None:
    trials = [trial(0, 0.6, 100), trial(1, 0.5, 50), trial(2, 0.5, 80), trial(3, 0.4, 60), trial(4, 0.1, 20)]
    page = page_of(trials, store)
    assert "5 completed trials; the Pareto front, marked and joined, has 3 trials" in page.text("objectives")
    assert [row[0] for row in page.rows["objectives"][1:]] == [
        f"{number}rotation-alexnet/conv4 k=5 → resnet18" for number in (0, 1, 4)
    ]
    html = html_of(trials, store)
    scatter = html[html.index('id="objectives"') : html.index('id="reproduce"')]
    assert re.findall(r'class="best"[^>]*><title>(\d+):', scatter) == ["0", "1", "4"]
    assert re.findall(r'class="dot"[^>]*><title>(\d+):', scatter) == ["2", "3"]


def test_one_objective_has_no_scatter(store: FileStore) -> None:
    assert "objectives" not in page_of([trial(0, 0.4), trial(1, 0.5)], store, objectives=OBJECTIVES[:1]).sections()


def test_learning_curves_come_from_rungs_and_from_the_history_of_the_student(store: FileStore) -> None:
    keys = shared_prefix(store)
    trials = [trial(0, 0.4, scores={2: 0.2, 4: 0.35}, keys=keys), trial(1, 0.5, scores={2: 0.3, 4: 0.45})]
    html = html_of(trials, store)
    scores, losses = re.findall(r'<svg class="plot".*?</svg>', html[html.index('id="curves"') :], flags=re.DOTALL)[:2]
    assert [len(points.split()) for points in re.findall(r'polyline class="curve" points="([^"]+)"', scores)] == [2, 2]
    (points,) = re.findall(r'polyline class="curve" points="([^"]+)"', losses)
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert len(heights) == 4
    # the pixels are an affine image of the losses 2/1, 2/2, 2/3, 2/4, turned upside down
    shares = (np.array(heights) - heights[0]) / (heights[-1] - heights[0])
    np.testing.assert_allclose(shares, (2 - 2 / np.arange(1, 5)) / 1.5, atol=2e-3)
    assert '<g class="s1">' in losses  # trial 0 ranks second, in both panels


def test_cluster_statistics_are_those_of_the_pseudo_labels(store: FileStore) -> None:
    keys = shared_prefix(store)
    metrics = {"linear_probe/top1": 0.4, "clusters/empty": 1.0, "clusters/repaired": 2.0, "pseudo_labels/nmi": 0.25}
    page = page_of([trial(0, 0.4, keys=keys, metrics=metrics)], store)
    facts = dict(page.rows["cluster-statistics"])
    assert facts["clusters"] == "5"
    assert facts["images with a pseudo-label"] == "10 of 12"
    assert facts["clusters without an image left"] == "2"
    assert facts["images per cluster"] == "1 smallest, 3 median, 6 largest"
    assert facts["NMI with the labels"] == "0.2500"
    assert facts["empty clusters repaired on the way"] == "2"


def test_the_cluster_sheet_is_inside_the_file_and_shrinks_if_it_is_large(store: FileStore) -> None:
    keys = shared_prefix(store)
    assert _picture(page_of([trial(0, 0.4, keys=keys)], store)).size == (40, 20)
    large = store.scratch(key("pseudo_labels", 9), "a")
    np.save(large / "labels.npy", np.zeros(3, np.int64))
    Image.new("RGB", (2800, 100), "blue").save(large / "clusters.png")
    store.publish(
        large, key("pseudo_labels", 9), {"metrics": {}, "stage": "pseudo_labels", "key": key("pseudo_labels", 9), "seconds": 1}
    )
    picture = _picture(page_of([trial(0, 0.4, keys=keys | {"pseudo_labels": key("pseudo_labels", 9)})], store))
    assert picture.size == (1400, 50)


def test_the_plots_of_the_best_pairs_evaluations_are_inside_the_file_with_their_captions(store: FileStore) -> None:
    made = key("evaluation", 7)
    scratch = store.scratch(made, "a")
    for name in ("detections.png", "precision_recall.png", "unknown.png"):
        Image.new("RGB", (30, 20), "blue").save(scratch / name)
    store.publish(scratch, made, {"metrics": {}, "stage": "evaluation", "key": made, "seconds": 1})
    page = page_of([trial(0, 0.4, keys=shared_prefix(store) | {"evaluation": {"<b>det": made}})], store)
    alts = [str(attrs["alt"]) for tag, attrs in page.tags if tag == "img"]
    assert [alt.split(":")[0] for alt in alts if alt.startswith("<b>det")] == ["<b>det", "<b>det"]
    assert any("detections with a score" in alt for alt in alts)


def _picture(page: Page) -> Image.Image:
    (source,) = [str(attrs["src"]) for tag, attrs in page.tags if tag == "img"]
    assert source.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))


def test_reuse_counts_each_artifact_once_and_each_of_its_uses(store: FileStore) -> None:
    shared_prefix(store)
    trials = [
        trial(0, 0.4, keys=keys_of_student(1)),
        trial(1, 0.5, keys=keys_of_student(2)),
        trial(2, 0.5, keys=keys_of_student(2), state="duplicate", duplicate_of=1),
        trial(3, 0.5, state="pruned"),
    ]
    rows = page_of(trials, store).rows["reuse"][1:]
    assert ["teacher", "1", "2", "40.0 s", "1 min 20 s", "2.0 ×"] in rows
    assert ["images", "1", "2", "4.00 s", "8.00 s", "2.0 ×"] in rows  # no trial names it, its stages read it
    assert ["student", "2", "2", "40.0 s", "40.0 s", "1.0 ×"] in rows  # 5 s to the first snapshot and 15 s from there
    assert rows[-1] == ["all stages", "9", "14", "1 min 48 s", "2 min 50 s", "1.6 ×"]


def test_a_snapshot_that_two_students_continue_is_spent_once(store: FileStore) -> None:
    shared_prefix(store)
    inputs, early = {"pseudo_labels": key("pseudo_labels", 1)}, key("student", 10)
    publish(store, "student", 3, 15.0, inputs=inputs, seconds_alone=20.0, started_from=early)
    trials = [trial(0, 0.4, keys={"student": key("student", 1)}), trial(1, 0.5, keys={"student": key("student", 3)})]
    rows = page_of(trials, store).rows["reuse"]
    assert ["student", "2", "2", "35.0 s", "40.0 s", "1.1 ×"] in rows


def test_a_cause_of_failure_is_listed_once_with_its_trials(store: FileStore) -> None:
    cause = "clusters-{} failed: ValueError: 12 features are NaN"
    failed = [trial(n, 0.0, state="failed", cause=cause.format(f"{n:012x}"), objectives={}, metrics={}) for n in (3, 5)]
    other = trial(4, 0.0, state="failed", cause=None, objectives={}, metrics={})
    text = page_of([trial(0, 0.4), *failed, other], store).text("failures")
    assert "2 trials (3, 5): clusters failed: ValueError: 12 features are NaN" in text
    assert "1 trial (4): no cause was recorded" in text


def test_a_study_without_a_completed_trial_still_has_a_report(store: FileStore) -> None:
    trials = [trial(0, 0.4, state="paused", objectives={}), trial(1, 0.0, state="failed", cause="no", objectives={})]
    page = page_of(trials, store)
    assert page.sections() == ["headline", "trials", "failures"]
    assert "No trial has completed" in page.text("headline")
    assert page_of([], store).sections() == ["headline"]


def test_artifacts_missing_from_the_store_are_left_out(store: FileStore) -> None:
    page = page_of([trial(0, 0.4, keys=keys_of_student(1)), trial(1, float("nan"))], store)
    assert page.sections() == ["headline", "leaderboard", "trials", "reproduce"]
    assert page.rows["leaderboard"][-1][4] == "–"


def test_sections_come_in_one_order(store: FileStore) -> None:
    keys = shared_prefix(store)
    trials = [
        trial(0, 0.4, keys=keys, scores={2: 0.2}),
        trial(1, 0.5, 80.0, keys=keys_of_student(2), pair=pair(backbone="alexnet")),
        trial(2, 0.0, state="failed", cause="no"),
    ]
    assert page_of(trials, store).sections() == [
        *("headline", "leaderboard", "pairs", "history", "teachers-students", "objectives", "curves", "trials", "reuse"),
        *("clusters", "cluster-statistics", "failures", "reproduce"),
    ]


def test_the_spec_of_the_best_pair_can_be_read_back(store: FileStore) -> None:
    page = page_of([trial(0, 0.4, keys=shared_prefix(store))], store)
    text = page.texts["reproduce"]
    spec = yaml.safe_load(text[text.index("data:\n") : text.index("Absolute paths")])
    wanted = json.loads(json.dumps(pair()))
    assert spec == wanted | {"data": wanted["data"]["target"] | {"path": "…/pictures"}}
    facts = dict(row for row in page.rows["reproduce"] if len(row) == 2)
    assert facts["seeds"] == "data.split.seed = 7, teacher.seed = 3, transfer.seed = 11, student.seed = 0"
    assert facts["commit"] == "0123abcd" * 5
    assert (facts["torch"], facts["device"]) == ("2.14.1", "cpu x86_64")
    assert [key("teacher", 1), "40.0 s", "3.0 GiB", "2", "2026-11-23"] in page.rows["reproduce"]


def test_markup_of_the_user_is_escaped(store: FileStore) -> None:
    named = pair(backbone="resnet", transfer={"kind": f"my_lab.{MARKUP}", "k": 3})
    named["student"] = named["student"] | {"backbone": {"kind": MARKUP}}
    trials = [
        trial(0, 0.4, pair=named, params={MARKUP: MARKUP}, keys=shared_prefix(store)),
        trial(1, 0.5, pair=named),
        trial(2, 0.0, state="failed", cause=f"ValueError: {MARKUP}"),
    ]
    references = {f"random {MARKUP}": {"metrics": {"linear_probe/top1": 0.1}, "keys": {}}}
    page = page_of(trials, store, study=f"a{MARKUP}", question=f"b{MARKUP}", references=references, labels_used={MARKUP: 3})
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{"type": "application/json", "id": "specs"}, {}]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert MARKUP in page.text("")
    assert MARKUP in page.text("failures")
    assert f"random {MARKUP}" in page.text("headline")


def test_the_page_fetches_nothing_and_its_policy_allows_one_script(store: FileStore) -> None:
    html = html_of([trial(0, 0.4, keys=shared_prefix(store)), trial(1, 0.5)], store)
    assert not {tag for tag, _ in Page(html).tags} & {"link", "iframe", "object", "base"}
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)""", html)
    assert "@import" not in html
    script = html[html.index("<script>") + len("<script>") : html.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [attrs["content"] for tag, attrs in Page(html).tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    wanted = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert policy == wanted


def test_no_path_and_no_machine_is_named(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "gpu-box-7.lab.example")
    causes = [
        f"FileNotFoundError: [Errno 2] No such file: '{HOME}/my pictures/a b.png'",
        f"OSError:{HOME}/x.npy on gpu-box-7.lab.example and gpu-box-7 at 10.0.0.7:8265",
        f"ValueError: file://{HOME}/store is full, see s3://jane-bucket/runs and ~/notes",
        "ValueError: C:\\Users\\jane.doe\\x.npy",
    ]
    failed = [trial(2 + n, 0.0, state="failed", cause=cause) for n, cause in enumerate(causes)]
    html = html_of([trial(0, 0.4, keys=shared_prefix(store)), *failed], store)
    for secret in (HOME, "jane", "doe", "my pictures", "gpu-box", "lab.example", "10.0.0.7", str(store.root), "/tmp/"):
        assert secret not in html
    assert "a b.png" in html


def test_text_that_is_no_path_is_unchanged() -> None:
    for text in ("knn/top1 and 1/2 of linear_probe/loss", "3 images / s", "a/b/c: ../x/y", "<b>bold</b>", "2026-11-23 07:00"):
        assert anonymised(text) == text
    assert cause_without_keys("features-0123456789ab failed: no") == "features failed: no"


def test_text_has_enough_contrast_in_both_colour_schemes() -> None:
    style = (Path(__file__).parents[1] / "ktray" / "report" / "style.css").read_text()
    light, dark = style.split("@media screen and (prefers-color-scheme: dark)")[:2]
    for scheme in (light, dark.split("\n* ")[0]):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        for ink, ground in [("ink", "hot"), ("ink", "card"), ("soft", "paper"), ("soft", "card"), ("reference", "card")]:
            assert _contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        for index in range(8):
            assert _contrast(colours[f"s{index}"], colours["paper"]) >= 4.5


def _contrast(one: str, other: str) -> float:
    """WCAG 2.1 contrast ratio."""
    light = []
    for colour in (one, other):
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.0, 0.0], [1e-9, 2e-9], [3.0, 90000.0], [-5.0, 7.0], [0.99, 1.0]])
def test_an_axis_holds_its_values_and_has_ticks_between_its_ends(values: list[float]) -> None:
    across = value_axis(values, (0.0, 100.0), "x")
    assert all(0 < across.at(value) < 100 for value in values)
    assert 1 <= len(across.ticks) <= 12
    assert all(-0.01 <= across.at(tick) <= 100.01 for tick in across.ticks)


def test_durations_are_readable() -> None:
    texts = [duration(seconds) for seconds in (0.421, 12.34, 59.9, 65, 3599.9, 11520, 190800)]
    assert texts == ["0.42 s", "12.3 s", "59.9 s", "1 min 05 s", "1 h 00 min", "3 h 12 min", "2 d 05 h"]


def test_trials_with_equal_values_can_be_plotted(store: FileStore) -> None:
    trials = [replace(trial(0, 0.4), number=number, scores={1: 0.4}) for number in range(10)]
    assert "curves" in page_of(trials, store).sections()
