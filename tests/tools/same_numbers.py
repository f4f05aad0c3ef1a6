"""Whether a refactor changed a number: ``make same AGAINST=COMMIT`` (default: HEAD).

Trains tiny runs of all methods, ZeRO stages and precisions with the code of a commit and with the code here, and lets
the code here go on from the commit's checkpoints. Losses, rates, tensors and manifests must be the same bit for bit.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.tools.helpers import KERNELS, ROOT, worktree
from tests.tools.ports import free_port
from tests.tools.runs import copy_cut_at, different_tensors, metrics, run_config, write_inputs
from tests.tools.tokenizer_tools import train_tokenizer

MERGES: dict[str, Any] = {"merge_every": 4, "operators": [1, 2]}
# name: (ranks, sections of the settings)
CELLS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "full": (2, {"method": {"name": "full"}, "train": {"zero_stage": 2}}),
    "lora": (1, {"method": {"name": "lora", "form": "merged"}, "train": {"zero_stage": 0}}),
    "mora": (1, {"method": {"name": "mora", "form": "decoupled"}, "train": {"zero_stage": 0, "precision": "bf16"}}),
    "relora": (2, {"method": {"name": "relora", **MERGES, "reset": "magnitude"}, "train": {"zero_stage": 1}}),
    "remora": (2, {"method": {"name": "remora", **MERGES}, "train": {"zero_stage": 2, "precision": "bf16"}}),
    "remora zero 3": (
        2,
        {
            "method": {"name": "remora", "merge_every": 4, "operators": [6, 3, 4], "square_multiple": 2},
            "train": {"zero_stage": 3},
            "data": {"document_mask": True, "workers": 1},
        },
    ),
}
RESUMED_AT = 3
NO_RESULTS = ("seconds", "/digest", "/answers")  # metrics that are times, or what was scored


def main() -> None:
    commit = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    with worktree(commit) as before, tempfile.TemporaryDirectory(prefix="same_numbers-") as folder:
        if (ROOT / KERNELS).exists():  # otherwise both use torch operations
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=before, check=True, stderr=subprocess.DEVNULL)
            assert (before / KERNELS).exists(), "the kernels of that commit cannot be compiled here"
        different = compare(before, Path(folder))
    if different:
        raise SystemExit("\n".join(["not the same:", *different]))
    print(f"the same numbers as {commit}: {len(CELLS)} runs, and as many resumes from its checkpoints")


def compare(before: Path, folder: Path) -> list[str]:
    inputs = write_inputs(folder / "inputs")
    train_tokenizer(folder / "tokenizer")
    different = []
    for name, (ranks, sections) in CELLS.items():
        runs = {kind: folder / f"{name.replace(' ', '-')}-{kind}" for kind in ("before", "now", "resumed")}
        configs = {
            kind: run_config(inputs, str(folder / "tokenizer"), run, ranks, **sections) for kind, run in runs.items()
        }
        train(before, configs["before"], ranks)
        train(ROOT, configs["now"], ranks)
        copy_cut_at(runs["before"], runs["resumed"], RESUMED_AT)
        train(ROOT, configs["resumed"], ranks)
        for kind in ("now", "resumed"):
            different += [f"{name}, {kind}: {what}" for what in differences(runs["before"], runs[kind])]
        print(f"{name}: compared")
    return different


def train(checkout: Path, config: Any, ranks: int) -> None:
    run_dir = Path(config.train.run_dir)
    settings = run_dir.with_suffix(".yaml")
    settings.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master-port={free_port()}"]
    launcher = launcher if ranks > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *launcher, "launch/pretrain.py", str(settings)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {checkout} ended with {done.returncode}:\n{done.stderr}")


def differences(before: Path, after: Path) -> list[str]:
    """What differs between two runs, but for times, places and the settings themselves."""
    found = [] if numbers(before) == numbers(after) else ["metrics.jsonl"]
    for checkpoint in sorted((before / "checkpoints").glob("step-*")):
        other = after / "checkpoints" / checkpoint.name
        found += [f"{key} of {checkpoint.name}" for key in different_tensors(checkpoint, other)]
        if manifest(checkpoint) != manifest(other):
            found.append(f"manifest of {checkpoint.name}")
    return found


def numbers(run_dir: Path) -> dict[tuple[int, str], Any]:
    """What a run has logged, but for what depends on time."""
    return {
        (line["step"], tag): value
        for line in metrics(run_dir)
        for tag, value in line.items()
        if tag.partition("/")[0] in ("train", "eval", "merge") and not tag.endswith(NO_RESULTS)
    }


def manifest(checkpoint: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    # a field that is null may be missing in another version
    values["counters"] = {key: value for key, value in values["counters"].items() if value is not None}
    place = ("files", "checksum", "config", "data_fingerprint")  # the last one only older commits write
    return {key: value for key, value in values.items() if value is not None and key not in place}


if __name__ == "__main__":
    main()
