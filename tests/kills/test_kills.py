"""A run that is killed again and again, and restarted by the same command, ends as one that never was.

KILLS is the number of kills (``make test-kill``: 100), KILL_SEED makes a sequence again; the seed is printed.
"""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from relora_mora.checkpoint.reader import verify
from tests.tools.helpers import ROOT, wait_until
from tests.tools.jobs import Job, command_of, write_config
from tests.tools.ports import free_port
from tests.tools.runs import checkpoint_at, different_tensors, logged_steps, logged_values, run_config

pytestmark = pytest.mark.kills

KILLS = int(os.environ.get("KILLS", "2"))
SEED = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(10**6))
PHASES = ("launch", "start", "step", "evaluate", "merge", "save", "commit", "retire")
TARGETS = ("all ranks", "rank 0", "rank 1", "launch.py", "deepspeed")
STEPS = 60 if KILLS >= 10 else 24
# stages with the base of their weights, and the share of all kills; the last two only in a long proof
CASES = [(2, None, 0.5), (3, "int8", 0.3), *([(0, "int8", 0.1), (1, "int8", 0.1)] if KILLS >= 10 else [])]


class Loop:
    """One run, which is started by the same command until it comes to its end."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.config, self.run_dir, self.phases = folder / "run.yaml", folder / "run", folder / "phases.txt"
        self.rng, self.port = rng, free_port()
        self.jobs: list[Job] = []

    def start(self) -> Job:
        self.phases.write_text("")
        os.environ["VICTIM_PHASES"] = str(self.phases)
        self.jobs.append(Job(self.config, script=ROOT / "tests" / "kills" / "victim.py", port=self.port))
        return self.jobs[-1]

    def kill_once(self) -> str | None:
        """Starts the job and kills some of it at a random moment: which; None if it came to its end before."""
        rng, job = self.rng, self.start()
        phase, target = rng.choice(PHASES), rng.choice(TARGETS)
        count = rng.randint(1, 2 if phase == "start" else 6)  # each rank starts once, and does the rest often
        delay = rng.uniform(0, 8) if phase == "launch" else rng.expovariate(1 / 0.02)

        def is_time() -> bool:
            return job.process.poll() is not None or self.phases.read_text().split().count(phase) >= count

        if phase != "launch":
            wait_until(is_time, 120, lambda: job.output, poll_seconds=0.002)
        time.sleep(delay)
        if job.process.poll() is not None:
            assert job.wait() == 0, job.output
            return None
        found = [psutil.Process(job.process.pid)]
        if target == "launch.py":
            found = [p for p in job.processes() if "deepspeed.launcher.launch" in command_of(p)] or found
        elif target != "deepspeed":
            ranks = (0, 1) if target == "all ranks" else (int(target[-1]),)
            found = [p for p in map(job.find_rank, ranks) if p is not None] or found
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):  # it came to its end in this moment
                process.send_signal(signal.SIGKILL)
        if rng.random() < 0.7 or "rank" in target:
            job.wait_for_nobody(45)  # ranks look for their launcher after their imports
        # otherwise the next start finds processes of this one and waits for them
        return f"{phase}: {target}"

    def finish(self) -> None:
        job = self.start()
        assert job.wait(240) == 0, job.output
        for started in self.jobs:
            started.wait_for_nobody(10)


@pytest.mark.parametrize("stage,base,share", CASES)
def test_a_killed_run_ends_like_an_uninterrupted_one(inputs, tokenizer_path, tmp_path, stage, base, share):
    rng = random.Random(f"{SEED}/{stage}")
    unused = _unused_shared_memory()

    def loop(name: str) -> Loop:
        made = Loop(tmp_path / name, rng)
        made.config.parent.mkdir()
        config = run_config(
            inputs,
            tokenizer_path,
            made.run_dir,
            2,
            train={"steps": STEPS, "precision": "bf16", "zero_stage": stage, "peer_timeout_seconds": 30.0},
            method={"merge_every": 3, "base": base, "base_products": True},
            checkpoint={"every_steps": 2, "keep_last": 2},
            eval={"every_steps": 4, "max_tokens": 300},
            data={"workers": 1},
        )
        write_config(config, made.config)
        return made

    reference = loop("reference")
    reference.finish()
    wanted = max(1, round(KILLS * share))
    kills: Counter[str] = Counter()
    rounds = 0
    print(f"\nKILL_SEED={SEED}, ZeRO-{stage}: {wanted} kills")
    while kills.total() < wanted:
        killed = loop(f"round{rounds}")
        while kills.total() < wanted and (what := killed.kill_once()):
            kills[what] += 1
        killed.finish()
        rounds += 1
        _compare(reference.run_dir, killed.run_dir)
    for what, count in sorted(kills.items()):
        print(f"  {count:3d} x {what}")
    print(f"{kills.total()} kills in {rounds} runs, all ended bit-equal")
    assert _unused_shared_memory() <= unused


def _unused_shared_memory() -> set[Path]:
    """What no process has mapped, as one that was killed leaves it; without semaphores of others, which come and go."""
    found = [path for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.mp-")]
    mapped: set[int] = set()  # inodes: a semaphore had another name when it was mapped
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended
            mapped |= {int(line.split()[4]) for line in path.read_text().splitlines() if " /dev/shm/" in line}
    return {path for path in found if path.exists() and path.stat().st_ino not in mapped}


def _compare(reference: Path, run_dir: Path) -> None:
    assert different_tensors(*(checkpoint_at(folder, STEPS) for folder in (reference, run_dir))) == []
    kept = [checkpoint_at(run_dir, step) for step in (STEPS - 2, STEPS)]
    assert sorted((run_dir / "checkpoints").iterdir()) == [run_dir / "checkpoints" / "latest", *kept]
    for checkpoint in kept:
        verify(checkpoint)
    assert logged_values(reference) == logged_values(run_dir)
    assert logged_steps(reference) == logged_steps(run_dir) == list(range(1, STEPS + 1))
