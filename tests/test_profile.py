"""Profiles: the timeline's numbers and page, the traces of stages, and what neither may do to a search."""

from __future__ import annotations

import gzip
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from ktray import progress
from ktray.pipeline import stage_trace
from ktray.report.timeline import timeline_page
from ktray.runs.profile import Profile, summary

WORKER = {"name": "worker-1", "node": "n", "pid": 7, "cpus": 0.0, "gpus": 0.25, "gpu_ids": ["0"]}


def event(kind: str, key: str, at: float, worker: str = "worker-1") -> dict[str, Any]:
    return {"event": kind, "key": key, "stage": key.rpartition("-")[0], "worker": worker, "time": at, "seconds": 0.0}


@pytest.fixture
def profile(tmp_path: Path) -> Any:
    found = Profile(tmp_path, "ktray search <b>x</b>", 1000.0, with_traces=False)
    yield found
    found.close()


def test_stages_are_spans_from_their_start_to_whatever_ended_them(profile: Profile) -> None:
    events = [
        event("started", "student-1", 1002.0),
        event("started", "images-1", 1001.0),
        event("published", "images-1", 1003.5),
    ]
    profile.observe(events, {"workers": [WORKER]})
    profile.observe([event("worker died", "student-1", 1004.0), event("published", "unknown-1", 1005.0)], {"workers": []})
    found = profile.data()
    spans = [(each["key"], each["began"], each["ended"], each["outcome"]) for each in found["stages"]]
    assert spans == [("images-1", 1.0, 3.5, ""), ("student-1", 2.0, 4.0, "worker died")]
    assert found["workers"]["worker-1"]["gpu_ids"] == ["0"], "a worker that has ended stays known"
    assert (found["summary"]["first_stage"], found["summary"]["last_stage"]) == (1.0, 4.0)


def test_the_busy_share_of_a_gpu_counts_from_the_first_stage_to_the_last() -> None:
    stages = [{"key": "a-1", "stage": "a", "worker": "w", "began": 10.0, "ended": 20.0, "outcome": ""}]
    samples = [[9.0, 0.0, 1.0], [12.0, 80.0, 1.0], [15.0, 0.0, 1.0], [18.0, 100.0, 1.0], [21.0, 0.0, 1.0]]
    found = summary({"stages": stages, "gpus": {"0": samples}})
    assert found["gpu_percent"] == {"0": 60.0}
    assert (found["gpu_idle_samples"], found["gpu_samples"]) == ({"0": 1}, {"0": 3})
    assert found["stages"] == {"a": {"stages": 1, "seconds": 10.0, "longest": 10.0}}
    assert summary({"stages": [], "gpus": {"0": samples}})["gpu_percent"] == {}


class Page(HTMLParser):
    """The tags of a page, the addresses that it loads, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_no_network_and_no_script_and_shows_names_as_they_are(profile: Profile) -> None:
    hostile = 'a<script>alert(1)</script>"\x1b[31m'
    profile.observe(
        [event("started", "student-1", 1001.0, hostile), event("failed", "student-1", 1002.0)], {"workers": [WORKER]}
    )
    profile.mark(hostile)
    page = Page(timeline_page(profile.data(), ["trace-student-1.json.gz"]))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.loads == ["trace-student-1.json.gz"]
    assert "<script>alert(1)</script>" in page.text
    assert "\x1b" not in page.text
    assert page.tags.count("title") >= 2, "the page's, and one hint per bar"


def test_a_profile_of_nothing_is_a_page_too(profile: Profile) -> None:
    json.loads((profile.write().parent / "timeline.json").read_text())
    assert Page((profile.folder / "timeline.html").read_text()).tags


def test_a_trace_ends_with_the_first_step_after_its_time_and_says_what_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_trace, "TRACED_SECONDS", 0.0)
    place = stage_trace._free_place(tmp_path, "student")
    assert place is not None
    with stage_trace._tracing(place, "student-1 on cpu", on_gpu=False):
        torch.ones(8).cumsum(0)
        progress.advance("step")
        torch.ones(8).sort()
    names = {each.get("name") for each in json.loads(gzip.decompress(place.read_bytes()))["traceEvents"]}
    assert "aten::cumsum" in names
    assert "aten::sort" not in names
    assert "student-1 on cpu" in (tmp_path / "trace-student-1.txt").read_text()


def test_only_a_few_stages_of_a_kind_are_traced_and_a_folder_that_is_gone_costs_nothing(tmp_path: Path) -> None:
    places = [stage_trace._free_place(tmp_path, "student") for _ in range(stage_trace.MAX_TRACES + 1)]
    assert [place is not None for place in places] == [*stage_trace.MAX_TRACES * [True], False]
    assert stage_trace._free_place(tmp_path, "images") is not None
    assert stage_trace._free_place(tmp_path / "gone", "images") is None


def test_a_stage_whose_trace_fails_goes_on_and_one_that_fails_raises_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("no profiler")

    monkeypatch.setattr(torch.profiler.profile, "start", fail)
    place = tmp_path / "trace.json.gz"
    with stage_trace._tracing(place, "a", on_gpu=False):
        done = True
    assert done
    with pytest.raises(KeyError, match="mine"), stage_trace._tracing(place, "a", on_gpu=False):
        raise KeyError("mine")


def test_a_trace_that_is_too_large_leaves_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_trace, "MAX_TRACE_BYTES", 10)
    place = tmp_path / "trace-student-1.json.gz"
    with stage_trace._tracing(place, "student-1", on_gpu=False):
        torch.ones(8).cumsum(0)
    assert place.read_bytes() == b""
    assert "was left out" in (tmp_path / "trace-student-1.txt").read_text()
