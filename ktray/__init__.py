"""Find the best teacher-student pair for learning without labels."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktray.api import BestTrial as BestTrial
    from ktray.api import PairResult as PairResult
    from ktray.api import SearchResult as SearchResult
    from ktray.api import load_student as load_student
    from ktray.api import open as open
    from ktray.api import run as run
    from ktray.api import search as search
else:
    # Python sets `ktray.search` to the package of that name once, when it is first loaded. It is loaded here (it is only a
    # docstring) and the attribute removed, so that `ktray.search` is always the function that `__getattr__` finds.
    from ktray import search

    del search

__version__ = "0.2.0"
__all__ = ["BestTrial", "PairResult", "SearchResult", "load_student", "open", "run", "search"]


def __getattr__(name: str) -> Any:
    """The Python API, loaded when it is first asked for: `import ktray` alone loads nothing heavy."""
    if name not in __all__:
        raise AttributeError(f"module 'ktray' has no attribute {name!r}")
    from ktray import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
