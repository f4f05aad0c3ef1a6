"""Step times of two hosts over slow links: ``make bench-cluster``, as root. Prints the table of docs/performance.md.

Both hosts are on this machine and share its cores, so the time without a limit is the time of the arithmetic
with one core per rank.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cluster.hosts import Pair, why_not
from tests.cluster.runs import Command

REDUCED = {"zero_optimization": {"use_multi_rank_bucket_allreduce": False}}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "full, gradients to their owners only": {"method": "full", "deepspeed": REDUCED},
    "relora": {"method": "relora"},
    "remora": {"method": "remora"},
    "remora, gradients to their owners only": {"method": "remora", "deepspeed": REDUCED},
    "the same, head tied to the embeddings": {
        "method": "remora",
        "deepspeed": REDUCED,
        "overrides": {"tie_word_embeddings": True},
    },
}
RATES = {"none": 5, "1gbit": 5, "100mbit": 3}  # steps of each method
BITS = {"1gbit": 1e9, "100mbit": 1e8}
PLAN: dict[str, Any] = {
    "model": "configs/model/llama_130m.json",
    "overrides": {"num_hidden_layers": 4, "vocab_size": 8192},
    "sequences": 2,
    "length": 256,
    "rank": 128,
    "variants": VARIANTS,
    "rates": RATES,
}


def measure(pair: Pair, folder: Path, stage: int) -> dict[str, Any]:
    ranks = []
    for number, host in enumerate(pair):
        place = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
        given = json.dumps(PLAN | {"stage": stage})
        log = folder / f"zero{stage}.{host.name}.log"
        ranks.append(Command(host, log, sys.executable, "-m", "tests.cluster.link_steps", given, **place))
    for rank in ranks:
        if rank.wait(900) != 0:
            raise SystemExit(rank.output)
    found: dict[str, Any] = json.loads(ranks[0].output.splitlines()[-1])
    return found


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| ZeRO | link | | step, s (fastest to slowest) | ratio | MB sent by a rank | transfer not hidden |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        free = {row["variant"]: statistics.median(row["seconds"]) for row in result["rows"] if row["rate"] == "none"}
        full: dict[str, float] = {}
        for row in result["rows"]:
            rate, seconds, sent = row["rate"], statistics.median(row["seconds"]), statistics.median(row["sent"])
            full.setdefault(rate, seconds)
            exposed = f"{(seconds - free[row['variant']]) / (8 * sent / BITS[rate]):.0%}" if rate in BITS else ""
            link = "no limit" if rate == "none" else f"{rate} ({row['way']})"
            times = f"{seconds:.2f} ({min(row['seconds']):.2f} to {max(row['seconds']):.2f})"
            cells = [result["stage"], link, row["variant"], times, f"{seconds / full[rate]:.2f}", f"{sent / 1e6:.1f}"]
            lines.append(f"| {' | '.join(map(str, [*cells, exposed]))} |")
    trained = "; ".join(
        f"{row['variant']}: {row['trainable']:,}" for row in results[0]["rows"] if row["rate"] == "none"
    )
    return "\n".join([*lines, "", f"Trained parameters, {'bf16' if results[0]['bf16'] else 'fp32'}: {trained}."])


def main() -> None:
    if reason := why_not("tc"):
        raise SystemExit(f"two hosts on one machine: {reason}")
    with tempfile.TemporaryDirectory() as name:
        pair = Pair(Path(name))
        try:
            print(table([measure(pair, Path(name), stage) for stage in (1, 2)]))
        finally:
            pair.close()


if __name__ == "__main__":
    main()
