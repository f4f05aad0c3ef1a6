"""The text of ``--help``, from a command's signature and its docstring.

A section of the docstring, such as ``Options:``, is shown under its name. If its entries are parameters, they are shown
as a user writes them (``--nodes=N``), with their default. The section ``Example:`` has command lines.
"""

import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

Command = Callable[..., Any]
_MOST_COLUMNS = 100
_INDENT = 28  # of descriptions
_SECTION = re.compile(r"^(\w[\w ]*):\n((?: {4}.*\n|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\w+): (.*\n(?: {5,}.*\n)*)", re.MULTILINE)
_VALUES = {int: "N", float: "X", str: "TEXT"}


def overview(program: str, groups: Mapping[str, Mapping[str, Command]]) -> str:
    """The help of a program: its commands under headings, each with the first line of its docstring."""
    blocks = [
        f"Usage: {program} COMMAND [ARGUMENTS]",
        "Trains language models with MoRA, ReMoRA, LoRA, or at full rank.",
    ]
    for title, commands in groups.items():
        lines = (_entry(name, str(inspect.getdoc(command)).partition("\n")[0]) for name, command in commands.items())
        blocks.append("\n".join([f"{title}:", *lines]))
    return "\n\n".join([*blocks, f"{program} COMMAND --help describes a command."])


def help_text(command: Command, name: str) -> str:
    """The help of one command; ``name`` is how it is called."""
    doc = f"{inspect.getdoc(command)}\n"
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters
    labels = {parameter.name: _label(parameter, hints[parameter.name]) for parameter in parameters.values()}
    words = [label for label in labels.values() if not label.startswith("-")]
    words += ["[OPTIONS]"] if any(each.kind is each.KEYWORD_ONLY for each in parameters.values()) else []
    words += [f"[{labels[each.name]} ...]" for each in parameters.values() if each.kind is each.VAR_KEYWORD]
    intro = _SECTION.sub("", doc).strip().split("\n\n")
    blocks = [" ".join(["Usage:", name, *words]), *(_wrapped(" ".join(paragraph.split())) for paragraph in intro)]
    for title, body in _SECTION.findall(doc):
        lines = [
            _entry(labels[entry], " ".join(text.split()) + _default(parameters[entry]))
            for entry, text in _ENTRY.findall(body)
            if entry in labels
        ]
        blocks.append("\n".join([f"{title}:", *(lines or [textwrap.indent(textwrap.dedent(body).strip(), "  ")])]))
    return "\n\n".join(blocks)


def _label(parameter: inspect.Parameter, hint: Any) -> str:
    """A parameter as a user writes it."""
    if parameter.kind is parameter.VAR_KEYWORD:
        return "--SECTION.KEY=VALUE"
    if parameter.kind is parameter.VAR_POSITIONAL:
        if get_origin(hint) is Annotated:
            return str(hint.__metadata__[0])
        return f"{parameter.name.upper().removesuffix('S')} ..."
    if parameter.kind is not parameter.KEYWORD_ONLY:
        return parameter.name.upper()
    kinds = list(plain_types(hint))
    if bool in kinds:
        return f"--{parameter.name}"
    return f"--{parameter.name}={'|'.join(_VALUES.get(kind, str(kind)) for kind in kinds)}"


def plain_types(hint: Any) -> Iterator[Any]:
    """The types or the literal values in a type, without None."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_args(hint):
        for part in get_args(hint):
            yield from plain_types(part)
    elif hint is not type(None):
        yield hint


def _default(parameter: inspect.Parameter) -> str:
    hidden = (parameter.empty, None, False, "")
    return "" if any(parameter.default is value for value in hidden) else f" (default: {parameter.default})"


def _entry(label: str, text: str) -> str:
    """A label and its description, which begins on a line of its own if the label is long."""
    indent = " " * _INDENT
    gap = indent[len(label) + 2 :] if len(label) + 4 <= _INDENT else f"\n{indent}"
    return f"  {label}{gap}{textwrap.indent(_wrapped(text, _INDENT), indent).lstrip()}"


def _wrapped(text: str, indent: int = 0) -> str:
    columns = min(_MOST_COLUMNS, shutil.get_terminal_size().columns)
    return textwrap.fill(text, max(20, columns - indent), break_on_hyphens=False, break_long_words=False)
