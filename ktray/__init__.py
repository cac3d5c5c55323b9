"""Find the best teacher-student pair for learning without labels."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktray.api import SearchResult as SearchResult
    from ktray.api import load_student as load_student
    from ktray.api import run as run
    from ktray.api import search as search

__version__ = "0.1.0"
_VERBS = ("SearchResult", "load_student", "run", "search")


def __getattr__(name: str) -> Any:
    """The Python API, loaded when it is first asked for: `import ktray` alone loads nothing."""
    if name not in _VERBS:
        raise AttributeError(f"module 'ktray' has no attribute {name!r}")
    from ktray import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_VERBS])
