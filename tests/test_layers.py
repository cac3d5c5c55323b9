"""The house's layout, read from the source: floors, desks, one place for each kind of work, sizes, names, docstrings."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable

import pytest

from ktray.plugins import ROOMS, kinds
from tests.source import (
    PACKAGE,
    ROOT,
    STREET,
    Module,
    bases,
    calls,
    functions,
    house_imports,
    imports,
    own_functions,
    part_of,
    top_level,
)

# From the ground up; a module of the package's top that is named nowhere is a tool. Drivers sit above the office, because they
# run the search's logic and search must not know who runs it.
FLOORS = (
    ("words", {"spec", "strict", "plugins", "fingerprint", "artifact", "stores", "errors", "pool", "progress", "yaml_file"}),
    ("tools", {"ops", "training", "features", "clustering", "images", "export"}),
    ("methods", set(ROOMS.values())),
    ("pipeline", {"pipeline", "stages", "cost_model"}),
    ("scheduler", {"scheduler"}),
    ("search", {"search", "tracking", "report"}),
    ("runs", {"runs"}),
    ("street", {"cli", "api", "__main__", "__init__"}),
)
LEVEL = {part: level for level, (_, parts) in enumerate(FLOORS) for part in parts}
TOOLS = 1

DESKS = {  # library -> parts of the package that may import it
    "ray": {"scheduler", "runs"},
    "optuna": {"search"},
    "mlflow": {"tracking"},
    "faiss": {"clustering"},
    "triton": {"clustering"},
}
SLOW_TO_IMPORT = {"torchvision", "sklearn", "skimage", "pyarrow", "matplotlib", "pandas", "timm", "mlflow"}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "pydantic_core": "pydantic"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
BANNED_IN_MODULE_NAMES = {
    *("util", "utils", "helper", "helpers", "common", "base", "manager", "managers", "misc"),
    *("encoder", "embedder", "embeddings", "feats", "prototypes", "proxy", "sweep"),
}


def level(module: Module) -> int:
    """The floor of a module."""
    return LEVEL.get(module.part, TOOLS)


def plugin(module: Module) -> str | None:
    """``evals.knn`` for everything that belongs to that plugin."""
    return ".".join(module.parts[1:3]) if module.part in ROOMS.values() and len(module.parts) > 2 else None


# --- the rules: module -> what is wrong with it


def imports_go_down(module: Module) -> list[str]:
    """A module imports its own floor and those below."""
    return [
        f"is on the floor '{FLOORS[level(module)][0]}' and imports {other}, above it"
        for other in house_imports(module)
        if LEVEL.get(part_of(other), TOOLS) > level(module)
    ]


def plugins_are_strangers(module: Module) -> list[str]:
    """A plugin imports no other plugin; it reaches one by `plugins.module`."""
    if not plugin(module):
        return []
    others = [other for other in house_imports(module) if part_of(other) in ROOMS.values()]
    return [f"imports the plugin {other}" for other in others if ".".join(other.split(".")[1:3]) != plugin(module)]


def the_house_names_no_method(module: Module) -> list[str]:
    """Nothing outside its own file treats one kind otherwise than all of its room: a new method is one file."""
    named = {kind for room in ROOMS if room != "transfer" for kind in kinds(room)}  # `labels` and `clusters` are stages' words
    found = []
    for node in ast.walk(module.tree) if module.part not in ROOMS.values() else ():
        if isinstance(node, ast.Compare):
            constants = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            found += [f"asks for {kind!r} in {ast.unparse(node)}" for kind in sorted(named) if kind in constants]
    return found


def methods_know_no_store(module: Module) -> list[str]:
    """Tools and methods work on arrays and local paths."""
    if level(module) not in (TOOLS, LEVEL["evals"]):
        return []
    return [f"imports {other}" for other in house_imports(module) if part_of(other) in ("stores", "artifact")]


def libraries_stay_at_their_desks(module: Module) -> list[str]:
    """ray, optuna, mlflow, faiss and triton are each imported in one place."""
    libraries = {origin.split(".")[0] for origin, _ in imports(module)}
    return [f"imports {library}" for library in sorted(libraries & DESKS.keys()) if module.part not in DESKS[library]]


def search_is_pure(module: Module) -> list[str]:
    """Search logic has its clock injected, knows no cluster and computes nothing."""
    if module.part != "search":
        return []
    libraries = {origin.split(".")[0] for origin, _ in imports(module)}
    found = [f"imports {library}" for library in sorted(libraries & {"ray", "torch", "mlflow"})]
    return found + [
        f"calls {text}()" for text, last, _ in calls(module) if text.startswith("time.") or last in ("now", "utcnow")
    ]


def slow_imports_wait(module: Module) -> list[str]:
    """What takes long to import is imported by the function that needs it."""
    found = []
    for node in top_level(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            libraries = {origin.split(".")[0] for origin, _ in imports(module, node)}
            found += [f"imports {library} when it is imported" for library in sorted(libraries & SLOW_TO_IMPORT)]
    return found


def one_import_module(module: Module) -> list[str]:
    """Only `plugins` imports by name."""
    if module.name == "ktray.plugins":
        return []
    names = {name for _, name in imports(module)} | {last for _, last, _ in calls(module)}
    return [f"uses {name}" for name in sorted(names & {"import_module", "__import__"}, key=str)]


def one_file_steps_optimisers(module: Module) -> list[str]:
    """Backward passes, steps and optimisers are the business of `train`."""
    if module.name == "ktray.training.loop":
        return []
    found = [f"calls {text}()" for text, last, _ in calls(module) if "." in text and last in ("backward", "step")]
    return found + [f"imports {origin}" for origin, name in imports(module) if "torch.optim" in f"{origin}.{name}"]


def nothing_is_unpickled(module: Module) -> list[str]:
    """No pickle is ever loaded, not through torch or numpy either."""
    errors = {"PickleError", "UnpicklingError"}
    found = [f"imports {o}.{n}" for o, n in imports(module) if o.split(".")[0] in PICKLES and n not in errors]
    for text, _, node in calls(module):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if text == "torch.load" and given.get("weights_only") != "True":
            found.append("calls torch.load without weights_only=True")
        if text in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            found.append("calls np.load without allow_pickle=False")
    return found


def classes_are_flat(module: Module) -> list[str]:
    """No class continues a class of ours, `StrictSpec` excepted."""
    return [
        f"{node.name} continues {base}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
        for base in bases(module, node)
        if base.startswith("ktray.") and base != "ktray.strict.StrictSpec"
    ]


def functions_are_short(module: Module) -> list[str]:
    """At most 60 lines per function; a file is as long as the one thing that it is about."""
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions(module)}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > 60]


def names_say_something(module: Module) -> list[str]:
    """No module of leftovers, no `get_`, `do_` or `process`."""
    words = module.parts[-1].strip("_").split("_")
    found = [f"has {word!r} in its name" for word in words if word in BANNED_IN_MODULE_NAMES]
    for node in own_functions(module):
        first = node.name.strip("_").split("_")
        found += [f"{node.name} is no name"] if first[0] in ("get", "do", "process") else []
    return found


def public_functions_name_their_arguments(module: Module) -> list[str]:
    """No **kwargs in public functions."""
    inner = {id(node) for outer in functions(module) for node in ast.walk(outer) if node is not outer}
    public = (node for node in own_functions(module) if not node.name.startswith("_") and id(node) not in inner)
    return [f"{node.name} takes **{node.args.kwarg.arg}" for node in public if node.args.kwarg]


def what_is_public_is_documented(module: Module) -> list[str]:
    """Modules and their public functions and classes have docstrings."""
    found = [] if ast.get_docstring(module.tree) or not module.tree.body else ["has no docstring"]
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found += [] if ast.get_docstring(node) else [f"{node.name} has no docstring"]
    return found


RULES: list[Callable[[Module], list[str]]] = [
    *(imports_go_down, plugins_are_strangers, the_house_names_no_method, methods_know_no_store),
    *(libraries_stay_at_their_desks, search_is_pure),
    *(slow_imports_wait, one_import_module, one_file_steps_optimisers, nothing_is_unpickled, classes_are_flat),
    *(functions_are_short, names_say_something, public_functions_name_their_arguments, what_is_public_is_documented),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    offences = [f"{module.name} {offence}" for module in PACKAGE for offence in rule(module)]
    assert not offences, "\n".join([rule.__doc__, *offences])


def test_tests_and_experiments_are_short_too():
    offences = [f"{module.name} {offence}" for module in STREET for offence in functions_are_short(module)]
    assert not offences, "\n".join(offences)


def test_a_library_is_declared_if_and_only_if_it_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["timm"], *extras["onnx"]]
    declared = {re.split(r"[^\w-]", line)[0] for line in needed}
    found = {origin.split(".")[0] for module in PACKAGE for origin, _ in imports(module)}
    used = {DISTRIBUTIONS.get(name, name) for name in found - {"ktray", *sys.stdlib_module_names}}
    assert used | {"faiss-cpu"} == declared  # of the agreed stack, and imported by the tests of k-means alone


def test_the_words_load_without_the_heavy_libraries():
    words = [module.name for module in PACKAGE if level(module) == 0]
    heavy = sorted(SLOW_TO_IMPORT | DESKS.keys() | {"torch"})
    script = f"import sys, {', '.join(words)}; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


def module(name: str, source: str) -> Module:
    """A module that is not in the tree."""
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
        (plugins_are_strangers, "ktray.evals.new", "from ktray.evals import knn"),
        (plugins_are_strangers, "ktray.transfer.new", "from ktray.evals.knn import predict"),
        (the_house_names_no_method, "ktray.pipeline.new", "def f(spec):\n    return spec.kind == 'hog'"),
        (methods_know_no_store, "ktray.training.loop", "from ktray.stores import Store"),
        (libraries_stay_at_their_desks, "ktray.training.loop", "def f():\n    import ray.tune"),
        (libraries_stay_at_their_desks, "ktray.runs.new", "from optuna import create_study"),
        (search_is_pure, "ktray.search.new", "import torch"),
        (search_is_pure, "ktray.search.new", "import time\ntime.monotonic()"),
        (slow_imports_wait, "ktray.evals.new", "import sklearn.metrics"),
        (slow_imports_wait, "ktray.evals.new", "try:\n    import torchvision\nexcept ImportError:\n    pass"),
        (one_import_module, "ktray.training.loop", "from importlib import import_module"),
        (one_import_module, "ktray.training.loop", "import importlib\nimportlib.import_module('os')"),
        (one_file_steps_optimisers, "ktray.evals.new", "loss.backward()"),
        (one_file_steps_optimisers, "ktray.evals.new", "from torch.optim import SGD"),
        (nothing_is_unpickled, "ktray.training.loop", "import pickle"),
        (nothing_is_unpickled, "ktray.training.loop", "torch.load(path)"),
        (nothing_is_unpickled, "ktray.training.loop", "np.load(path, allow_pickle=True)"),
        (classes_are_flat, "ktray.errors", "class A(Exception): ...\nclass B(A): ..."),
        (classes_are_flat, "ktray.evals.new", "from ktray.spec import Student\nclass Spec(Student): ..."),
        (functions_are_short, "ktray.new", "def f():\n" + "    1\n" * 60),
        (names_say_something, "ktray.train_utils", ""),
        (names_say_something, "ktray.training.loop", "def get_model(): ..."),
        (public_functions_name_their_arguments, "ktray.training.loop", "def fit(**kwargs): ..."),
        (what_is_public_is_documented, "ktray.training.loop", "'''A module.'''\ndef fit(): ..."),
    ],
)
def test_a_rule_notices_what_breaks_it(rule, name, source):
    assert rule(module(name, source))


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (imports_go_down, "ktray.evals.new", "from ktray import __version__, plugins\nfrom ktray.training.loop import fit"),
        (imports_go_down, "ktray.scheduler.new", "import ktray\nktray.__file__\nktray.training.loop.fit()"),
        (search_is_pure, "ktray.search.new", "import time\ndef f(clock=time.monotonic):\n    clock()"),
        (plugins_are_strangers, "ktray.evals.new", "from ktray import plugins\nfrom ktray.evals.new import part"),
        (the_house_names_no_method, "ktray.pretext.new", "spec.kind == 'hog'"),
        (one_file_steps_optimisers, "ktray.evals.new", "step()\ntask.after_step(model)"),
        (slow_imports_wait, "ktray.evals.new", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sklearn"),
        (
            nothing_is_unpickled,
            "ktray.training.loop",
            "from pickle import UnpicklingError\ntorch.load(path, weights_only=True)",
        ),
        (classes_are_flat, "ktray.evals.new", "from ktray import strict\nclass Spec(strict.StrictSpec): ..."),
        (classes_are_flat, "ktray.evals.new", "from ktray.strict import StrictSpec\nclass Spec(StrictSpec): ..."),
        (
            names_say_something,
            "ktray.runs.new",
            "from ray.tune import Searcher\nclass A(Searcher):\n    def get_state(self): ...",
        ),
        (public_functions_name_their_arguments, "ktray.training.loop", "def _fit(**kwargs): ..."),
    ],
)
def test_a_rule_lets_pass_what_is_right(rule, name, source):
    assert not rule(module(name, source))
