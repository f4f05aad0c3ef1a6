"""Rules that settings must follow, as entries of tables: what breaks one, the settings involved, and the remedy."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from relora_mora.config.types import Fault


class Rule(NamedTuple):
    """A combination of settings that cannot work.

    ``settings`` names all settings involved, first the one to change. ``broken`` gets the settings and returns what is
    wrong with them, or something false. ``says`` is the message: ``{found}`` stands for what ``broken`` returned,
    ``{c}`` for the settings. Further names in braces are arguments of :func:`broken_rules`.
    """

    settings: str
    broken: Callable[[Any], Any]
    says: str


def broken_rules(rules: Iterable[Rule], settings: Any, **names: Any) -> Iterator[Fault]:
    """A fault for each rule that ``settings`` break."""
    for rule in rules:
        found = rule.broken(settings)
        if found:
            shown = ", ".join(map(str, found)) if isinstance(found, list) else found
            involved = rule.settings.format(**names).split()
            yield Fault(tuple(involved), rule.says.format(found=shown, c=settings, **names))
