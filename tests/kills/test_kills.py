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
from relora_mora.config.schema import Config
from tests.tools.helpers import ROOT
from tests.tools.jobs import Job, command_of, write_config
from tests.tools.runs import different_tensors, logged_steps, logged_values, run_config, write_inputs

pytestmark = pytest.mark.kills

KILLS = int(os.environ.get("KILLS", "2"))
SEED = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(10**6))
PHASES = ("launch", "start", "step", "evaluate", "merge", "save", "commit", "retire")
TARGETS = ("all ranks", "rank 0", "rank 1", "launch.py", "deepspeed")
STEPS = 60 if KILLS >= 10 else 24


# stages with the base of their weights, and the share of all kills; the last two only in a long proof
CASES = [(2, None, 0.5), (3, "int8", 0.3), *([(0, "int8", 0.1), (1, "int8", 0.1)] if KILLS >= 10 else [])]


def _config(inputs: Path, tokenizer: str, run_dir: Path, stage: int, base: str | None) -> Config:
    return run_config(
        inputs,
        tokenizer,
        run_dir,
        2,
        train={"steps": STEPS, "precision": "bf16", "zero_stage": stage, "peer_timeout_seconds": 30.0},
        method={"merge_every": 3, "base": base, "base_products": True},
        checkpoint={"every_steps": 2, "keep_last": 2},
        eval={"every_steps": 4, "max_tokens": 300},
        data={"workers": 1},
    )


class Loop:
    """One run folder, killed until it has had its share of kills."""

    def __init__(
        self, inputs: Path, tokenizer: str, folder: Path, stage: int, base: str | None, rng: random.Random
    ) -> None:
        self.rng, self.run_dir = rng, folder / "run"
        self.config = write_config(_config(inputs, tokenizer, self.run_dir, stage, base), folder / "run.yaml")
        self.phases = folder / "phases.txt"
        os.environ["VICTIM_PHASES"] = str(self.phases)
        self.kills: Counter[str] = Counter()
        self.jobs: list[Job] = []
        self.port = 0

    def start(self) -> Job:
        self.phases.write_text("")
        job = Job(self.config, script=ROOT / "tests" / "kills" / "victim.py", port=self.port or None)
        self.port = job.port  # the same command
        self.jobs.append(job)
        return job

    def kill_once(self) -> bool:
        """Starts the job and kills some of it at a random moment; False when it came to its end before."""
        rng, job = self.rng, self.start()
        phase, target = rng.choice(PHASES), rng.choice(TARGETS)
        count = rng.randint(1, 2 if phase == "start" else 6)  # each rank starts once, and does the rest often
        delay = rng.expovariate(1 / 0.02)
        if phase == "launch":
            delay = rng.uniform(0, 8)
            phase_seen = True
        else:
            phase_seen = self._await(job, phase, count)
        time.sleep(delay)
        if not phase_seen or job.process.poll() is not None:
            assert job.wait(60) == 0, job.output
            return False
        self._kill(job, target)
        if rng.random() < 0.7 or target in ("all ranks", "rank 0", "rank 1"):
            job.wait_for_nobody(45)  # ranks look for their launcher after their imports
        # otherwise the next start finds processes of this one and waits for them
        self.kills[f"{phase}: {target}"] += 1
        return True

    def _await(self, job: Job, phase: str, count: int) -> bool:
        deadline = time.monotonic() + 120
        while self.phases.read_text().split().count(phase) < count:
            if job.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"no {phase} in 120 s\n{job.output}"
            time.sleep(0.002)
        return True

    def _kill(self, job: Job, target: str) -> None:
        found = [psutil.Process(job.process.pid)]
        if target == "launch.py":
            found = [p for p in job.processes() if "deepspeed.launcher.launch" in command_of(p)] or found
        elif target != "deepspeed":
            ranks = {"all ranks": (0, 1), "rank 0": (0,), "rank 1": (1,)}[target]
            found = [p for p in map(job.find_rank, ranks) if p is not None] or found
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):  # it came to its end in this moment
                process.send_signal(signal.SIGKILL)

    def finish(self) -> None:
        job = self.start()
        assert job.wait(240) == 0, job.output
        for started in self.jobs:
            started.wait_for_nobody(10)


@pytest.mark.parametrize("stage,base,share", CASES)
def test_a_killed_run_ends_like_an_uninterrupted_one(tokenizer_path, tmp_path, stage, base, share):
    rng = random.Random(f"{SEED}/{stage}")
    unused = _unused_shared_memory()
    inputs = write_inputs(tmp_path / "inputs")
    reference = tmp_path / "reference"
    reference.mkdir()
    Loop(inputs, tokenizer_path, reference, stage, base, rng).finish()
    wanted = max(1, round(KILLS * share))
    kills: Counter[str] = Counter()
    rounds = 0
    print(f"\nKILL_SEED={SEED}, ZeRO-{stage}: {wanted} kills")
    while kills.total() < wanted:
        folder = tmp_path / f"round{rounds}"
        folder.mkdir()
        loop = Loop(inputs, tokenizer_path, folder, stage, base, rng)
        while kills.total() + loop.kills.total() < wanted and loop.kill_once():
            pass
        loop.finish()
        kills += loop.kills
        rounds += 1
        _compare(reference / "run", loop.run_dir)
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
    last = f"step-{STEPS:08d}"
    assert different_tensors(*(folder / "checkpoints" / last for folder in (reference, run_dir))) == []
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["latest", f"step-{STEPS - 2:08d}", last]
    for name in names[1:]:
        verify(run_dir / "checkpoints" / name)
    losses = [logged_values(folder) for folder in (reference, run_dir)]
    assert losses[0] == losses[1]
    assert logged_steps(reference) == logged_steps(run_dir) == list(range(1, STEPS + 1))
