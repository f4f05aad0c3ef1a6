"""Reads a command's arguments: fire splits them into words and flags, pydantic reads the values.

All faults are found before the command starts, and reported together with those of its settings. Unlike with fire
alone, arguments stay text unless they are annotated otherwise, a flag without a value is true only if it is a bool, and
``-``, ``--`` and repeated flags are refused.
"""

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Le

from relora_mora.cli.help import Command
from relora_mora.config.shipped import nearest
from relora_mora.system.files import from_home

PositiveInt = Annotated[int, Ge(1)]  # types of commands' parameters
NonNegativeInt = Annotated[int, Ge(0)]
Processes = Annotated[int, Ge(1), Le(1024)]
Precision = Literal["float32", "bfloat16", "float16"]


def read_arguments(command: Command, argv: Iterable[str], name: str) -> inspect.BoundArguments:
    """The values to call ``command`` with; raises ConfigError with all faults of the command line."""
    arguments = inspect.signature(command).bind_partial()
    parameters = arguments.signature.parameters
    hints = get_type_hints(command, include_extras=True)
    kinds = {each.kind: each.name for each in parameters.values()}
    rest, settings = kinds.get(inspect.Parameter.VAR_POSITIONAL), kinds.get(inspect.Parameter.VAR_KEYWORD)
    own = {key: each for key, each in parameters.items() if key not in (rest, settings)}
    positional, flags, faults = _split(without_local_rank(argv), hints)
    places = [key for key, each in own.items() if each.kind is not each.KEYWORD_ONLY and key not in flags]
    texts: dict[str, Any] = dict(zip(places, positional, strict=False))
    if rest is not None:
        texts[rest] = positional[len(places) :]
    elif strays := positional[len(places) :]:
        faults += [f"unknown argument: {word}; see {name} --help" for word in strays]
    overrides = {}
    for flag, text in flags.items():
        if flag in own:
            texts[flag] = text
        elif settings is not None and "." in flag:
            overrides[flag] = text
        else:
            near = _meant(flag, own, takes_settings=settings is not None)
            faults.append(f"--{flag}: unknown; " + (f"did you mean --{near}?" if near else f"see {name} --help"))
    required = [key for key, each in own.items() if each.default is each.empty]
    faults += [f"missing argument: {key}; see {name} --help" for key in required if key not in texts]
    for key, text in texts.items():
        try:
            arguments.arguments[key] = _typed(text, hints.get(key, str))
        except ValueError as error:
            faults.append(f"--{key}: {error}; see --help")
    if settings is not None:
        arguments.arguments[settings] = overrides
    if not faults:
        return arguments
    from relora_mora.config.load import ConfigError

    source = "the command line"
    if settings is not None and set(required) <= arguments.arguments.keys():
        overrides[""] = ""  # no setting has this name, so the command refuses its settings
        try:
            command(*arguments.args, **arguments.kwargs)
        except ValueError as error:
            found = getattr(error, "faults", [str(error)])
            if further := [fault for fault in found if not fault.startswith("--: ")]:
                faults += further
                file = getattr(error, "source", source)
                source = file if source in file else f"{file} and {source}"
    raise ConfigError(faults, source)


def without_local_rank(argv: Iterable[str]) -> list[str]:
    """Drops ``--local_rank=N``, which DeepSpeed's launcher adds although LOCAL_RANK is in the environment."""
    return [word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))]


def _flag(word: str) -> str:
    """The name of the flag that a word is, or ""; fire reads one dash like two, and dashes in names as underscores."""
    found = re.match("--?([A-Za-z][^=]*)", word)
    return found[1].replace("-", "_") if found else ""


def _split(words: Sequence[str], hints: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, str], list[str]]:
    """The words that are not flags, the flags with their values, and faults; a bool without a value is true."""
    import fire
    from fire import decorators

    from relora_mora.config.secrets import secret_in

    faults = []
    given = []
    times = Counter(_flag(word) for word in words if _flag(word))
    for word, following in itertools.pairwise([*words, "--"]):
        flag, (name, has_value, _) = _flag(word), word.partition("=")
        *above, key = name.split(".", 2)
        if secret := secret_in(word):
            faults.append(f"{name}: {secret}")
        if word.encode(errors="ignore").decode() != word:
            faults.append(f"{word!a}: not UTF-8; check the terminal's locale")
        if times.pop(flag, 1) > 1:
            faults.append(f"--{flag}: given twice; give it once")
        if flag and len(above) == 2 and "-" in key:
            faults.append(f"{name}: names with '-' cannot be set like this; give {'.'.join(above)}='{{{key}: ...}}'")
        is_bool = hints.get(flag) is bool
        takes_next = following.lower() in ("true", "false") if is_bool else not following.startswith("--")
        if word in ("-", "--"):
            faults.append(f"{word}: unexpected argument")
        elif flag and not has_value and not takes_next:
            given.append(f"{word}=true")
            if flag in hints and not is_bool:
                faults.append(f"{name}: has no value; give it as {name}=VALUE")
        else:
            given.append(word)
    found: list[tuple[tuple[str, ...], dict[str, str]]] = []
    stand_in = decorators.SetParseFn(str)(lambda *words, **flags: found.append((words, flags)))
    fire.Fire(stand_in, command=given, serialize=lambda _: None)
    return *found[0], faults


def _meant(flag: str, own: Collection[str], *, takes_settings: bool) -> str | None:
    """The option that was meant, or the setting."""
    if (near := nearest(flag, own)) or not takes_settings:
        return near
    from relora_mora.config.explain import ELSEWHERE
    from relora_mora.config.schema import SETTINGS

    keys = {setting.partition(".")[2]: setting for setting in SETTINGS} | ELSEWHERE
    return keys.get(nearest(flag, keys) or "")


def _typed(value: Any, expected: Any) -> Any:
    """Converts text to the expected type; it is read as YAML, like settings."""
    if isinstance(value, tuple):  # the values of *NAMES
        return tuple(_typed(each, expected) for each in value)
    if value == "":
        raise ValueError("empty; give a value")
    if expected is str or str in get_args(expected):
        return from_home(value)  # a shell expands ~ in `--out ~/a`, but not in `--out=~/a`
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
