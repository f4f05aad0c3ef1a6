"""Writes problems of mathematics in words, which the package reasoning-gym makes: training and held-out text of a task.

    pip install -e '.[math]'
    python launch/reasoning_data.py data/gsm_symbolic --count=20000

They are those of GSM-Symbolic (arXiv 2410.05229): templates of GSM8K with other names and numbers.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

try:
    from relora_mora.cli.command import run
    from relora_mora.system.files import new_folder
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None


def problems(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Records of the kind ``question``, no question twice; an answer is its steps and, behind ``####``, the number.

    A seed gives the same problems with the same version of the package.
    """
    import reasoning_gym

    seen: set[str] = set()
    for entry in reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=count):
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield {"question": entry["question"], "answer": entry["metadata"]["answer_cot"]}


def main(out: str, *, count: int = 20_000, held_out: int = 500, seed: int = 0) -> None:
    """Writes OUT/train.jsonl and OUT/validation.jsonl.

    Args:
        out: the folder to write; it must be new or empty
        count: problems to make; those that come twice are left out
        held_out: how many of them are for validation
        seed: of the problems
    """
    if not 1 <= held_out < count:
        raise ValueError(f"--held_out: got {held_out} of --count={count}, expected at least 1 and fewer than these")
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("reasoning-gym is not installed: pip install -e '.[math]', in the checkout")
    lines = [f"{json.dumps(record)}\n" for record in problems(count, seed)]
    if len(lines) <= held_out:
        raise ValueError(
            f"--count: of {count} problems {len(lines)} are different, no more than are held out; raise it"
        )
    sides = {"validation": lines[:held_out], "train": lines[held_out:]}
    with new_folder(Path(out)) as folder:
        for name, part in sides.items():
            (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    print(f"wrote {len(sides['train']):,} problems to learn and {len(sides['validation']):,} held out to {out}")


if __name__ == "__main__":
    run(main)
