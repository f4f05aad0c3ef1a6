"""Makes links of the roles in docstrings, such as :func:`attach`, and fails the build if one leads nowhere."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **parts: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r":(?:func|meth|class):`([\w.]+)`", r"[`\1`][]", obj.docstring.value)
