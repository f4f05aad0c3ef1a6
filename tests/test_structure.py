"""The written order of the modules, and who may import DeepSpeed."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.helpers import ROOT

PACKAGE = ROOT / "relora_mora"
ORDER = [
    "config",
    "cli",
    "guard",
    "kernels",
    "operators",
    "schedule",
    "seeds",
    "tokenizer",
    "data",
    "adapters",
    "model_config",
    "model",
    "optim",
    "flops",
    "memory",
    "plan",
    "hardware",
    "fit",
    "allocator",
    "metrics",
    "health",
    "zero",
    "cycle",
    "checkpoint",
    "evaluate",
    "export",
    "initial",
    "build",
    "trainer",
    "benchmark",
]


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def _files() -> list[tuple[str, Path]]:
    """(module of the written order, file) of every file of the package"""
    return [
        (path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
    ]


def test_every_module_stands_in_the_order():
    assert {module for module, _ in _files()} == set(ORDER)


def test_modules_import_only_what_stands_before_them():
    wrong = []
    for module, path in _files():
        for name in _imports(path):
            if name.startswith("relora_mora."):
                other = name.split(".")[1]
                if other != module and ORDER.index(other) >= ORDER.index(module):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_only_zero_imports_deepspeed():
    importers = {module for module, path in _files() if any(name.split(".")[0] == "deepspeed" for name in _imports(path))}
    assert importers == {"zero"}


def test_the_package_never_imports_the_scripts():
    for _, path in _files():
        assert not {name.split(".")[0] for name in _imports(path)} & {"launch", "tests"}
