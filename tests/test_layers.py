"""The package's architecture, read from its source: layers, where libraries are imported, names, sizes, docstrings."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable

import pytest

from ktray.plugins import GROUPS, kinds
from tests.source import (
    PACKAGE,
    ROOT,
    TESTS_AND_EXPERIMENTS,
    Module,
    bases,
    calls,
    functions,
    imports,
    ktray_imports,
    own_functions,
    part_of,
    top_level,
)

# From the bottom up; a module of the root that is not listed is a tool. `runs` lies above `search` because it runs the search
# logic, which must not know who runs it.
WORDS = {
    "spec",
    "strict",
    "plugins",
    "evaluation_presets",
    "fingerprint",
    "checksums",
    "artifact",
    "stores",
    "errors",
    "pool",
    "progress",
    "yaml_file",
    "text",
    "output",
    "redaction",
}
LAYERS = (
    ("words", WORDS),
    ("tools", {"ops", "training", "features", "clustering", "images", "export", "scoring", "classifiers", "fine_tuning"}),
    ("methods", set(GROUPS.values())),
    ("pipeline", {"pipeline", "stages", "cost_model"}),
    ("scheduler", {"scheduler"}),
    ("search", {"search", "tracking", "report"}),
    ("runs", {"runs"}),
    ("library", {"api", "__init__"}),
    ("command line", {"cli", "__main__"}),
)
LEVEL = {part: level for level, (_, parts) in enumerate(LAYERS) for part in parts}
TOOLS = 1

ONLY_IMPORTED_BY = {  # library -> the only parts of the package that may import it
    "ray": {"scheduler", "runs"},
    "optuna": {"search"},
    "mlflow": {"tracking"},
    "faiss": {"clustering"},
    "triton": {"clustering"},
}
MAY_BE_EXTENDED = {  # what a Spec may extend, and the Protocol of every plugin's Spec
    "ktray.strict.StrictSpec",
    "ktray.spec.EvaluationFields",
    "ktray.spec.KMeansFields",
    "ktray.plugins.PluginSpec",
}
SLOW_TO_IMPORT = {
    "torchvision",
    "cv2",
    "pycocotools",
    "sklearn",
    "skimage",
    "pyarrow",
    "matplotlib",
    "pandas",
    "timm",
    "mlflow",
}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "pydantic_core": "pydantic",
    "cv2": "opencv-contrib-python-headless",
}
RUN_BY_HAND = {"build"}  # makes a data set that comes with ktray
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
BANNED_IN_MODULE_NAMES = {
    *("util", "utils", "helper", "helpers", "common", "base", "manager", "managers", "misc"),
    *("encoder", "embedder", "embeddings", "feats", "prototypes", "proxy", "sweep"),
}
# Metaphors that once were names. Plain words that are also names of the field (such as "line" or "room") cannot be listed.
METAPHORS = {
    *("crew", "purse", "charter", "roster", "ledger", "leg", "patience", "cards", "openings", "mourn", "bury"),
    *("forsake", "forsaken", "dear", "rehearsal", "rehearse", "kitchen", "street", "desk", "house", "attendance"),
    *("hire", "hiring", "conductor", "vain", "wished", "prices"),
}


def level(module: Module) -> int:
    """The layer of a module, 0 is the lowest."""
    return LEVEL.get(module.part, TOOLS)


def plugin(module: Module) -> str | None:
    """The plugin that a module belongs to, such as ``evals.knn``; None outside the plugin folders."""
    return ".".join(module.parts[1:3]) if module.part in GROUPS.values() and len(module.parts) > 2 else None


# --- rules: module -> its violations


def imports_go_down(module: Module) -> list[str]:
    """A module imports only its own layer and those below."""
    return [
        f"belongs to the layer '{LAYERS[level(module)][0]}' and imports {other}, which lies above it"
        for other in ktray_imports(module)
        if LEVEL.get(part_of(other), TOOLS) > level(module)
    ]


def plugins_do_not_import_each_other(module: Module) -> list[str]:
    """A plugin does not import another plugin; it finds one through `plugins.module`."""
    if not plugin(module):
        return []
    others = [other for other in ktray_imports(module) if part_of(other) in GROUPS.values()]
    return [f"imports the plugin {other}" for other in others if ".".join(other.split(".")[1:3]) != plugin(module)]


def no_kind_is_named_outside_its_plugin(module: Module) -> list[str]:
    """Nothing outside a plugin's own file treats its kind specially, so that a new method is one file."""
    named = {
        kind for group in GROUPS if group != "transfer" for kind in kinds(group)
    }  # `labels` and `clusters` also name stages' inputs
    found = []
    for node in ast.walk(module.tree) if module.part not in GROUPS.values() else ():
        if isinstance(node, ast.Compare):
            constants = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            found += [f"compares with {kind!r} in {ast.unparse(node)}" for kind in sorted(named) if kind in constants]
    return found


def tools_and_methods_know_no_store(module: Module) -> list[str]:
    """Tools and methods work on arrays and local paths, not on stores or artifacts."""
    if level(module) not in (TOOLS, LEVEL["evals"]):
        return []
    return [f"imports {other}" for other in ktray_imports(module) if part_of(other) in ("stores", "artifact")]


def libraries_are_imported_in_one_place(module: Module) -> list[str]:
    """ray, optuna, mlflow, faiss and triton are only imported by the parts that own them."""
    libraries = {origin.split(".")[0] for origin, _ in imports(module)}
    return [
        f"imports {library}"
        for library in sorted(libraries & ONLY_IMPORTED_BY.keys())
        if module.part not in ONLY_IMPORTED_BY[library]
    ]


def search_logic_is_pure(module: Module) -> list[str]:
    """Search logic gets its clock injected, knows no cluster and computes no tensors."""
    if module.part != "search":
        return []
    libraries = {origin.split(".")[0] for origin, _ in imports(module)}
    found = [f"imports {library}" for library in sorted(libraries & {"ray", "torch", "mlflow"})]
    return found + [
        f"calls {text}()" for text, last, _ in calls(module) if text.startswith("time.") or last in ("now", "utcnow")
    ]


def slow_libraries_are_imported_lazily(module: Module) -> list[str]:
    """Libraries that are slow to import are imported inside the functions that need them."""
    found = []
    for node in top_level(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            libraries = {origin.split(".")[0] for origin, _ in imports(module, node)}
            found += [f"imports {library} when it is imported" for library in sorted(libraries & SLOW_TO_IMPORT)]
    return found


def only_plugins_imports_by_name(module: Module) -> list[str]:
    """Only `plugins` imports modules by name."""
    if module.name == "ktray.plugins":
        return []
    names = {name for _, name in imports(module)} | {last for _, last, _ in calls(module)}
    return [f"uses {name}" for name in sorted(names & {"import_module", "__import__"}, key=str)]


def only_the_training_loop_steps_optimisers(module: Module) -> list[str]:
    """Backward passes, optimiser steps and optimisers occur only in `training.loop`."""
    if module.name == "ktray.training.loop":
        return []
    found = [f"calls {text}()" for text, last, _ in calls(module) if "." in text and last in ("backward", "step")]
    return found + [f"imports {origin}" for origin, name in imports(module) if "torch.optim" in f"{origin}.{name}"]


def only_output_prints(module: Module) -> list[str]:
    """Only `output` prints, so that no name reaches a terminal with its control characters; rich gets `Text`."""
    if module.name == "ktray.output" or module.parts[-1] in RUN_BY_HAND:
        return []
    printing = ("print", "sys.stdout.write", "sys.stderr.write", "sys.__stderr__.write", "logging.basicConfig")
    found = [f"calls {text}()" for text, _, _ in calls(module) if text in printing]
    for text, last, node in calls(module):
        if last in ("add_row", "add_column") or text.endswith("console.print"):
            given = node.args[:1] if last == "add_column" else node.args
            found += [f"gives {text} {ast.unparse(each)}" for each in given if _may_be_markup(each)]
    return found


def _may_be_markup(node: ast.expr) -> bool:
    """Whether rich gets text of its own here that is no constant and was not made a `Text`."""
    if isinstance(node, ast.JoinedStr):
        return True
    if isinstance(node, ast.Starred):
        return "_as_text" not in ast.unparse(node)
    return False


def no_pickle_is_loaded(module: Module) -> list[str]:
    """No pickle is ever loaded, not even through torch or numpy."""
    errors = {"PickleError", "UnpicklingError"}
    found = [f"imports {o}.{n}" for o, n in imports(module) if o.split(".")[0] in PICKLES and n not in errors]
    for text, _, node in calls(module):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if text == "torch.load" and given.get("weights_only") != "True":
            found.append("calls torch.load without weights_only=True")
        if text in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            found.append("calls np.load without allow_pickle=False")
    return found


def classes_do_not_inherit_from_ours(module: Module) -> list[str]:
    """No class inherits from a class of ktray, except for the few bases of Specs."""
    return [
        f"{node.name} inherits from {base}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
        for base in bases(module, node)
        if base.startswith("ktray.") and base not in MAY_BE_EXTENDED
    ]


def functions_have_at_most_60_lines(module: Module) -> list[str]:
    """A function has at most 60 lines. There is no limit for files: one file holds one whole thing."""
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions(module)}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > 60]


def modules_are_imported_under_their_own_names(module: Module) -> list[str]:
    """Nothing of ktray is imported under another name: names are unique, so no alias is needed to tell two things apart."""
    found = []
    for node in ast.walk(module.tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            origin = alias.name if isinstance(node, ast.Import) else node.module or ""
            if origin.split(".")[0] == "ktray" and alias.asname not in (None, alias.name):
                found.append(f"imports {origin}.{alias.name} as {alias.asname}")
    return found


def names_are_meaningful(module: Module) -> list[str]:
    """No module for leftovers such as `utils`; no function named `get_...`, `do_...` or `process...`."""
    words = module.parts[-1].strip("_").split("_")
    found = [f"has {word!r} in its name" for word in words if word in BANNED_IN_MODULE_NAMES]
    for node in own_functions(module):
        first = node.name.strip("_").split("_")
        found += [f"{node.name} says too little"] if first[0] in ("get", "do", "process") else []
    return found


def names_are_not_metaphors(module: Module) -> list[str]:
    """No identifier that is defined in ktray is a metaphor: names are the standard terms of their field."""
    found = {name for name in defined_names(module) for word in words_of(name) if word in METAPHORS}
    return [f"defines {name}" for name in sorted(found)]


def defined_names(module: Module) -> set[str]:
    """Identifiers that a module defines: the module itself, classes, functions, parameters, variables and attributes."""
    names = {module.parts[-1]}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def words_of(name: str) -> list[str]:
    """The words of an identifier in snake_case or CamelCase, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def public_functions_name_their_arguments(module: Module) -> list[str]:
    """Public functions take no **kwargs."""
    inner = {id(node) for outer in functions(module) for node in ast.walk(outer) if node is not outer}
    public = (node for node in own_functions(module) if not node.name.startswith("_") and id(node) not in inner)
    return [f"{node.name} takes **{node.args.kwarg.arg}" for node in public if node.args.kwarg]


def public_names_are_documented(module: Module) -> list[str]:
    """Modules, public functions and public classes have docstrings."""
    found = [] if ast.get_docstring(module.tree) or not module.tree.body else ["has no docstring"]
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found += [] if ast.get_docstring(node) else [f"{node.name} has no docstring"]
    return found


RULES: list[Callable[[Module], list[str]]] = [
    imports_go_down,
    plugins_do_not_import_each_other,
    no_kind_is_named_outside_its_plugin,
    tools_and_methods_know_no_store,
    libraries_are_imported_in_one_place,
    search_logic_is_pure,
    slow_libraries_are_imported_lazily,
    only_plugins_imports_by_name,
    only_the_training_loop_steps_optimisers,
    only_output_prints,
    no_pickle_is_loaded,
    classes_do_not_inherit_from_ours,
    functions_have_at_most_60_lines,
    modules_are_imported_under_their_own_names,
    names_are_meaningful,
    names_are_not_metaphors,
    public_functions_name_their_arguments,
    public_names_are_documented,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    offences = [f"{module.name} {offence}" for module in PACKAGE for offence in rule(module)]
    assert not offences, "\n".join([rule.__doc__, *offences])


def test_no_module_name_occurs_twice():
    files = [module.parts[-1] for module in PACKAGE if not module.package]
    folders = [module.parts[-1] for module in PACKAGE if module.package]
    assert [name for name, count in Counter(files + folders).items() if count > 1] == []


def test_there_are_no_import_cycles():
    graph = {module.name: set(ktray_imports(module, runtime_only=True)) - {module.name} for module in PACKAGE}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_imports_of_functions_count_for_cycles_and_those_of_type_checkers_do_not():
    inside = module("ktray.runs.new", "def f():\n    from ktray.search import study")
    typed = module("ktray.runs.new", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ktray.search import study")
    assert list(ktray_imports(inside, runtime_only=True)) == ["ktray.search.study"]
    assert list(ktray_imports(typed, runtime_only=True)) == []
    assert list(ktray_imports(typed)) == ["ktray.search.study"]


@pytest.mark.parametrize(
    "subpackage",
    [module for module in PACKAGE if module.package and len(module.parts) == 2],
    ids=lambda module: module.name,
)
def test_every_subpackage_says_what_it_is_what_it_may_import_and_where_to_start(subpackage):
    text = ast.get_docstring(subpackage.tree) or ""
    assert re.search(r"\bimports?\b", text, re.IGNORECASE)
    assert re.search(r"\bstart\b", text, re.IGNORECASE)


def test_functions_of_tests_and_experiments_have_at_most_60_lines():
    offences = [
        f"{module.name} {offence}" for module in TESTS_AND_EXPERIMENTS for offence in functions_have_at_most_60_lines(module)
    ]
    assert not offences, "\n".join(offences)


def test_a_library_is_declared_if_and_only_if_it_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["timm"], *extras["onnx"], *extras["detection"]]
    declared = {re.split(r"[^\w-]", line)[0] for line in needed}
    found = {origin.split(".")[0] for module in PACKAGE for origin, _ in imports(module)}
    used = {DISTRIBUTIONS.get(name, name) for name in found - {"ktray", *sys.stdlib_module_names}}
    used -= {"triton"}  # comes with torch where there is CUDA, and is not needed elsewhere
    assert used | {"faiss-cpu"} == declared  # an agreed dependency that only the tests of k-means import


def test_the_lowest_layer_loads_without_heavy_libraries():
    words = [module.name for module in PACKAGE if level(module) == 0]
    heavy = sorted(SLOW_TO_IMPORT | ONLY_IMPORTED_BY.keys() | {"torch"})
    script = f"import sys, {', '.join(words)}; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


def module(name: str, source: str) -> Module:
    """A module that exists only in this test."""
    return Module(name, ast.parse(source), source.count("\n"))


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (imports_go_down, "ktray.training.loop", "from ktray.pipeline import graph"),
        (imports_go_down, "ktray.training.loop", "def f():\n    from ktray import stages"),
        (imports_go_down, "ktray.evals.new", "import ktray.scheduler"),
        (imports_go_down, "ktray.evals.new", "from ..scheduler import local"),
        (imports_go_down, "ktray.stages.new", "from ktray import load_student"),
        (imports_go_down, "ktray.stages.new", "import ktray\nktray.load_student()"),
        (imports_go_down, "ktray.pipeline.new", "from ktray.scheduler.core import SchedulerCore"),
        (imports_go_down, "ktray.api", "def run():\n    from ktray.cli.leaderboard import leaderboard"),
        (imports_go_down, "ktray.runs.new", "from ktray.api import SearchResult"),
        (plugins_do_not_import_each_other, "ktray.evals.new", "from ktray.evals import knn"),
        (plugins_do_not_import_each_other, "ktray.transfer.new", "from ktray.evals.knn import predict"),
        (no_kind_is_named_outside_its_plugin, "ktray.pipeline.new", "def f(spec):\n    return spec.kind == 'hog'"),
        (tools_and_methods_know_no_store, "ktray.training.loop", "from ktray.stores import Store"),
        (libraries_are_imported_in_one_place, "ktray.training.loop", "def f():\n    import ray.tune"),
        (libraries_are_imported_in_one_place, "ktray.runs.new", "from optuna import create_study"),
        (search_logic_is_pure, "ktray.search.new", "import torch"),
        (search_logic_is_pure, "ktray.search.new", "import time\ntime.monotonic()"),
        (slow_libraries_are_imported_lazily, "ktray.evals.new", "import sklearn.metrics"),
        (slow_libraries_are_imported_lazily, "ktray.evals.new", "try:\n    import torchvision\nexcept ImportError:\n    pass"),
        (only_plugins_imports_by_name, "ktray.training.loop", "from importlib import import_module"),
        (only_plugins_imports_by_name, "ktray.training.loop", "import importlib\nimportlib.import_module('os')"),
        (only_the_training_loop_steps_optimisers, "ktray.evals.new", "loss.backward()"),
        (only_the_training_loop_steps_optimisers, "ktray.evals.new", "from torch.optim import SGD"),
        (no_pickle_is_loaded, "ktray.training.loop", "import pickle"),
        (no_pickle_is_loaded, "ktray.training.loop", "torch.load(path)"),
        (no_pickle_is_loaded, "ktray.training.loop", "np.load(path, allow_pickle=True)"),
        (classes_do_not_inherit_from_ours, "ktray.errors", "class A(Exception): ...\nclass B(A): ..."),
        (classes_do_not_inherit_from_ours, "ktray.evals.new", "from ktray.spec import Student\nclass Spec(Student): ..."),
        (functions_have_at_most_60_lines, "ktray.new", "def f():\n" + "    1\n" * 60),
        (modules_are_imported_under_their_own_names, "ktray.api", "from ktray.search import search as searched"),
        (modules_are_imported_under_their_own_names, "ktray.api", "import ktray.search as searching"),
        (names_are_not_metaphors, "ktray.scheduler.new", "class JobLedger: ..."),
        (names_are_not_metaphors, "ktray.scheduler.new", "def f(crew_size): ..."),
        (names_are_meaningful, "ktray.train_utils", ""),
        (names_are_meaningful, "ktray.training.loop", "def get_model(): ..."),
        (public_functions_name_their_arguments, "ktray.training.loop", "def fit(**kwargs): ..."),
        (public_names_are_documented, "ktray.training.loop", "'''A module.'''\ndef fit(): ..."),
    ],
)
def test_a_rule_reports_a_violation(rule, name, source):
    assert rule(module(name, source))


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (imports_go_down, "ktray.evals.new", "from ktray import __version__, plugins\nfrom ktray.training.loop import fit"),
        (imports_go_down, "ktray.scheduler.new", "import ktray\nktray.__file__\nktray.training.loop.fit()"),
        (search_logic_is_pure, "ktray.search.new", "import time\ndef f(clock=time.monotonic):\n    clock()"),
        (plugins_do_not_import_each_other, "ktray.evals.new", "from ktray import plugins\nfrom ktray.evals.new import part"),
        (no_kind_is_named_outside_its_plugin, "ktray.pretext.new", "spec.kind == 'hog'"),
        (only_the_training_loop_steps_optimisers, "ktray.evals.new", "step()\ntask.after_step(model)"),
        (
            slow_libraries_are_imported_lazily,
            "ktray.evals.new",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sklearn",
        ),
        (
            no_pickle_is_loaded,
            "ktray.training.loop",
            "from pickle import UnpicklingError\ntorch.load(path, weights_only=True)",
        ),
        (classes_do_not_inherit_from_ours, "ktray.evals.new", "from ktray import strict\nclass Spec(strict.StrictSpec): ..."),
        (
            classes_do_not_inherit_from_ours,
            "ktray.evals.new",
            "from ktray.strict import StrictSpec\nclass Spec(StrictSpec): ...",
        ),
        (
            names_are_meaningful,
            "ktray.runs.new",
            "from ray.tune import Searcher\nclass A(Searcher):\n    def get_state(self): ...",
        ),
        (modules_are_imported_under_their_own_names, "ktray.images", "from ktray.images.decoding import decode as decode"),
        (modules_are_imported_under_their_own_names, "ktray.new", "import numpy as np"),
        (public_functions_name_their_arguments, "ktray.training.loop", "def _fit(**kwargs): ..."),
    ],
)
def test_a_rule_accepts_what_is_allowed(rule, name, source):
    assert not rule(module(name, source))
