"""The rules in examples/optimizers, as values of ``optim.matrices``."""

from typing import Any

from tests.tools.helpers import ROOT

EXAMPLES = {"galore": "galore.py:GaLore", "apollo": "apollo.py:Apollo"}


def matrices_settings(name: str, **rule: Any) -> dict[str, Any]:
    """Settings of ``optim`` for an example, with its own, or for an optimizer of the package."""
    if name not in EXAMPLES:
        return {"matrices": name}
    return {"matrices": f"{ROOT}/examples/optimizers/{EXAMPLES[name]}", "rule": rule}
