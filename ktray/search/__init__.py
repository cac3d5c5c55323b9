"""Drawing pairs, stopping early, and remembering: pure search logic without Ray. Time is a clock that the caller brings.

The package is also the verb `ktray.search(...)`: Python gives `ktray` one attribute of that name, and importing this sets it.
"""

import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    """A package that can be called, which `ktray.api.search` then answers."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return sys.modules["ktray"].__getattr__("search")(*arguments, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (sys.modules["ktray"], "search")


sys.modules[__name__].__class__ = _Verb
