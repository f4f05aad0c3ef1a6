"""Fixtures with the names of those that the tests know, for the device that is tested: TEST_DEVICE, cuda or cpu."""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.tools.pool import Pool, Pools

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
RANKS = torch.cuda.device_count() if DEVICE == "cuda" else 2
gpu_only = pytest.mark.skipif(DEVICE == "cpu", reason="TEST_DEVICE=cpu: it is about GPUs alone")


class DevicePools(Pools):
    """Skips what needs more GPUs than there are."""

    def __call__(self, world_size: int) -> Pool:
        if world_size > RANKS:
            pytest.skip(f"{world_size} ranks need as many GPUs, and there is {RANKS}")
        return super().__call__(world_size)


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = DevicePools(DEVICE)
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def cpu_pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def ranks() -> int:
    return min(2, RANKS)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE)
