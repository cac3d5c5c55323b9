"""A plot shows names as they are, and one that cannot be drawn costs its stage nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ktray.clustering import pseudo_labelling
from ktray.evals import linear_probe
from ktray.images import Images
from ktray.plots import LABEL_LENGTH, label_of, optional_plot
from tests.source import ROOT

NAMES = [
    "$",
    "$$",
    "$x",
    "$x^{$",
    r"$\frac{1}{2}$",
    r"$\nonsense{$",
    r"\alpha",
    "a_b^c",
    "_",
    "^",
    "{",
    "}",
    "%",
    "#",
    "&",
    "~",
    "\\",
    "a\nb\nc",
    "\r\n",
    "\0",
    "\x1b[31mred",
    "x" * 10_000,
    "y\n" * 5_000,
    "🦊🐻‍❄️👩🏽‍🚀",
    "كلب وقطة",
    "\u202eesrever",
    "ㄱ漢字かな",
    "\u0301" * 500,
    "\ud800",
    "",
    " ",
    "<b>bold</b>",
    "[red]x[/red]",
]


def image_set(names: tuple[str, ...], labels: np.ndarray) -> Images:
    """Black images with these labels, of classes with these names."""
    return Images(
        size=2,
        count=len(labels),
        labels=labels,
        classes=names,
        read=lambda indices: np.zeros((len(indices), 2, 2, 3), np.uint8),
    )


def judged(names: tuple[str, ...], out: Path) -> dict[str, float]:
    """The metrics of a probe on features that tell the classes apart."""
    labels = np.repeat(np.arange(len(names)), 4)
    images = image_set(names, labels)
    rows = np.eye(len(names), dtype=np.float32)[labels]
    return linear_probe.evaluate(
        linear_probe.Spec(), features=lambda _: rows, train=images, judged=images, pseudo_labels=None, out=out, device="cpu"
    )


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:24])
def test_a_class_of_any_name_is_plotted_in_silence(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, recwarn: Any
) -> None:
    assert judged((name, "plain"), tmp_path)["top1"] == 1
    with Image.open(tmp_path / "confusion.png") as plot:
        assert plot.size == (400, 400)
        assert len(set(plot.convert("L").get_flattened_data())) > 20
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
    assert not list(recwarn)


def test_a_name_is_never_a_formula(tmp_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def drawn(text: str, **options: Any) -> np.ndarray:
        figure = Figure(figsize=(4, 1))
        canvas = FigureCanvasAgg(figure)
        figure.text(0.1, 0.5, text, **options)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())

    name = "$a^2$ costs_5"
    literal = drawn(name.replace("$", r"\$"))  # matplotlib's own way to write a dollar
    assert np.array_equal(drawn(label_of(name), parse_math=False), literal)
    assert not np.array_equal(drawn(name), literal)
    assert judged((name, "b"), tmp_path)["top1"] == 1


def test_a_label_is_one_short_line() -> None:
    for name in NAMES:
        label = label_of(name)
        assert len(label) <= LABEL_LENGTH
        assert "\n" not in label
    assert label_of("an ordinary class") == "an ordinary class"


def test_the_style_of_the_user_does_not_change_a_plot(tmp_path: Path) -> None:
    import matplotlib

    for folder in ("plain", "own"):
        (tmp_path / folder).mkdir()
    judged(("a", "b"), tmp_path / "plain")
    with matplotlib.rc_context({"font.size": 3, "axes.facecolor": "black", "text.usetex": True}):
        judged(("a", "b"), tmp_path / "own")
    plots = [(tmp_path / folder / "confusion.png").read_bytes() for folder in ("plain", "own")]
    assert plots[0] == plots[1]


def test_a_plot_that_cannot_be_written_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "confusion.png").mkdir()
    assert judged(("a", "b"), tmp_path)["top1"] == 1
    assert "the plot confusion.png is left out: IsADirectoryError" in caplog.text


def test_a_sheet_that_cannot_be_written_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "clusters.png").mkdir()
    labels = np.array([0, 0, 1, 1])
    pseudo_labelling.write_contact_sheet(image_set((), labels), labels, tmp_path / "clusters.png")
    assert "the plot clusters.png is left out" in caplog.text


def test_an_image_that_cannot_be_read_for_a_sheet_is_no_matter_of_the_plot(tmp_path: Path) -> None:
    def damaged(indices: Any) -> Any:
        raise ValueError("block 3 of the images is damaged")

    images = Images(size=2, count=4, labels=None, classes=(), read=damaged)
    with pytest.raises(ValueError, match="is damaged"):
        pseudo_labelling.write_contact_sheet(images, np.array([0, 0, 1, 1]), tmp_path / "clusters.png")


def test_half_a_plot_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with optional_plot(tmp_path / "half.png"):
        (tmp_path / "half.png").write_bytes(b"half")
        raise MemoryError("a figure of 10^9 pixels\nis too large")
    assert os.listdir(tmp_path) == []
    assert "half.png is left out: MemoryError: a figure of 10^9 pixels is too large" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "surroundings",
    [{"MPLBACKEND": "no_such_backend"}, {"MPLCONFIGDIR": "/proc/nowhere"}, {"HOME": "/nonexistent", "MPLCONFIGDIR": ""}],
    ids=["backend", "configuration", "home"],
)
def test_a_broken_matplotlib_of_the_user_costs_at_most_the_plot(surroundings: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, tests.test_plots as t\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "print(t.judged(('a', 'b'), out)['top1'], (out / 'confusion.png').exists())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **surroundings}
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    drawn = process.stdout.split()[1] == "True"
    assert process.stdout.split()[0] == "1.0"
    assert ("the plot confusion.png is left out" in process.stderr) != drawn
    assert len(process.stderr.splitlines()) == (0 if drawn else 1)
