"""Find the best teacher-student pair for learning without labels."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktray.api import SearchResult as SearchResult
    from ktray.api import load_student as load_student
    from ktray.api import run as run
    from ktray.api import search as search
else:
    # Python sets the attribute `ktray.search` to the package of that name, but only when the package is first loaded. So it is
    # loaded here (it is only a docstring), and the function of the same name takes its place for good.
    from ktray import search

    def search(*arguments: Any, **options: Any) -> Any:  # noqa: F811
        """Searches a space for the best pair: see `ktray.api.search`, which this loads and calls."""
        from ktray import api

        return api.search(*arguments, **options)


__version__ = "0.1.0"
_API = ("SearchResult", "load_student", "run")


def __getattr__(name: str) -> Any:
    """The Python API, loaded when it is first asked for: `import ktray` alone loads nothing heavy."""
    if name not in _API:
        raise AttributeError(f"module 'ktray' has no attribute {name!r}")
    from ktray import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
