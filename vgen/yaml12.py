"""YAML as version 1.2 reads it (its core schema, https://yaml.org/spec/1.2.2/#103-core-schema).

PyYAML reads version 1.1, where `no`, `off` and `y` are false or true, `12:30` is 750, `010` is 8, `1e-3` is text and `2026-11-28` a date.
Here they are what they look like: words, numbers, and null.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_KINDS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema's kinds of scalars; a key that comes twice is an error."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is no word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} comes twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def integer(self, node: yaml.ScalarNode) -> int:
        text = node.value
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def number(self, node: yaml.ScalarNode) -> float:
        return float(re.sub(r"\.(?=[iInN])", "", node.value))


for _kind, _pattern in _KINDS.items():
    # fullmatch: PyYAML asks with `match`.
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern.pattern})\Z"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)


def load(text: str) -> Any:
    """The content of one YAML document. Raises yaml.YAMLError when it is broken, holds a key twice, or one that is no word."""
    return yaml.load(text, _Loader)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version would take for something else than text."""


for _kind, _pattern in _KINDS.items():
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern.pattern})\Z"), None)


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """In the other styles PyYAML writes these characters as they are, and reads them as line breaks."""
    style = '"' if any(character in value for character in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)


_Dumper.add_representer(str, _text)


def dump(value: Any) -> str:
    """`value` as YAML that `load`, and readers of version 1.1, read as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
