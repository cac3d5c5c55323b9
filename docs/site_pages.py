"""Pages of the documentation site that are not files of this folder: one per method, files of the root, linked sources.

MkDocs calls the functions named `on_...` while it builds the site (see .mkdocs.yml). A method's page comes from its docstring
and its Spec, so it is never out of date and never written by hand.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from ktray import plugins, spec

ROOT = Path(__file__).parent.parent
GROUPS = {  # group -> title of its page, what a kind of it is, and where it stands in a space
    "dataset": ("Data sets", "data"),
    "pretext": ("Pretext tasks", "teacher.pretext"),
    "descriptor": ("Descriptors", "teacher.descriptor"),
    "backbone": ("Networks", "student.backbone"),
    "transfer": ("Transfers", "transfer"),
    "evaluation": ("Evaluations", "evals"),
}
OF_THE_ROOT = {  # page -> file of the repository that it is made of
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "experiments/bench/README.md",
    "tables.md": "experiments/tables/README.md",
}
PATHS = {
    **{"folder": "/data/photos", "imagefolder": "/data/classes", "parquet": "/data/photos.parquet", "voc": "/data/VOCdevkit"},
    "webdataset": "/data/shards",
}
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
CODE = re.compile(r"^( *)(```+).*?^\1\2", re.DOTALL | re.MULTILINE)


# ---- what MkDocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the section `Reference` of the navigation."""
    sections = [
        {title: [_index_of(group), *(_page_of(group, kind) for kind in plugins.kinds(group))]}
        for group, (title, _) in GROUPS.items()
    ]
    named = set(_pages_in(config.nav))
    others = sorted(path.name for path in Path(config.docs_dir).glob("*.md") if path.name not in named)
    for entry in config.nav or ():
        if isinstance(entry, dict) and "Reference" in entry:
            entry["Reference"] = sections
        elif isinstance(entry, dict) and "Use" in entry:
            entry["Use"] += others  # a new page needs no line in .mkdocs.yml
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and copies of the repository's files that pages link to."""
    for uri, text in generated_pages().items():
        files.append(File.generated(config, uri, content=text))
    linked = set()
    for file in files.documentation_pages():
        linked |= {found for _, found in outside_links(file.content_string, origin(file.src_uri))}
    for path in sorted(linked):
        if path in OF_THE_ROOT.values():
            continue
        if (ROOT / path).is_dir():
            files.append(File.generated(config, copy_of(path), content=listing(path)))
        elif (ROOT / path).is_file():
            files.append(File.generated(config, copy_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files outside of docs/ to their pages or copies on the site."""
    return with_site_links(markdown, page.file.src_uri)


def _pages_in(nav: Any) -> Iterator[str]:
    """The pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _pages_in(entry)


# ---- links


def origin(uri: str) -> str:
    """The file of the repository that a page of the site comes from, whose links are relative to it."""
    return OF_THE_ROOT.get(uri, f"docs/{uri}")


def copy_of(path: str) -> str:
    """Where the site has a copy of this file of the repository, or a list of the files of this folder."""
    return f"files/{path.lstrip('.')}" + ("/files.txt" if (ROOT / path).is_dir() else "")


def listing(path: str) -> str:
    """The names of the files of a folder, one per line."""
    return "".join(f"{each.name}\n" for each in sorted((ROOT / path).glob("*.*")))


def outside_links(markdown: str, source: str) -> Iterator[tuple[str, str]]:
    """(target as written, path in the repository) of the links that lead to another file of the repository than a page."""
    for match in LINK.finditer(CODE.sub("", markdown)):
        target = match.group(2)
        if not re.match(r"\w+:|/", target):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            if not path.startswith("docs/"):
                yield target, path


def with_site_links(markdown: str, uri: str) -> str:
    """The page's text with links that hold on the site."""
    source, pages = origin(uri), {path: page for page, path in OF_THE_ROOT.items()}
    places = dict(outside_links(markdown, source))

    def replaced(match: re.Match[str]) -> str:
        start, target, anchor, end = match.group(1), match.group(2), match.group(3) or "", match.group(4)
        here = posixpath.dirname(uri)
        if target in places:
            path = places[target]
            return f"{start}{posixpath.relpath(pages.get(path) or copy_of(path), here)}{anchor}{end}"
        if source.startswith("docs/") or re.match(r"\w+:|/", target):
            return match.group(0)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target)).removeprefix("docs/")
        return f"{start}{posixpath.relpath(path, here)}{anchor}{end}"

    return LINK.sub(replaced, markdown)


# ---- pages


def generated_pages() -> dict[str, str]:
    """Page -> its markdown: one per group of methods, one per method, and those made of files of the root."""
    pages = {uri: (ROOT / path).read_text(encoding="utf-8") for uri, path in OF_THE_ROOT.items()}
    for group in GROUPS:
        pages[_index_of(group)] = _group_page(group)
        for kind in plugins.kinds(group):
            pages[_page_of(group, kind)] = method_page(group, kind)
    return pages


def _index_of(group: str) -> str:
    return f"reference/{plugins.GROUPS[group]}/index.md"


def _page_of(group: str, kind: str) -> str:
    return f"reference/{plugins.GROUPS[group]}/{kind}.md"


def _group_page(group: str) -> str:
    title, place = GROUPS[group]
    rows = [f"| [`{kind}`]({kind}.md) | {_cell(_paragraphs(group, kind)[0])} |" for kind in plugins.kinds(group)]
    return "\n".join(
        [f"# {title}", "", f"They stand under `{place}` of a pair.", "", "| kind | what it is |", "|---|---|", *rows, ""]
    )


def method_page(group: str, kind: str) -> str:
    """The page of one method: what its docstring says, how it is written in a space, its fields, its metrics or layers."""
    module = plugins.module(group, kind)
    said, of_spec = _paragraphs(group, kind), _paragraph_text(module.Spec.__doc__ or "")
    lines = [f"# {kind}", "", *_with_blank_lines(said), "## In a space", "", "```yaml", _example(group, kind), "```", ""]
    lines += [*of_spec, *_field_tables(_with_shared_descriptions(group, module.Spec.model_json_schema()))]
    if group == "evaluation":
        lines += _metrics(module)
    if group == "backbone":
        lines += _layers(module)
    return "\n".join(lines) + "\n"


def _paragraphs(group: str, kind: str) -> list[str]:
    return _paragraph_text(plugins.module(group, kind).__doc__ or "")


def _paragraph_text(doc: str) -> list[str]:
    return [re.sub(r"``(.+?)``", r"`\1`", part.strip()) for part in doc.strip().split("\n\n")]


def _with_blank_lines(paragraphs: list[str]) -> list[str]:
    return [line for part in paragraphs for line in (part, "")]


def _example(group: str, kind: str) -> str:
    """The shortest YAML with this kind: its name, or a mapping with the fields that have no default."""
    model = plugins.module(group, kind).Spec
    needed = {name: _sample(name, kind) for name, field in model.model_fields.items() if field.is_required()}
    value: Any = {"kind": kind, **needed} if needed else kind
    for step in reversed(GROUPS[group][1].split(".")):
        value = {step: [value] if step == "evals" else value}
    text: str = yaml.safe_dump(value, default_flow_style=None, sort_keys=False, width=120)
    return text.rstrip()


def _sample(name: str, kind: str) -> Any:
    samples: dict[str, Any] = {"backbone": "alexnet", "path": PATHS.get(kind, f"/data/{kind}"), "model": "resnet18", "k": 100}
    return samples.get(name, "...")


def _with_shared_descriptions(group: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with descriptions of the fields that every Spec of a group has, from the protocol that names them."""
    protocol = {"evaluation": spec.EvaluationPlugin, "dataset": spec.DataPlugin}.get(group)
    for name, field in schema.get("properties", {}).items():
        said = getattr(getattr(protocol, name, None), "__doc__", None)
        if said and not field.get("description"):
            field["description"] = said.replace("None", "null").rstrip(".")
    return schema


def _field_tables(schema: Mapping[str, Any]) -> list[str]:
    definitions = schema.get("$defs", {})
    lines = ["", "## Fields", "", *_fields(schema)]
    for name, inner in definitions.items():
        lines += ["", f"### {name}", "", *_with_blank_lines(_paragraph_text(inner.get("description", ""))), *_fields(inner)]
    return lines


def _fields(schema: Mapping[str, Any]) -> list[str]:
    needed = schema.get("required", ())
    rows = [
        f"| `{name}` | {_type(field)} | {'needed' if name in needed else _default(field)} | {_cell(_description(field))} |"
        for name, field in schema.get("properties", {}).items()
        if name != "kind" or "const" not in field
    ]
    return ["| field | value | default | |", "|---|---|---|---|", *rows] if rows else ["It has no fields."]


def _description(schema: Mapping[str, Any]) -> str:
    return str(schema.get("description", ""))


def _type(schema: Mapping[str, Any]) -> str:
    """A value's type and range in words: ``whole number, 8 to 2048``."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "kinds" in schema:
        return f"[a {schema['kinds']}](../{plugins.GROUPS[schema['kinds']]}/index.md)"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        entries = schema.get("items") or next(iter(schema.get("prefixItems", ())), {})
        return f"list of {_type(entries)}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`", "null": "`null`"}
    word = words.get(str(schema.get("type")), "as said")
    return ", ".join([word, *_range(schema)])


def _range(schema: Mapping[str, Any]) -> list[str]:
    def shown(value: float) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:,g}"

    names: dict[str, Callable[[Any], str]] = {
        "minimum": lambda value: f"from {shown(value)}",
        "exclusiveMinimum": lambda value: f"above {shown(value)}",
        "maximum": lambda value: f"to {shown(value)}",
        "exclusiveMaximum": lambda value: f"below {shown(value)}",
    }
    found = [say(schema[name]) for name, say in names.items() if name in schema]
    return [" ".join(found)] if found else []


def _default(schema: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(schema.get("default"), default_flow_style=True, sort_keys=False, width=1000)
    return f"`{text.removesuffix(chr(10)).removesuffix('...').strip()}`"


def _metrics(module: Any) -> list[str]:
    rows = [f"| `{name}` | {'higher' if way == 'max' else 'lower'} is better |" for name, way in module.DIRECTION.items()]
    needs = "It needs labels of the data that it judges." if module.NEEDS_LABELS else "It needs no labels."
    return ["", "## Metrics", "", needs, "", "| metric | |", "|---|---|", *rows]


def _layers(module: Any) -> list[str]:
    if any(field.is_required() for field in module.Spec.model_fields.values()):
        return []
    layers = module.build(module.Spec()).layers
    return [
        "",
        "## Layers",
        "",
        "With the defaults, from input to output: " + ", ".join(f"`{layer}`" for layer in layers) + ".",
    ]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
