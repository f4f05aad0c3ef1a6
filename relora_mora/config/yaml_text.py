"""The YAML of settings: YAML 1.2 numbers, names as keys, no duplicate keys, and only plain values."""

import re
from typing import Any

import yaml

MOST_CHARACTERS = 1 << 22  # tens of thousands of sources still fit
_TAG = "tag:yaml.org,2002:"
# how YAML 1.2 reads text without quotes
_PATTERNS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+(_[0-9]+)*",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
_RESOLVERS = [(_TAG + kind, re.compile(f"({pattern})$")) for kind, pattern in _PATTERNS.items()]


class _Loader(yaml.SafeLoader):
    """Reads numbers (``4e-4`` is one, ``010`` is ten) and keys (``<<`` is an ordinary one) as in YAML 1.2.

    Refuses duplicate keys, loops of aliases, and values such as dates and sets.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        return self.construct_object(node, deep=True)  # type: ignore[no-untyped-call] # refuses loops

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(name, str) or name in seen:
                problem = f"duplicate key {name!r}" if isinstance(name, str) else f"the key {name!r} is not a name"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_PLAIN = (None, *(_TAG + kind for kind in (*_PATTERNS, "str", "seq", "map")))
_Loader.yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _PLAIN}
_Loader.yaml_implicit_resolvers = {None: _RESOLVERS}
_Loader.add_constructor(f"{_TAG}int", lambda _, node: int(str(node.value).replace("_", "")))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as another type."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds these Unicode line ends into spaces, but escapes them between double quotes
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _RESOLVERS}
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(tuple, _Dumper.represent_list)


def parse_yaml(text: str) -> Any:
    """YAML text as plain values.

    Raises yaml.YAMLError, also for other values and for more text than settings have.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"it is longer than {MOST_CHARACTERS:,} characters; settings never are")
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:  # PyYAML's, for a wrong tag
        raise yaml.YAMLError(str(error)) from error


def dump_yaml(value: Any) -> str:
    """Plain values as YAML text, which :func:`parse_yaml` reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def explain_yaml(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """What is wrong and where, without PyYAML's quote of the line, which may hold a part of a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    problem = " ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    return problem if mark is None else f"{problem} (line {mark.line + 1}, column {mark.column + 1})"
