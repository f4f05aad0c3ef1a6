"""Steps of two hosts over slow links: ``make bench-cluster``, as root. Prints launch.benchmark's table for each link.

Both hosts are on this machine and share its cores, so the time without a limit is the time of the arithmetic
with one core per rank.
"""

import itertools
import sys
import tempfile
from pathlib import Path

from tests.cluster.hosts import Pair, why_not
from tests.cluster.runs import Command

MODEL = ["configs/model/llama_130m.json", "--layers=4", "--vocab_size=8192"]
STEPS = ["--methods=full,remora", "--tokens=512", "--sequence_length=256", "--rank=128"]
LINKS = {"no limit": 5, "1gbit": 5, "100mbit": 3}  # measured steps of each method


def main() -> None:
    if reason := why_not("tc"):
        raise SystemExit(f"two hosts on one machine: {reason}")
    with tempfile.TemporaryDirectory() as name:
        pair = Pair(Path(name))
        try:
            for stage, link in itertools.product((1, 2), LINKS):
                print(f"ZeRO-{stage}, {link}\n{measure(pair, stage, link)}", flush=True)
        finally:
            pair.close()


def measure(pair: Pair, stage: int, link: str) -> str:
    """The first rank's tables of a job with a rank on each host."""
    ranks = []
    for number, host in enumerate(pair):
        limit = "" if link == "no limit" else f" rate {link} burst 128kb latency 100ms"  # of what a host sends
        host.run(*f"tc qdisc replace dev eth0 root {'tbf' if limit else 'noqueue'}{limit}".split())
        place = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
        words = ["steps", *MODEL, *STEPS, f"--zero_stage={stage}", f"--repeats={LINKS[link]}"]
        log = pair.folder / f"zero{stage}.{link}.{host.name}.log"
        ranks.append(Command(host, log, sys.executable, "-m", "launch.benchmark", *words, **place))
    for rank in ranks:
        if rank.wait(900) != 0:
            raise SystemExit(rank.output)
    return "\n".join(ranks[0].output.splitlines()[-4:-1])


if __name__ == "__main__":
    main()
