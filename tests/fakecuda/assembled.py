"""What the assembler of NVIDIA says of a kernel."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton


def resources(code: dict[str, bytes | str], folder: Path) -> dict[str, int]:
    """{REG: registers of a thread, STACK: bytes, LOCAL: bytes spilled}, as the assembler noted them"""
    file = folder / "kernel.cubin"
    file.write_bytes(bytes(code["cubin"]))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
