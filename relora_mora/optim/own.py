"""Rules of one's own: finds, checks and makes what ``optim.matrices=FILE.py:NAME`` names."""

import functools
import importlib
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import xxhash
from pydantic import ConfigDict, ValidationError, validate_call

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
    try:
        if place.endswith(".py"):
            source = Path(place).read_bytes()
            return _executed(Path(place).resolve(), source), _digest(source)
        module = importlib.import_module(place)
        return module, _digest(Path(module.__file__).read_bytes() if module.__file__ else b"")
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).name == Path(place).name]
        line = f" in line {lines[-1]}" if lines else ""
        text = " ".join(str(error).split())
        raise RuleError(
            f"optim.matrices: importing {place} failed{line} with {type(error).__name__}: {text}; correct it, or give "
            "FILE.py:NAME (relative to the current folder, or to that of the settings) or package.module:NAME"
        ) from None


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


def _rule_class(spec: str, module: ModuleType) -> type[MatrixRule]:
    place, name = split_rule(spec)
    own = {key: value for key, value in vars(module).items() if isinstance(value, type)}
    rules = {key: value for key, value in own.items() if issubclass(value, MatrixRule) and value is not MatrixRule}
    if name not in rules:
        raise RuleError(
            f"optim.matrices: {place} has no rule {name}; expected a subclass of relora_mora.optim.rules.MatrixRule, "
            f"and it has {', '.join(rules) or 'none'}"
        )
    if inspect.isabstract(rules[name]):
        missing = " and ".join(sorted(rules[name].__abstractmethods__))
        raise RuleError(f"optim.matrices: {name} of {place} lacks {missing}; define it as MatrixRule describes it")
    return rules[name]


def _made(kind: type[MatrixRule], settings: dict[str, Any]) -> MatrixRule:
    """The rule with these arguments, after they are converted to the types in the constructor's signature."""
    rule = kind.__new__(kind)
    known = ", ".join(inspect.signature(kind).parameters)
    make = kind.__init__
    if known:
        make = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(make)
    try:
        make(rule, **settings)
    except ValidationError as error:
        fault = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    else:
        return rule
    raise RuleError(
        f"optim.rule: {kind.__name__} with {settings}: {' '.join(fault.split())}; its constructor has "
        f"{known or 'no arguments'}"
    )
