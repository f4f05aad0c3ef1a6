"""The written order of the modules, and who may import DeepSpeed."""

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.each import each
from tests.tools.helpers import ROOT

pytestmark = pytest.mark.more

PACKAGE = ROOT / "relora_mora"
# a package or module imports only from lines above its own
LAYERS = [
    ["system"],
    ["config", "distributed", "kernels"],
    ["cli", "supervise", "operators", "schedule", "tokenizer"],
    ["adapters", "data"],
    ["model"],
    ["optim"],
    ["sizing", "engine"],
    ["library"],
    ["checkpoint"],
    ["weights"],
    ["evaluation"],
    ["train"],
    ["experiments"],
    ["commands"],
    ["__main__"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def _imports(path: Path) -> set[str]:
    """The dotted names of what a file imports, also inside functions and for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


# (room, file) of every file of the package
FILES = [
    (path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
]


def test_every_room_has_a_layer():
    assert {module for module, _ in FILES} == set(LAYER)


def test_contributing_shows_every_module_in_its_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = text.partition("```\nrelora_mora/\n")[2].partition("\nlaunch/")[0].splitlines()
    shown, room = set(), ""
    for line in lines:
        name, *modules = line.split()
        if line.startswith(" " * 10):  # the modules of a room go on
            shown |= {f"{room}/{module}" for module in line.split()}
            continue
        if not name.endswith("/"):
            shown.add(name)  # a module with a description
            continue
        room = f"{room.partition('/')[0]}/{name[:-1]}" if line.startswith("    ") else name[:-1]
        shown |= {f"{room}/{module}" for module in modules}
    files = (path.relative_to(PACKAGE).with_suffix("") for _, path in FILES)
    assert shown == {path.as_posix() for path in files if path.name != "__init__"}


def test_modules_import_only_lower_layers():
    wrong = []
    for room, path in FILES:
        for name in _imports(path):
            package, _, module = name.partition(".")
            other = module.partition(".")[0]
            if package == "relora_mora" and other in LAYER and other != room and LAYER[other] >= LAYER[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_no_files_import_each_other():
    """The ``__init__`` above a file does not count."""
    modules = {_module(path): path for _, path in FILES}
    graph = {
        module: {
            found
            for name in _imports(path)
            for found in [name if name in modules else name.rpartition(".")[0]]
            if found in modules and not module.startswith(f"{found}.") and found != module
        }
        for module, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the files


def test_only_the_engine_imports_deepspeed():
    importers = {module for module, path in FILES if any(name.split(".")[0] == "deepspeed" for name in _imports(path))}
    assert importers == {"engine"}


def test_one_function_decides_between_cpu_and_gpu():
    """It knows DS_ACCELERATOR; torch does not."""
    sources = [path for folder in ("relora_mora", "launch") for path in (ROOT / folder).rglob("*.py")]
    asking = [path for path in sources if "cuda.is_available" in path.read_text(encoding="utf-8")]
    assert asking == [PACKAGE / "system" / "hardware.py"]


@each(
    "package,rooms",
    [
        ("deepspeed", "checkpoint evaluation sizing weights experiments/planner"),
        # a mistake is reported immediately, and importing torch takes seconds
        ("torch", "cli commands config data tokenizer experiments/compare"),
        ("torch", "experiments/study/conduct.py train/begin/files.py"),
        ("pandas", "cli commands config"),
        ("matplotlib", "cli commands experiments/compare/table.py"),
    ],
)
def test_what_a_room_does_not_need_is_not_imported(package: str, rooms: str):
    paths = [PACKAGE / room for room in rooms.split()]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    code = f"import sys, {', '.join(map(_module, files))}; print({package!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"


def test_the_package_never_imports_the_scripts():
    for _, path in FILES:
        assert not {name.split(".")[0] for name in _imports(path)} & {"launch", "tests"}


def test_no_test_module_imports_another():
    """What tests share is in modules of its own; tests/gpu runs tests of other modules again, on a GPU."""
    tests = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "gpu" not in path.parts]
    assert len(tests) > 100
    importing = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in tests
        for name in _imports(path)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))
    ]
    assert importing == []


def test_the_gpu_list_names_tests_that_exist():
    names = [path.stem for path in sorted((ROOT / "tests" / "gpu").glob("*.py")) if not path.stem.startswith("_")]
    assert {"algebra", "evaluation", "training"} <= set(names)
    for name in names:
        importlib.import_module(f"tests.gpu.{name}")
