"""Strict YAML: plain values only, no duplicate keys, and 1e-3 is a number. Errors name the line and the remedy."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ktray.errors import UserError

_DUPLICATE_KEY = "is there twice"
_REMEDIES = {  # what the parser says -> what to do
    "'\\t'": "Indent with spaces, not with tabs.",
    "<stream end>": "A bracket or a quote is not closed.",
    "',' or": "A bracket or a comma is missing, here or on the line above.",
    "constructor for the tag": "Write plain values; tags (!) are not supported.",
    "mapping values are not allowed": "Quote the text if it contains a colon, else check the indentation.",
    _DUPLICATE_KEY: "Leave one of them out.",
}


class _Loader(yaml.SafeLoader):
    """The safe loader, but it rejects duplicate keys and reads 1e-3 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    message = f"the key {key.value!r} {_DUPLICATE_KEY}"
                    raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; None if it is empty.

    Args:
        source: name of the text in errors, such as the path of the file.

    Raises:
        UserError: the text is not YAML, or has a duplicate key; it names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        message = str(getattr(error, "problem", None) or error)
        remedy = next((remedy for words, remedy in _REMEDIES.items() if words in message), "")
        problem = message if _DUPLICATE_KEY in message else f"this is not valid YAML: {message}"
        raise UserError(problem, f"{source}{line}", remedy) from error
