"""The project's source as syntax trees: imports, calls, functions and base classes of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Module:
    """One source file: dotted name (packages without `.__init__`), syntax tree, number of lines."""

    name: str
    tree: ast.Module
    lines: int
    package: bool = False

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")

    @property
    def part(self) -> str:
        """The top-level part of the package that it belongs to: a subpackage such as ``evals``, or a root module."""
        return part_of(self.name)


def part_of(name: str) -> str:
    """The top-level part of ktray that a dotted name belongs to; ``__init__`` for `ktray` itself."""
    return [*name.split("."), "__init__"][1]


def parse(path: Path) -> Module:
    """The module in a file of the project."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    package = parts[-1] == "__init__"
    source = path.read_text()
    return Module(".".join(parts[:-1] if package else parts), ast.parse(source), source.count("\n"), package)


PACKAGE = [parse(path) for path in sorted(ROOT.glob("ktray/**/*.py"))]
TESTS_AND_EXPERIMENTS = [parse(path) for folder in ("tests", "experiments") for path in sorted(ROOT.glob(f"{folder}/**/*.py"))]
NAMES = {module.name for module in PACKAGE}


def imports(module: Module, tree: ast.AST | None = None) -> Iterator[tuple[str, str | None]]:
    """(dotted module, imported name or None) of every import, also inside functions."""
    for node in ast.walk(tree or module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = module.parts[: len(module.parts) - node.level + module.package]
                origin = ".".join([*above, *filter(None, [node.module])])
            yield from ((origin, alias.name) for alias in node.names)


def ktray_imports(module: Module, runtime_only: bool = False) -> Iterator[str]:
    """Dotted names of the ktray modules that a module imports; ``ktray`` itself where it uses the public API.

    Args:
        runtime_only: without the imports under ``if TYPE_CHECKING``.
    """
    tree = _Runtime().visit(ast.parse(ast.unparse(module.tree))) if runtime_only else module.tree
    for origin, name in imports(module, tree):
        if origin.split(".")[0] != "ktray":
            continue
        inner = f"{origin}.{name}"
        if inner in NAMES or origin != "ktray":
            yield inner if inner in NAMES else origin
        elif name and not name.startswith("__"):
            yield origin
    reads = (node for node in ast.walk(module.tree) if isinstance(node, ast.Attribute))
    used = {node.attr for node in reads if isinstance(node.value, ast.Name) and node.value.id == "ktray"}
    yield from ("ktray" for attribute in used if not attribute.startswith("__") and f"ktray.{attribute}" not in NAMES)


class _Runtime(ast.NodeTransformer):
    """Removes the branches that only type checkers read."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else node


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run at import, without those under ``if TYPE_CHECKING``."""
    statements: list[ast.stmt] = list(tree.body)
    for node in statements:
        if isinstance(node, ast.If | ast.Try) and "TYPE_CHECKING" not in ast.unparse(node).splitlines()[0]:
            statements += [*node.body, *node.orelse]
        yield node


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method, nested ones too."""
    yield from (node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def own_functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions whose names are our choice: not methods of classes that inherit from a library's class."""
    foreign = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and not all(base.startswith("ktray.") for base in bases(module, node)):
            foreign |= {id(part) for part in node.body}
    yield from (node for node in functions(module) if id(node) not in foreign)


def bases(module: Module, node: ast.ClassDef) -> list[str]:
    """Dotted names of a class's bases, resolved through the module's imports and classes."""
    known = {other.name: f"{module.name}.{other.name}" for other in module.tree.body if isinstance(other, ast.ClassDef)}
    for part in ast.walk(module.tree):
        if isinstance(part, ast.ImportFrom):
            for alias in part.names:
                name = alias.asname or alias.name
                if name == node.name or name not in known:
                    known[name] = f"{part.module}.{alias.name}"
    found = []
    for base in node.bases:
        first, _, rest = ast.unparse(base.value if isinstance(base, ast.Subscript) else base).partition(".")
        found.append(".".join(filter(None, [known.get(first, first), rest])))
    return found


def calls(module: Module) -> Iterator[tuple[str, str, ast.Call]]:
    """(source of the called expression, its last name, the call) of every call."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            yield text, text.rsplit(".", 1)[-1], node
