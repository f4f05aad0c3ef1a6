"""Reads a command's arguments by its signature, and refuses all bad arguments before the command starts.

Arguments stay text unless they are annotated otherwise: ``1e5`` is not a number, and ``a,b`` is not a list. In the name
of a flag ``-`` means ``_``, and one dash is as good as two. Its value follows ``=``, or is the next word.
"""

import difflib
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Le

from relora_mora.cli.help import Command, plain_types
from relora_mora.system.files import from_home

PositiveInt = Annotated[int, Ge(1)]  # types of commands' parameters
NonNegativeInt = Annotated[int, Ge(0)]
Processes = Annotated[int, Ge(1), Le(1024)]
Precision = Literal["float32", "bfloat16", "float16"]
STDIN = "-"
TextOrStdin = Annotated[str, STDIN]  # the only arguments that may be one dash


def read_arguments(command: Command, argv: Iterable[str], name: str) -> inspect.BoundArguments:
    """The values to call ``command`` with; raises ConfigError with all faults of the command line."""
    words = without_local_rank(argv)
    hints = get_type_hints(command, include_extras=True)
    stray = {"--"} if TextOrStdin in hints.values() else {"--", STDIN}
    signature = inspect.signature(command)
    positional, flags = _split([word for word in words if word not in stray], get_type_hints(command))
    faults = [f"{word}: unexpected argument; see {name} --help" for word in words if word in stray]
    faults += [*_faults_of_words(words), *_faults_of_flags(flags, signature.parameters, name)]
    values: dict[str, Any] = {flag: value for flag, value in flags if value is not None}
    places = [each for each in signature.parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
    free = [each.name for each in places if each.name not in dict(flags)]
    if not any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values()):
        faults += [f"unknown argument: {word}; see {name} --help" for word in positional[len(free) :]]
        faults += [f"missing argument: {each}; see {name} --help" for each in free[len(positional) :]]
        values |= zip(free, positional, strict=False)
        positional = []
    for flag in values.keys() & hints.keys():
        try:
            values[flag] = _typed(values[flag], hints[flag])
        except ValueError as error:
            faults.append(f"--{flag}: {error}; see --help")
    if faults:
        from relora_mora.config.load import ConfigError

        raise ConfigError(faults, "the command line")
    return signature.bind(*map(from_home, positional), **values)


def without_local_rank(argv: Iterable[str]) -> list[str]:
    """Drops ``--local_rank=N``, which DeepSpeed's launcher adds although LOCAL_RANK is in the environment."""
    return [word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))]


def _split(words: list[str], hints: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """The words that are not flags, and the flags as (name, value); None if a value is missing.

    The value of a bool is true if none is given, and so is that of a setting.
    """
    positional: list[str] = []
    flags: list[tuple[str, str | None]] = []
    while words:
        word, *words = words
        if not _is_flag(word):
            positional.append(word)
            continue
        flag, has_value, value = word.lstrip("-").partition("=")
        name = flag.replace("-", "_")
        is_bool = hints.get(name) is bool
        if has_value:
            flags.append((name, value))
        elif words and not words[0].startswith("--") and (not is_bool or words[0].lower() in ("true", "false")):
            value, *words = words
            flags.append((name, value))
        else:
            flags.append((name, "true" if is_bool or "." in name else None))
    return positional, flags


def _is_flag(word: str) -> bool:
    return re.match("--?[A-Za-z]", word) is not None


def _faults_of_flags(
    flags: list[tuple[str, str | None]], parameters: Mapping[str, inspect.Parameter], name: str
) -> Iterator[str]:
    own = {each.name for each in parameters.values() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    takes_settings = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for flag, times in Counter(flag for flag, _ in flags).items():
        if times > 1:
            yield f"--{flag}: given twice; give it once"
        if flag in own or (takes_settings and "." in flag):
            if (flag, None) in flags:
                yield f"--{flag}: has no value; give it as --{flag}=VALUE"
            continue
        near = difflib.get_close_matches(flag, own, n=1)
        if takes_settings and not near:
            from relora_mora.config.schema import SETTINGS

            keys = {setting.partition(".")[2]: setting for setting in SETTINGS}
            near = [keys[key] for key in difflib.get_close_matches(flag, keys, n=1)]
        yield f"--{flag}: unknown; " + (f"did you mean --{near[0]}?" if near else f"see {name} --help")


def _faults_of_words(words: list[str]) -> Iterator[str]:
    from relora_mora.config.secrets import secret_in

    for word in words:
        flag = word.partition("=")[0]
        if secret := secret_in(word):
            yield f"{flag}: {secret}"
        if word.encode(errors="ignore").decode() != word:
            yield f"{word!a}: not UTF-8; check the terminal's locale"
        if _is_flag(word) and flag.count(".") > 1 and "-" in flag.split(".", 2)[-1]:
            above, _, key = flag.rpartition(".")
            yield f"{flag}: names with '-' cannot be set like this; give {above}='{{{key}: ...}}'"


def _typed(value: str, expected: Any) -> Any:
    """Converts text to the expected type; it is read as YAML, like settings."""
    if value == "":
        raise ValueError("empty; give a value")
    if expected is str or str in get_args(expected):
        return from_home(value)  # a shell expands ~ in `--out ~/a`, but not in `--out=~/a`
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from relora_mora.config.yaml_text import parse_yaml

    try:
        return TypeAdapter(expected).validate_python(parse_yaml(value), strict=True)
    except (yaml.YAMLError, ValidationError) as error:
        context = error.errors()[0].get("ctx", {}) if isinstance(error, ValidationError) else {}
        for name, words in (("ge", "at least"), ("le", "at most")):
            if name in context:
                raise ValueError(f"got {value}, expected {words} {context[name]}") from None
        names = [getattr(kind, "__name__", str(kind)) for kind in plain_types(expected)]
        raise ValueError(f"got {value!r}, expected {' or '.join(names)}") from None
