"""The documentation site: it builds without a warning, every link on it leads somewhere, and it needs no network."""

from __future__ import annotations

import posixpath
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from ktray.plugins import GROUPS, kinds
from tests.source import ROOT

pytestmark = pytest.mark.slow


class _Page(HTMLParser):
    """Links, anchors and loaded files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.anchors, self.loaded = set[str](), set[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name == "href" and value and tag == "a":
                self.links.add(value)
            elif value and ((name == "src") or (name == "href" and tag == "link")):
                self.loaded.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".mkdocs.yml", "--site-dir", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    return folder


def pages(site: Path) -> dict[str, _Page]:
    return {
        str(path.relative_to(site)): _Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
        if path.name != "404.html"  # its links are those of the root of a server
    }


def test_every_link_of_the_site_leads_to_a_file_and_to_an_anchor_in_it(site: Path) -> None:
    found, dead = pages(site), []
    for name, page in found.items():
        for link in sorted(page.links | page.loaded):
            if link.startswith(("http:", "https:", "mailto:", "data:", "javascript:")):
                continue
            target, _, anchor = link.partition("#")
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(target))) if target else name
            known = (site / path).is_file()
            if not known or (anchor and path in found and unquote(anchor) not in found[path].anchors):
                dead.append(f"{name}: {link}")
    assert len(found) > 60
    assert dead == []


def test_the_site_loads_nothing_from_the_network(site: Path) -> None:
    remote = {
        f"{name}: {each}" for name, page in pages(site).items() for each in page.loaded if each.startswith(("http", "//"))
    }
    assert {each for each in remote if not each.endswith("canonical")} == set()


def test_every_method_has_a_page_with_its_source(site: Path) -> None:
    for group, folder in GROUPS.items():
        for kind in kinds(group):
            text = (site / "reference" / folder / f"{kind}.html").read_text(encoding="utf-8")
            assert "Source:" in text, (group, kind)
            assert "Fields" in text or "no fields" in text, (group, kind)
