"""A host that is cut off in the middle of a run, as by a pulled cable: no reset, no signal, only silence."""

import time

import pytest

from tests.cluster.runs import SAVE_EVERY, STEPS, deepspeed, losses, on_one_host, starts
from tests.tools.jobs import ends, last_step

pytestmark = pytest.mark.cluster
ALLOWED = 10.0  # train.peer_timeout_seconds


def test_a_cut_link_ends_the_job_on_both_hosts_and_one_host_continues(pair, make, reference, tmp_path):
    config = make(2, peer_timeout_seconds=ALLOWED)
    run_dir = config.parent / "run"
    first, second = pair
    job = deepspeed(first, config, tmp_path)
    job.wait_for_step(run_dir, 35)  # after a merge
    second.link("down")
    begin = time.monotonic()
    pair.wait_for_nobody(3 * ALLOWED + 15)
    assert job.wait(1) != 0
    print(f"ended {time.monotonic() - begin:.1f} s after the cut")
    found = {end["host"]: (end["code"], end["reason"].partition(" (")[0]) for end in ends(run_dir)}
    assert found == {"node1": (69, "rank 1 is gone"), "node2": (69, "rank 0 is gone")}  # for each it is the other
    trained = last_step(run_dir)
    assert 35 <= trained < STEPS
    again = on_one_host(first, config, ranks=1)  # the link stays down
    assert again.wait() == 0, again.output
    assert starts(run_dir) == [0, trained // SAVE_EVERY * SAVE_EVERY]
    assert losses(run_dir) == pytest.approx(losses(reference(2) / "run"), rel=1e-5)  # of the same batches
