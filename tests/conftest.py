"""Fixtures that several test modules use."""

import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from relora_mora.supervise.exits import STOP_SIGNALS
from tests.tools.helpers import ROOT
from tests.tools.jobs import kill_all
from tests.tools.pool import Pools, most_ranks
from tests.tools.tokenizer_tools import train_tokenizer

LOGS = ("relora_mora", "relora_mora.shared")
DEVICE = os.environ.get("TEST_DEVICE", "cpu")  # of the tests that tests/gpu lists: make test-gpu runs them on a GPU

settings.register_profile("patient", deadline=None)  # a busy machine makes nothing wrong
settings.load_profile("patient")
# several tests run at a time: the threads of one would wait for a core, busily, and cost the others time
os.environ["OMP_NUM_THREADS"] = "1"
os.environ |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")  # the servers of tests
gc.disable()  # until all tests are imported: collections would look at torch and transformers again and again

# a shell that starts the tests in the background has them ignore Ctrl-C, and so would every command that they try
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: at the end, processes that have nothing left wait for the longest file."""
    items.sort(key=lambda item: (item.get_closest_marker("distributed") is None, "tests/grid/" not in item.nodeid))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def no_job_outlives_its_test() -> Iterator[None]:
    yield
    kill_all()


@pytest.fixture(autouse=True)
def logging_is_put_back() -> Iterator[None]:
    """``setup_logging`` replaces the handlers, so later tests would see no log."""
    before = [(each, each.handlers[:], each.level, each.propagate) for each in map(logging.getLogger, LOGS)]
    yield
    for each, handlers, level, propagate in before:
        each.handlers[:] = handlers
        each.setLevel(level)
        each.propagate = propagate


@pytest.fixture(autouse=True)
def signals_are_put_back() -> Iterator[None]:
    """A trainer that ends here ignores them from then on, and so would each process that later tests start."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in the root of the repository, as paths in the shipped configs expect."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small sentencepiece model (byte fallback, 300 pieces), trained on the spot."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As large, trained on other text."""
    folder = tmp_path_factory.mktemp("other_tokenizer")
    train_tokenizer(folder, ["another text", "with other words", "of which some are long"])
    return str(folder)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and a model for tiny runs, which no test changes."""
    from tests.tools.runs import write_inputs  # with torch

    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def runs(pools: Pools, inputs: Path, tokenizer_path: str) -> Any:
    from tests.tools.runs import Runs  # with torch

    return Runs(pools, inputs, tokenizer_path)


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools(DEVICE)
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def ranks() -> int:
    """The number of ranks of a test that also works with one; fewer if there is only one GPU."""
    return min(2, most_ranks(DEVICE))


@pytest.fixture(scope="session")
def device() -> Any:
    """What a test computes on that tests/gpu runs on a GPU."""
    import torch

    return torch.device(DEVICE)
