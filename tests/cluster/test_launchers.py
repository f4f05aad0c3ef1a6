"""The same run, started on two hosts, is bit for bit the one of a single host with as many ranks."""

import pytest

from tests.cluster.runs import deepspeed, same_end, torchrun
from tests.tools.grids import rest

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("stage", [3, *rest((2,), mark="long")])
def test_deepspeed_trains_across_both_hosts(pair, make, reference, tmp_path, stage):
    config = make(stage)
    before = pair.hosts[1].sent_bytes()
    job = deepspeed(pair.hosts[0], config, tmp_path)
    job.wait_for_step(config.parent / "run", 1)
    assert pair.hosts[0].rank(0).pid
    assert pair.hosts[1].rank(1).pid
    assert job.wait() == 0, job.output
    assert pair.hosts[1].sent_bytes() - before > 1e6
    pair.wait_for_nobody(10)
    assert same_end(reference(stage) / "run", config.parent / "run")


def test_torchrun_trains_across_both_hosts(pair, make, reference):
    config = make(2)
    jobs = [torchrun(host, config) for host in pair]
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].output + jobs[1].output
    pair.wait_for_nobody(10)
    assert same_end(reference(2) / "run", config.parent / "run")
