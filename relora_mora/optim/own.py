"""Rules of one's own: finds, checks and makes what ``optim.matrices=FILE.py:NAME`` names."""

import contextlib
import functools
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

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
    _, digest = _module(split_rule(config.optim.matrices)[0])
    return config.model_copy(update={"optim": config.optim.model_copy(update={"rule_digest": digest})})


def own_rule(optim: OptimConfig) -> MatrixRule:
    """The rule that ``optim.matrices`` names, with the settings in ``optim.rule``; raises :class:`RuleError`."""
    place, name = split_rule(optim.matrices)
    remedy = "give FILE.py:NAME (relative to the current folder, or to that of the settings) or package.module:NAME"
    with _errors_named(f"optim.matrices: importing {place} failed", remedy):
        module, digest = _module(place)
    if optim.rule_digest not in (None, digest):
        raise RuleError(
            f"optim.rule_digest: {module.__file__} has the digest {digest}, but the settings ask for "
            f"{optim.rule_digest}; use the file of before, or set optim.rule_digest=null to train with this one"
        )
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, MatrixRule)):
        raise RuleError(
            f"optim.matrices: {place} has no rule {name}; expected a subclass of relora_mora.optim.rules.MatrixRule"
        )
    known = ", ".join(inspect.signature(kind).parameters)
    with _errors_named(f"optim.rule: {name} with {optim.rule}", f"its constructor has {known or 'no arguments'}"):
        rule = kind.__new__(kind)
        make = kind.__init__
        if known:  # converts the settings to the types in its signature
            make = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(make)
        make(rule, **optim.rule)
    return rule


@contextlib.contextmanager
def _errors_named(what: str, remedy: str) -> Iterator[None]:
    """Turns any error of the user's program into a :class:`RuleError` of one line."""
    try:
        yield
    except ValidationError as error:
        fault = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}: {error}"
    else:
        return
    raise RuleError(f"{what}: {' '.join(fault.split())}; {remedy}")


def _module(place: str) -> tuple[ModuleType, str]:
    """The module that has the rule, and the digest of its file."""
    if place.endswith(".py"):
        source = Path(place).read_bytes()
        return _executed(Path(place).resolve(), source), _digest(source)
    module = importlib.import_module(place)
    return module, _digest(Path(module.__file__).read_bytes() if module.__file__ else b"")


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
