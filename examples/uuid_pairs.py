"""Writes the pairs of the memory task, each a UUID with another UUID as its answer. See docs/tasks.md.

python examples/uuid_pairs.py data/uuid.jsonl --pairs=10000 --seed=0
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

try:
    from relora_mora.cli.arguments import NonNegativeInt, PositiveInt
    from relora_mora.cli.command import run
    from relora_mora.system.files import write_synced
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None


Kind = Literal["prompt", "messages"]


def uuid_pairs(pairs: int, seed: int, kind: Kind = "prompt") -> Iterator[dict[str, Any]]:
    """Records of the kind ``data.records.kind``. For a seed, the first pairs are the same for any number of pairs.

    A prompt ends in a newline, which no tokenizer merges with the digits after it.
    """
    # this generator gives the same numbers in every version of Python and on every machine
    generator = random.Random(seed)
    for _ in range(pairs):
        key, value = (uuid.UUID(int=generator.getrandbits(128), version=4) for _ in range(2))
        if kind == "prompt":
            yield {"prompt": f"{key}\n", "completion": str(value)}
        else:
            turns = (("user", key), ("assistant", value))
            yield {"messages": [{"role": role, "content": str(content)} for role, content in turns]}


def main(out: str, *, pairs: PositiveInt = 10_000, seed: NonNegativeInt = 0, kind: Kind = "prompt") -> None:
    """Writes the pairs as JSON lines, the same bytes everywhere.

    Args:
        out: the file to write, such as data/uuid.jsonl; it must not exist yet
        pairs: number of pairs
        seed: seed of the pairs
        kind: what a line holds: prompt and completion, or messages of a conversation (docs/data.md, Records)
    """
    path = Path(out)
    if path.exists():
        raise FileExistsError(f"{out}: File exists; give a new file, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_synced(path, "".join(f"{json.dumps(pair)}\n" for pair in uuid_pairs(pairs, seed, kind)))
    print(f"wrote {pairs:,} pairs to {out}")


if __name__ == "__main__":
    run(main)
