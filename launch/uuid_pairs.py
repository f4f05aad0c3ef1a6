"""Writes the pairs of the memory task, each a UUID that is to be answered with another one. See docs/tasks.md.

python launch/uuid_pairs.py data/uuid.jsonl --pairs=10000 --seed=0
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    from relora_mora.cli import run
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None


def uuid_pairs(pairs: int, seed: int) -> Iterator[dict[str, str]]:
    """Records of the kind ``prompt``. The first pairs of a seed are the same whatever their number.

    A prompt ends in a newline, which no tokenizer joins with the digits behind it.
    """
    # of all generators of Python this one gives the same numbers in every version and on every machine
    generator = random.Random(seed)
    for _ in range(pairs):
        key, value = (uuid.UUID(int=generator.getrandbits(128), version=4) for _ in range(2))
        yield {"prompt": f"{key}\n", "completion": str(value)}


def main(out: str, *, pairs: int = 10_000, seed: int = 0) -> None:
    """Writes the pairs as JSON lines, the same bytes everywhere.

    Args:
        out: the file to write, such as data/uuid.jsonl; it must not be there yet
        pairs: how many
        seed: of the pairs
    """
    if pairs < 1:
        raise ValueError(f"--pairs: got {pairs}, expected at least 1")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(pair)}\n" for pair in uuid_pairs(pairs, seed))
    print(f"wrote {pairs:,} pairs to {out}")


if __name__ == "__main__":
    run(main)
