"""Reads a command's arguments with fire, and refuses all bad arguments before the command starts.

This module changes what fire does by itself:

- fire calls the command and complains about stray arguments afterwards: here it calls a stand-in;
- fire turns ``1e5`` into a float and ``a,b`` into a tuple: here arguments stay text unless annotated otherwise;
- fire treats ``-`` and ``--`` as separators, and uses the last value of a repeated flag: here both are refused;
- fire shows help in a pager, on stderr: here ``help.py`` makes a text that is printed.
"""

import contextlib
import difflib
import functools
import inspect
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Le

from relora_mora.cli.help import Command
from relora_mora.system.files import from_home

PositiveInt = Annotated[int, Ge(1)]  # types of commands' parameters
NonNegativeInt = Annotated[int, Ge(0)]
Processes = Annotated[int, Ge(1), Le(1024)]
Precision = Literal["float32", "bfloat16", "float16"]


def read_arguments(command: Command, argv: Iterable[str], name: str) -> inspect.BoundArguments:
    """The values to call ``command`` with; raises ConfigError with all faults of the command line."""
    words = without_local_rank(argv)
    hints = get_type_hints(command, include_extras=True)
    given, faults = _with_values(words, get_type_hints(command))
    _raise([*_faults_of_words(words, name), *_unknown_flags(command, words, name), *faults])
    arguments = _parsed(command, given, name)
    values = arguments.arguments
    for parameter in arguments.signature.parameters.values():
        if parameter.name in values and parameter.kind is not parameter.VAR_KEYWORD:
            try:
                values[parameter.name] = _typed(values[parameter.name], hints.get(parameter.name, str))
            except ValueError as error:
                faults.append(f"--{parameter.name}: {error}; see --help")
    _raise(faults)
    return arguments


def _raise(faults: list[str]) -> None:
    from relora_mora.config.load import ConfigError

    if faults:
        raise ConfigError(faults, "the command line")


def without_local_rank(argv: Iterable[str]) -> list[str]:
    """Drops ``--local_rank=N``, which DeepSpeed's launcher adds although LOCAL_RANK is in the environment."""
    return [word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))]


def _flags(words: list[str]) -> list[str]:
    """The names of flags; fire reads one dash like two."""
    return [word.partition("=")[0].lstrip("-") for word in words if re.match("--?[A-Za-z]", word)]


def _unknown_flags(command: Command, words: list[str], name: str) -> Iterator[str]:
    parameters = inspect.signature(command).parameters.values()
    own = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    takes_settings = any(each.kind is each.VAR_KEYWORD for each in parameters)
    for flag in _flags(words):
        flag = flag.replace("-", "_")
        if flag in own or (takes_settings and "." in flag):
            continue
        near = difflib.get_close_matches(flag, own, n=1)
        if takes_settings and not near:
            from relora_mora.config.explain import ELSEWHERE
            from relora_mora.config.schema import SETTINGS

            keys = {setting.partition(".")[2]: setting for setting in SETTINGS} | ELSEWHERE
            near = [keys[key] for key in difflib.get_close_matches(flag, keys, n=1)]
        yield f"--{flag}: unknown; " + (f"did you mean --{near[0]}?" if near else f"see {name} --help")


def _faults_of_words(words: list[str], name: str) -> list[str]:
    from relora_mora.config.secrets import secret_in

    flags = _flags(words)
    names = [flag.replace("-", "_") for flag in flags]
    twice = sorted({flag for flag, times in Counter(names).items() if times > 1})
    deep = [flag for flag in flags if "-" in flag.split(".", 2)[-1] and flag.count(".") > 1]
    not_utf8 = [word for word in words if word.encode(errors="ignore").decode() != word]
    faults = [f"{word}: unexpected argument; see {name} --help" for word in words if word in ("-", "--")]
    faults += [f"{word.partition('=')[0]}: {secret}" for word in words if (secret := secret_in(word))]
    faults += [f"{word!a}: not UTF-8; check the terminal's locale" for word in not_utf8]
    faults += [f"--{flag}: given twice; give it once" for flag in twice]
    faults += [
        f"--{flag}: names with '-' cannot be set like this; give --{above}='{{{key}: ...}}'"
        for flag in deep
        for above, _, key in [flag.rpartition(".")]
    ]
    return faults


def _with_values(words: list[str], hints: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Gives a flag without a value ``true`` if it is a bool, and refuses others; fire takes the next word, or True."""
    given, faults = [], []
    for word, following in itertools.zip_longest(words, words[1:], fillvalue="--"):
        expected = hints.get(word.removeprefix("--").replace("-", "_")) if word.startswith("--") else None
        if expected is bool and following.lower() not in ("true", "false"):
            word += "=true"
        elif expected not in (None, bool) and following.startswith("--"):
            faults.append(f"{word}: has no value; give it as {word}=VALUE")
        given.append(word)
    return given, faults


def _parsed(command: Command, words: list[str], name: str) -> inspect.BoundArguments:
    """The arguments by parameter, as text."""
    import fire
    from fire import decorators

    signature = inspect.signature(command)
    calls: list[inspect.BoundArguments] = []

    @functools.wraps(command)
    def stand_in(*args: Any, **kwargs: Any) -> None:
        calls.append(signature.bind(*args, **kwargs))

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            fire.Fire(decorators.SetParseFn(str)(stand_in), command=words, name=name, serialize=lambda _: None)
    except SystemExit:
        fault = messages.getvalue().partition("ERROR: ")[2].partition("\n")[0]
        fault = fault.replace("Could not consume arg:", "unknown argument:")
        fault = fault.replace("The function received no value for the required argument:", "missing argument:")
        _raise([f"{fault}; see {name} --help"])
    return calls[0]


def _typed(value: Any, expected: Any) -> Any:
    """Converts text to the expected type; it is read as YAML, like settings. Defaults from fire stay unchanged."""
    if isinstance(value, tuple):  # the values of *NAMES
        return tuple(_typed(each, expected) for each in value)
    if value == "":
        raise ValueError("empty; give a value")
    if isinstance(value, str) and (expected is str or str in get_args(expected)):
        return from_home(value)  # a shell expands ~ in `--out ~/a`, but not in `--out=~/a`
    if not isinstance(value, str):
        return value
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from relora_mora.config.explain import expectation
    from relora_mora.config.yaml_text import explain_yaml, parse_yaml

    try:
        given = parse_yaml(value)
        return TypeAdapter(expected).validate_python(given, strict=True)
    except yaml.YAMLError as error:
        raise ValueError(f"got {value}, which is not YAML: {explain_yaml(error)}") from None
    except ValidationError as error:
        raise ValueError(f"got {given!r}; {expectation(error.errors())}") from None
