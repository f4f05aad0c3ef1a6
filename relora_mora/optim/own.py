"""Rules of one's own: finds, checks and makes what ``optim.matrices=FILE.py:NAME`` names."""

import difflib
import functools
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash
from pydantic import ConfigDict, ValidationError, create_model

from relora_mora.config.optim import OptimConfig
from relora_mora.config.registry import is_own, split_rule
from relora_mora.config.schema import Config
from relora_mora.optim.rules import MatrixRule


class RuleError(ValueError):
    """A rule of one's own that cannot be used. The message names the setting and a remedy."""


def with_rule(config: Config) -> Config:
    """The settings with the digest of the rule's file, if they name a rule of one's own.

    Imports the file and makes the rule. Raises :class:`RuleError` if that fails.
    """
    if not is_own(config.optim.matrices):
        return config
    own_rule(config.optim)
    _, digest = _module(config.optim.matrices)
    return config.model_copy(update={"optim": config.optim.model_copy(update={"rule_digest": digest})})


def own_rule(optim: OptimConfig) -> MatrixRule:
    """The rule that ``optim.matrices`` names, with the settings in ``optim.rule``; raises :class:`RuleError`."""
    spec = optim.matrices
    module, digest = _module(spec)
    if optim.rule_digest not in (None, digest):
        raise RuleError(
            f"optim.rule_digest: {module.__file__} has the digest {digest}, but the settings ask for "
            f"{optim.rule_digest}; use the file of before, or set optim.rule_digest=null to train with this one"
        )
    return _made(_rule_class(spec, module), optim.rule)


def _module(spec: str) -> tuple[ModuleType, str]:
    """The module that has the rule, and the digest of its file."""
    place = split_rule(spec)[0]
    if not place.endswith(".py"):
        module = _imported(place, lambda: importlib.import_module(place), "install it, or give FILE.py:NAME")
        return module, _digest(Path(module.__file__).read_bytes() if module.__file__ else b"")
    try:
        source = Path(place).read_bytes()
    except OSError as error:
        raise RuleError(
            f"optim.matrices: cannot read {place} ({error.strerror}); relative paths start from the current folder, or "
            "from that of the settings"
        ) from None
    return _imported(place, lambda: _executed(Path(place).resolve(), source), "correct the file"), _digest(source)


@functools.cache
def _executed(path: Path, source: bytes) -> ModuleType:
    """The module with this source, which is what was read for the digest."""
    module = ModuleType(f"{path.stem}_{_digest(source)}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and torch look it up there
    exec(compile(source, path, "exec"), vars(module))  # noqa: S102 - the user's own program
    return module


def _digest(source: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(source)


def _imported(place: str, load: Callable[[], ModuleType], remedy: str) -> ModuleType:
    try:
        return load()
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).name == Path(place).name]
        line = f" in line {lines[-1]}" if lines else ""
        text = " ".join(str(error).split())
        raise RuleError(
            f"optim.matrices: importing {place} failed{line} with {type(error).__name__}: {text}; {remedy}"
        ) from None


def _rule_class(spec: str, module: ModuleType) -> type[MatrixRule]:
    place, name = split_rule(spec)
    found = getattr(module, name, None)
    rules = [key for key, value in vars(module).items() if _is_rule(value) and value.__module__ == module.__name__]
    has = f"it has {', '.join(rules)}" if rules else "it has none"
    expected = "expected a subclass of relora_mora.optim.rules.MatrixRule"
    if found is None:
        near = difflib.get_close_matches(name, rules, n=1)
        hint = f"did you mean {near[0]}?" if near else f"{expected}, and {has}"
        raise RuleError(f"optim.matrices: {place} has no {name}; {hint}")
    if not (isinstance(found, type) and issubclass(found, MatrixRule)):
        raise RuleError(f"optim.matrices: {name} of {place} is {found!r}; {expected}, and {has}")
    if inspect.isabstract(found):
        missing = " and ".join(sorted(found.__abstractmethods__))
        raise RuleError(f"optim.matrices: {name} of {place} lacks {missing}; define it as MatrixRule describes it")
    return found


def _is_rule(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, MatrixRule) and not inspect.isabstract(value)


def _made(kind: type[MatrixRule], settings: dict[str, Any]) -> MatrixRule:
    """The rule with these arguments, after they are converted to the types in the constructor's signature."""
    try:
        parameters = inspect.signature(kind, eval_str=True).parameters
        fields: dict[str, Any] = {
            name: (
                Any if parameter.annotation is parameter.empty else parameter.annotation,
                ... if parameter.default is parameter.empty else parameter.default,
            )
            for name, parameter in parameters.items()
        }
        options = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
        values = create_model(kind.__name__, __config__=options, **fields).model_validate(settings)
        return kind(**{name: getattr(values, name) for name in settings})
    except ValidationError as error:
        faults = [_fault(kind, list(fields), str(item["loc"][0]), item["type"], item["msg"]) for item in error.errors()]
        raise RuleError(f"optim.rule: {'; '.join(faults)}") from None
    except Exception as error:
        raise RuleError(
            f"optim.rule: {kind.__name__} with {settings} failed with {type(error).__name__}: {error}; correct the "
            "settings, or its constructor"
        ) from None


def _fault(kind: type[MatrixRule], known: list[str], name: str, fault: str, text: str) -> str:
    if fault == "missing":
        return f"{kind.__name__} needs {name}; give optim.rule={{{name}: ...}}"
    if fault != "extra_forbidden":
        return f"{name}: {text[:1].lower()}{text[1:]}"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
    return f"{kind.__name__} has no setting {name}; {hint}"
