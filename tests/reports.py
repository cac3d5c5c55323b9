"""Toy studies for the report: a page parser, a pair, trials, and artifacts with the files of their stages."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from ktray.report import render
from ktray.search.trial import Trial
from ktray.stores.file import FileStore

OBJECTIVES = [("linear_probe/top1", "max"), ("cost/seconds", "min")]
REFERENCES = {
    "random student": {"metrics": {"linear_probe/top1": 0.30, "cost/seconds": 2.0}, "keys": {}},
    "supervised ceiling": {"metrics": {"linear_probe/top1": 0.80, "cost/seconds": 60.0}, "keys": {}},
}
HOME = "/home/jane.doe"
MARKUP = "<script>alert(1)</script>"


class Page(HTMLParser):
    """A parsed page: text and table rows per section id, and every tag with its attributes."""

    VOID = frozenset({"meta", "img", "wbr", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self._section = ""
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        rows = self.rows.setdefault(self._section, [])
        if tag == "tr":
            rows.append([])
        elif tag in ("td", "th"):
            rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._section] = self.texts.get(self._section, "") + data
        if {"td", "th"} & set(self._open):
            self.rows[self._section][-1][-1] += data

    def text(self, section: str) -> str:
        return " ".join(self.texts[section].split())

    def sections(self) -> list[str]:
        return [str(attrs["id"]) for tag, attrs in self.tags if tag == "section"]


def pair(k: int = 5, backbone: str = "resnet", **changes: Any) -> dict[str, Any]:
    data = {"kind": "imagefolder", "path": f"{HOME}/pictures", "size": 32, "split": {"val": 0.1, "seed": 7}}
    schedule = {"kind": "constant", "epochs": 4, "lr": 0.05}
    student: dict[str, Any] = {"alexnet": {"kind": "alexnet", "width": 0.25}, "resnet": {"kind": "resnet", "depth": 18}}[
        backbone
    ]
    return {
        "data": dict.fromkeys(("pretext", "cluster", "transfer", "target"), data),
        "teacher": {
            "pretext": {"kind": "rotation"},
            "backbone": {"kind": "alexnet", "width": 1.0},
            "layer": "conv4",
            "schedule": schedule,
            "seed": 3,
        },
        "transfer": {"kind": "clusters", "k": k, "seed": 11},
        "student": {"backbone": student, "schedule": schedule, "seed": 0},
        "evals": [{"kind": "linear_probe", "name": None, "split": "val"}],
    } | changes


def trial(number: int, top1: float, seconds: float = 100.0, **changes: Any) -> Trial:
    fields: dict[str, Any] = {
        "params": {"transfer.k": 5},
        "pair": pair(),
        "state": "completed",
        "objectives": {"linear_probe/top1": top1, "cost/seconds": seconds},
        "metrics": {"linear_probe/top1": top1, "cost/seconds": seconds},
        "cost": {"seconds": seconds, "marginal_seconds": seconds / 4},
    }
    return Trial(number=number, **(fields | changes))


def key(stage: str, number: int) -> str:
    return f"{stage}-{number:012x}"


def publish(store: FileStore, stage: str, number: int, seconds: float, **record: Any) -> str:
    """An artifact of one stage with the files that `ktray.stages` gives it."""
    name = key(stage, number)
    out = store.scratch(name, "a")
    if stage == "pseudo_labels":
        np.save(out / "labels.npy", np.array([0] * 6 + [1] * 3 + [3] * 1 + [-1] * 2))
        Image.new("RGB", (40, 20), "red").save(out / "clusters.png")
    if stage == "student":
        rows = [{"epoch": epoch, "loss": 2.0 / epoch, "lr": 0.05} for epoch in range(1, 5)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), out / "history.parquet")
    written = {
        "key": name,
        "stage": stage,
        "metrics": {},
        "inputs": {},
        "seconds": seconds,
        "seconds_alone": seconds,
        "peak_bytes": 3 << 30,
        "device": "cpu x86_64",
        "workers": 2,
        "published": "2026-11-23T07:00:00+00:00",
        "versions": {"python": "3.11.9", "torch": "2.14.1"},
        "commit": "0123abcd" * 5,
        "started_from": None,
    }
    store.publish(out, name, written | record)
    return name


def shared_prefix(store: FileStore) -> dict[str, Any]:
    """One teacher, features and clusters; two students with one evaluation each. Keys of the first student's trial."""
    images = publish(store, "images", 1, 4.0)
    teacher = publish(store, "teacher", 1, 40.0, inputs={"images.pretext": images})
    features = publish(store, "features", 1, 10.0, inputs={"images": images, "teacher": teacher})
    clusters = publish(store, "clusters", 1, 6.0, inputs={"features": features})
    labels = publish(
        store, "pseudo_labels", 1, 2.0, inputs={"features": features, "clusters": clusters, "images.transfer": images}
    )
    for number in (1, 2):
        early = publish(store, "student", 10 * number, 5.0, inputs={"pseudo_labels": labels})
        done = {"inputs": {"pseudo_labels": labels}, "seconds_alone": 20.0, "started_from": early}
        student = publish(store, "student", number, 15.0, **done)
        publish(store, "evaluation", number, 3.0, inputs={"student": student, "images.target": images})
    return keys_of_student(1)


def keys_of_student(number: int) -> dict[str, Any]:
    prefix = {stage: key(stage, 1) for stage in ("teacher", "features", "clusters", "pseudo_labels")}
    return prefix | {"student": key("student", number), "evaluation": {"linear_probe": key("evaluation", number)}}


def page_of(trials: list[Trial], store: FileStore, **changes: Any) -> Page:
    return Page(html_of(trials, store, **changes))


def html_of(trials: list[Trial], store: FileStore, **changes: Any) -> str:
    given: dict[str, Any] = {
        "study": "toy",
        "question": "Which?",
        "objectives": OBJECTIVES,
        "references": REFERENCES,
        "labels_used": {"val": 1000},
    }
    return render(trials=trials, store=store, **(given | changes))
