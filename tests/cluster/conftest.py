from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Pair, skip, why_not
from tests.cluster.runs import on_one_host, write_run
from tests.tools.runs import write_inputs

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if reason := why_not():
        skip(f"two hosts on one machine: {reason}")
    pair = Pair(tmp_path_factory.mktemp("hosts"))
    yield pair
    pair.close()


@pytest.fixture
def pair(two_hosts: Pair) -> Iterator[Pair]:
    """The two hosts, without anything that a test before this one has left."""
    yield two_hosts
    two_hosts.clear()


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: str) -> Make:
    """``make(stage, **train)``: a new run's YAML file, in a folder of its own."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))
    return lambda stage=2, **train: write_run(tmp_path_factory.mktemp("run"), inputs, tokenizer_path, stage, **train)


@pytest.fixture(scope="session")
def reference(two_hosts: Pair, make: Make) -> Callable[[int], Path]:
    """``reference(stage)``: the folder of a run on two ranks of one host that nothing happened to."""
    done: dict[int, Path] = {}

    def run(stage: int) -> Path:
        if stage not in done:
            config = make(stage)
            job = on_one_host(two_hosts.hosts[0], config, ranks=2)
            assert job.wait() == 0, job.output
            done[stage] = config.parent
        return done[stage]

    return run
