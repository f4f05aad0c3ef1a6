"""The library is light to import: the package alone is nothing, and no name of it brings DeepSpeed."""

import json
import subprocess
import sys

import pytest

import relora_mora as rm

pytestmark = pytest.mark.more

HEAVY = ("torch", "deepspeed", "transformers", "datasets")


def loaded(code: str) -> list[str]:
    """Which heavy packages are loaded after this code, in a new process."""
    program = f"import json, sys\n{code}\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    return list(json.loads(answer.stdout))


def test_the_package_alone_loads_nothing():
    assert loaded("import relora_mora") == []


def test_no_name_loads_deepspeed():
    names = [name for name in rm.__all__ if name != "ReMoRACallback"]
    of_names = f"import relora_mora\nfor name in {names}: getattr(relora_mora, name)"
    then_callback = f"assert not set({HEAVY[1:]}) & set(sys.modules), 'more than torch'\nrelora_mora.ReMoRACallback"
    assert "deepspeed" not in loaded(f"{of_names}\n{then_callback}")
