from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


class Pools:
    def __init__(self) -> None:
        self.by_size: dict[int, Pool] = {}

    def __call__(self, world_size: int) -> Pool:
        if world_size not in self.by_size or self.by_size[world_size].is_broken:
            self.by_size[world_size] = Pool(world_size)
        return self.by_size[world_size]


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    for pool in pools.by_size.values():
        pool.close()
