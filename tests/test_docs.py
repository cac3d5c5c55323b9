"""README and docs say what is true: commands parse, examples run, docs/layout.md names every file.

`python -m tests.test_docs` rewrites docs/layout.md.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from ktray.cli import _parser, main
from ktray.scheduler.resources import RuntimeSettings, load_runtime_settings
from tests.test_layers import RULES, module
from tests.toys import toy_spec

ROOT = Path(__file__).parent.parent
LAYOUT = ROOT / "docs" / "layout.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TREE = re.compile(r"(<!-- tree -->\n```text\n)(.*?)(```)", re.DOTALL)
FOLDERS = [
    *("", "stores", "ops", "images", "training", "features", "clustering", "export", "scoring", "classifiers", "fine_tuning"),
    *("datasets", "pretext", "descriptors", "backbones", "transfer", "evals"),
    *("stages", "pipeline", "cost_model", "scheduler", "search", "tracking", "report", "runs", "cli"),
]


def tree() -> str:
    """Every module of the package with the first line of its docstring."""
    lines = []
    for room in FOLDERS:
        folder = ROOT / "ktray" / room
        if room:
            lines.append(f"ktray/{room}/  {first_line(folder / '__init__.py')}")
        for path in sorted(folder.glob("*.py")):
            if path.name not in ("__init__.py", "__main__.py"):
                lines.append(f"  {path.name:22} {first_line(path)}" if room else f"ktray/{path.name:22} {first_line(path)}")
        for inner in sorted(folder.glob("*/__init__.py")) if room else []:
            lines.append(f"  {inner.parent.name + '/':22} {first_line(inner)}")
    for folder in ("search_spaces", "experiments"):
        lines.append(f"{folder}/")
        lines += [f"  {path.name:22} {first_line(path)}" for path in sorted((ROOT / folder).glob("*.*"))]
    return "\n".join(lines) + "\n"


def first_line(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text.splitlines()[0].lstrip("# ")
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


def blocks(language: str) -> list[str]:
    """The code blocks of this language in README and docs, page by page."""
    pages = [page.read_text(encoding="utf-8") for page in PAGES if page.exists()]
    return [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)]


def example(file: str) -> str:
    """The Python block that begins with the name of this file as a comment."""
    (found,) = [block for block in blocks("python") if block.startswith(f"# {file}\n")]
    return found


def test_every_folder_of_the_package_is_in_the_layout():
    folders = {path.name for path in (ROOT / "ktray").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(FOLDERS) - {""}


def test_the_layout_names_every_file_with_its_own_first_line():
    found = TREE.search(LAYOUT.read_text(encoding="utf-8"))
    assert found
    assert found.group(2) == tree(), "run: python -m tests.test_docs"


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1200
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


TRIAL = ROOT / "docs" / "trial.md"
PLACES = re.findall(r"`([\w/]+\.py): ([\w.]+)`", re.sub(r"\s+", " ", TRIAL.read_text(encoding="utf-8")))


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_every_function_on_the_path_of_a_trial_exists(file, name):
    body = ast.parse((ROOT / "ktray" / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [
            node
            for node in body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == part
        ]
        assert found, f"{file} has no {name}"
        body = found[0].body


def test_the_path_of_a_trial_names_functions_and_no_file_that_is_not_there():
    assert len(PLACES) > 30
    files = re.findall(r"`([\w/]+\.py)[`:]", TRIAL.read_text(encoding="utf-8"))
    assert [file for file in files if not (ROOT / "ktray" / file).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_pages_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    written = [link for link in links if not link.startswith(("http", "reference/"))]  # those are made with the site
    assert [link for link in written if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines() if line.startswith("ktray ")])
def test_every_command_in_the_docs_parses(line):
    words = shlex.split(line.partition(" > ")[0], comments=True)[1:]
    assert _parser().parse_args(words).run


def test_the_runtime_files_of_the_docs_are_valid(tmp_path):
    for block in (each for each in blocks("yaml") if each.startswith("# runtime")):
        path = tmp_path / "runtime.yaml"
        path.write_text(block)
        assert load_runtime_settings(path) != RuntimeSettings()


def test_the_errors_that_the_docs_explain_are_those_of_ktray():
    """A title of the page of questions in quotes is the text of an error, up to a value."""
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "ktray").rglob("*.py")))
    titles = re.findall(r"^## (\".+)$", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    quoted = [text for title in titles for text in re.findall(r'"(.+?)"', title)]
    assert len(quoted) > 5
    assert [text for text in quoted if text not in source] == []


def test_the_yaml_examples_are_valid_on_data_that_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    for number, block in enumerate(each for each in blocks("yaml") if not each.startswith("# runtime")):
        spec = yaml.safe_load(block)
        spec.get("pair", spec)["data"] = {"kind": "synthetic", "count": 300, "size": 32}
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(spec))
        assert main(["plan", str(path), "-q"]) == 0, capsys.readouterr().err


def test_the_pretext_task_of_the_docs_trains_as_a_plugin_from_outside(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    package = tmp_path / "docs_lab"
    package.mkdir()
    (package / "__init__.py").touch()
    code = example("mirror.py").replace('"mirror"', '"docs_lab.mirror"')
    (package / "mirror.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "")
    teacher = {
        "pretext": {"kind": "docs_lab.mirror"},
        "backbone": {"kind": "alexnet", "width": 0.125},
        "schedule": {"epochs": 1, "batch_size": 32},
    }
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(toy_spec(teacher=teacher)))
    assert main(["run", str(path), "--local"]) == 2
    assert "--allow-plugins docs_lab" in capsys.readouterr().err
    assert main(["run", str(path), "--local", "--allow-plugins", "docs_lab", "-q"]) == 0


def test_the_evaluation_of_the_docs_works_as_a_plugin_from_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    package = tmp_path / "docs_evals"
    package.mkdir()
    (package / "__init__.py").touch()
    code = example("centroid_accuracy.py").replace('"centroid_accuracy"', '"docs_evals.centroid_accuracy"')
    (package / "centroid_accuracy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("KTRAY_ALLOW_PLUGINS", "")
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(toy_spec(evals=[{"kind": "docs_evals.centroid_accuracy", "of": "teacher"}])))
    assert main(["run", str(path), "--local", "--allow-plugins", "docs_evals", "-q"]) == 0


@pytest.mark.parametrize(
    ("name", "file"),
    [("ktray.pretext.mirror", "mirror.py"), ("ktray.evals.centroid_accuracy", "centroid_accuracy.py")],
)
def test_the_plugins_of_the_docs_keep_the_rules_of_the_package(name, file):
    plugin = module(name, example(file))
    assert [offence for rule in RULES for offence in rule(plugin)] == []


if __name__ == "__main__":
    LAYOUT.write_text(
        TREE.sub(lambda m: m.group(1) + tree() + m.group(3), LAYOUT.read_text(encoding="utf-8")), encoding="utf-8"
    )
