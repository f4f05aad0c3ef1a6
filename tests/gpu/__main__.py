"""Everything on a GPU: the tests of this folder, then the benchmarks. ``make test-gpu`` runs it.

    python -m tests.gpu [tests | benchmarks]

Without a GPU it says why nothing was run, and the exit code is 0, or 1 with NEED_GPU=1 in the environment.
TEST_DEVICE=cpu runs it on a CPU, with a smaller model in the benchmarks.
"""

import importlib.util
import os
import subprocess
import sys
import time

from tests.tools.helpers import ROOT, python_path

TESTS = [f"tests/gpu/{name}.py" for name in ("algebra", "training", "evaluation")]
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "pytest", "hypothesis")  # the others come with them
PROCESSES = 6  # that test at a time: Triton compiles on one core, and a tiny model leaves a GPU idle
# what is measured: the model, and further arguments
MEASURED = {
    "cuda": ("configs/model/llama_250m.json", ["--tokens=8192"]),
    "cpu": ("configs/model/llama_tiny.json", ["--tokens=1024"]),
}
STEPS = [
    "--repeats=5",
    "--warmup=2",
    "--methods=full,remora,remora_merged,remora_decoupled,remora_int8,relora,frozen,plain",
]
COMPILED = [
    "--repeats=5",
    "--warmup=2",
    "--methods=full_compiled,remora_compiled,remora_int8_compiled,remora_fp8_compiled",
]


def main() -> int:
    device = os.environ.get("TEST_DEVICE", "cuda")
    reason = obstacle(device)
    if reason:
        print(f"skipped: {reason}")
        return int(os.environ.get("NEED_GPU") == "1")
    begin = time.monotonic()
    environment = os.environ | {"TEST_DEVICE": device, "PYTHONPATH": python_path()}
    several = ["-n", str(PROCESSES)] if device == "cuda" and importlib.util.find_spec("xdist") else []
    parts = {"tests": [["-m", "pytest", "-rs", *several, *TESTS]], "benchmarks": benchmarks(device)}
    wanted = sys.argv[1:] or list(parts)
    if not parts.keys() >= set(wanted):
        raise SystemExit(f"got {' '.join(wanted)}, expected {' or '.join(parts)}, or nothing for both")
    commands = [command for part in wanted for command in parts[part]]
    failed = []
    for command in commands:
        print(f"\n== {' '.join(command)}", flush=True)
        begun = time.monotonic()
        if subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False).returncode:
            failed.append(" ".join(command))
        print(f"== {time.monotonic() - begun:.0f} s", flush=True)
    print(f"\n== {len(commands)} commands on {device} in {time.monotonic() - begin:.0f} s, failed: {failed or 'none'}")
    return int(bool(failed))


def obstacle(device: str) -> str | None:
    """Why nothing can be tested here, None if it can."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{', '.join(missing)} not installed for {sys.executable}; make dev, or make test-gpu WHEELS=FOLDER with "
            "what make wheels has made on a machine with a network"
        )
    if device == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} (built for CUDA: {torch.version.cuda or 'no'}) sees no GPU"
    return None


def benchmarks(device: str) -> list[list[str]]:
    model, sizes = MEASURED[device]
    kinds = [["layers", model, f"--operator={operator}"] for operator in (1, 2)]
    kinds += [["steps", model, *STEPS], ["steps", model, *COMPILED]]
    return [["-m", "launch.benchmark", *kind, *sizes, f"--device={device}"] for kind in kinds]


if __name__ == "__main__":
    sys.exit(main())
