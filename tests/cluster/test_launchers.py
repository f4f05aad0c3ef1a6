"""The same run, started on two hosts, is bit for bit the one of a single host with as many ranks."""

import pytest

from tests.cluster.runs import PRETRAIN, deepspeed, same_end, torchrun
from tests.tools.grids import rest

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("stage", [3, *rest((2,), mark="long")])
def test_deepspeed_trains_across_both_hosts(pair, make, reference, tmp_path, stage):
    config = make(stage)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    (tmp_path / ".deepspeed_env").write_text(
        "DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n"
    )  # in the home folder
    before = pair.hosts[1].sent_bytes()
    job = deepspeed(pair.hosts[0], config, f"--hostfile={hostfile}", PRETRAIN, str(config), HOME=str(tmp_path))
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
