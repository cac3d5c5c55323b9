"""The README of an exported student: what it is, what it is worth, and eight lines that run beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktray.text import visible_name

FILE = "README.md"

# Each in eight lines, run in the folder of the student; the tests run them as they are.
_PIXELS = """\
image = ImageOps.fit(Image.open("photo.png").convert("RGB"), ({size}, {size}), Image.Resampling.BILINEAR)
images = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25  # (1, 3, {size}, {size}) float32
"""
_WEIGHTS = f"""\
import ktray
import numpy as np
import torch
from PIL import Image, ImageOps
{_PIXELS}features = ktray.load_student(".")(images)
print(features.shape)  # (1, {{width}})
"""
_PT2 = f"""\
import numpy as np
import torch
from PIL import Image, ImageOps
{_PIXELS}program = torch.export.load("model.pt2").module()
features = program(images)
print(features.shape)  # (1, {{width}})
"""
_ONNX = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps
image = ImageOps.fit(Image.open("photo.png").convert("RGB"), ({size}, {size}), Image.Resampling.BILINEAR)
images = (np.array(image, np.float32).transpose(2, 0, 1)[None] / 255 - 0.5) / 0.25  # (1, 3, {size}, {size}) float32
session = onnxruntime.InferenceSession("model.onnx")
features = session.run(None, {{"images": images.astype(np.float32)}})[0]
print(features.shape)  # (1, {width})
"""
_PT2_FROM_PIXELS = """\
import numpy as np
import torch
from PIL import Image
image = Image.open("photo.png").convert("RGB")
images = torch.from_numpy(np.array(image))[None]  # (1, height, width, 3) uint8 of any size
program = torch.export.load("model.pt2").module()
features = program(images)
print(features.shape)  # (1, {width})
"""
_ONNX_FROM_PIXELS = """\
import numpy as np
import onnxruntime
from PIL import Image
image = Image.open("photo.png").convert("RGB")
images = np.array(image)[None]  # (1, height, width, 3) uint8 of any size
session = onnxruntime.InferenceSession("model.onnx")
features = session.run(None, {{"images": images}})[0]
print(features.shape)  # (1, {width})
"""
_LINES = {
    ("safetensors", False): _WEIGHTS,
    ("pt2", False): _PT2,
    ("onnx", False): _ONNX,
    ("pt2", True): _PT2_FROM_PIXELS,
    ("onnx", True): _ONNX_FROM_PIXELS,
}


def readme(card: Mapping[str, Any], form: str, from_pixels: bool) -> str:
    """The text of the file, in Markdown.

    Args:
        card: the content of ``student.json``.
        form: "safetensors", "pt2" or "onnx".
        from_pixels: whether the program includes the preprocessing.
    """
    lineage, size = card["lineage"], card["input"]["size"][0]
    classes = card["head"]["classes"] if card["head"] else None
    width = card["feature_dim"] if classes is None or form == "safetensors" else classes
    origin = []
    if {"trial", "study", "pair"} <= set(lineage):
        origin = [f"Trial {lineage['trial']} of the study `{_plain(lineage['study'])}`: `{_plain(lineage['pair'])}`."]
    worth = _table(card["metrics"], lineage.get("test", {}), str(lineage.get("trial")))
    weights = [f"{_plain(name)}: {_plain(licence)}" for name, licence in lineage.get("licences", {}).items()]
    licences = ["", f"It rests on pretrained weights with their own licences: {'; '.join(weights)}."] if weights else []
    preprocessing = (
        f"The program takes RGB images as they are decoded, cuts out the centred square, resizes it to {size} pixels and "
        "normalises it, as in training."
        if from_pixels
        else f"Images are {size} pixels square, RGB, in [0, 1], normalised by the mean 0.5 and the standard deviation 0.25."
    )
    return "\n".join(
        [
            "# A student of ktray",
            "",
            *origin,
            preprocessing,
            *licences,
            "",
            "```python",
            _LINES[form, from_pixels].format(size=size, width=width).rstrip("\n"),
            "```",
            "",
            *worth,
            "`student.json` has its architecture, the keys of its stages and all its metrics.",
            "",
        ]
    )


def _table(metrics: Mapping[str, Any], test: Mapping[str, Any], trial: str) -> list[str]:
    """What it reached, with the references on the test split where they were judged."""
    rows = [f"| {_plain(name)} | {value:.4f} |" for name, value in metrics.items() if _is_a_score(name, value)]
    found = ["| on the images it was chosen by | |", "|---|---|", *rows, ""] if rows else []
    judged = []
    for name, result in test.items():
        for metric, value in result["metrics"].items():
            error = result.get("errors", {}).get(metric)
            if isinstance(value, float):
                spread = "" if error is None else f" ± {error:.4f}"
                judged.append(
                    f"| {'this student' if name == trial else _plain(name)}, {_plain(metric)} | {value:.4f}{spread} |"
                )
    return [*found, *(["| on the test split | |", "|---|---|", *judged, ""] if judged else [])]


def _is_a_score(name: str, value: Any) -> bool:
    return isinstance(value, float) and not name.startswith(("cost/", "student/", "clusters/", "pseudo_labels/", "teacher/"))


def _plain(text: Any) -> str:
    """A name in one line, which neither ends the code nor the cell that it stands in."""
    return visible_name(text).replace("`", "'").replace("|", "\\|").replace("<", "&lt;")
