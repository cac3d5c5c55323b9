"""Every command of the documentation runs, page after page in one folder, as a reader would type them.

A block of commands is left out only with `<!-- not run: why -->` above it. YAML and Python blocks that begin with the name of a
file as a comment become that file. The space `quickstart.yaml` is a smaller one under the same name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.source import ROOT

FIRST = "docs/quickstart.md"  # whose study other pages look at
PAGES = [FIRST, "docs/own_images.md", "docs/recipes.md", "docs/python.md", "docs/mlflow.md", "docs/clusters.md"]
PAGES += [*sorted({f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - set(PAGES)), "README.md", "CONTRIBUTING.md"]
BLOCK = re.compile(r"(^ *<!-- not run: [^>]+ -->\n+)?^( *)```(bash|yaml|python)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/.-]+\.(?:yaml|py))\n")
DATA = {"kind": "synthetic", "count": 300, "size": 28}


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    language: str
    text: str
    runs: bool

    @property
    def file(self) -> str | None:
        """The file that it becomes."""
        found = FILE.match(self.text)
        return found.group(1) if found else None


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(match.group(3), match.group(4), match.group(1) is None) for match in BLOCK.finditer(text)]


@dataclass
class Reader:
    """Somebody who types what the pages say."""

    folder: Path
    done: set[str] = field(default_factory=set)

    def read(self, page: str) -> None:
        if page in self.done:
            return
        self.done.add(page)
        for block in blocks(page):
            if block.file:
                self.write(block.file, block.text)
            if block.language == "bash" and block.runs:
                self.run(["bash", "-euo", "pipefail", "-c", block.text], page)
            elif block.language == "python" and block.file and page == "docs/python.md":
                self.run([sys.executable, block.file], page)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def run(self, words: list[str], page: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("KTRAY_", "MLFLOW_", "RAY_"))}
        given = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=self.folder, env=kept | given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page}: {words[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("reader")
    found = Reader(folder)
    found.write("bin/ktray", f'#!/usr/bin/env bash\nexec {sys.executable} -m ktray "$@"\n')
    (folder / "bin/ktray").chmod(0o755)
    found.write("search_spaces/quickstart.yaml", yaml.safe_dump(small_quickstart(), sort_keys=False))
    generator = np.random.default_rng(0)
    for number in range(240):
        pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        for place in (f"photos/{number % 3}/{number}.png", f"classes/{number % 4}/{number}.png"):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / place)
    return found


def small_quickstart() -> dict[str, Any]:
    """The space of the quick start on a few generated images, with short trainings, of which none is stopped."""
    space: dict[str, Any] = yaml.safe_load((ROOT / "search_spaces/quickstart.yaml").read_text())
    space["budget"] = {"trials": 2, "concurrent": 2}
    space["early_stop"] = None
    space["pair"]["data"] = DATA
    space["pair"]["student"]["schedule"]["epochs"] = 1
    space["pair"]["teacher"]["one_of"]["rotation"]["schedule"]["epochs"] = 1
    return space


@pytest.mark.parametrize("page", PAGES)
def test_every_block_that_is_not_run_says_why_and_the_others_are_found(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```bash$", text, re.MULTILINE)) == sum(block.language == "bash" for block in blocks(page))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, reader: Reader) -> None:
    reader.read(FIRST)
    reader.read(page)
