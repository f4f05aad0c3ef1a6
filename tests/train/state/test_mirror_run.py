"""A run whose disk is lost goes on from its mirror, on another number of ranks, as if nothing had happened."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from relora_mora.checkpoint import mirror
from relora_mora.config.schema import Config
from tests.tools.grids import rest
from tests.tools.mirrors import wait_for
from tests.tools.runs import Runs, checkpoint_at, different_tensors, logged_values, train


def quickly(config: Config, stop_after: int | None = None) -> None:
    """Trains; a trainer that was killed does not have the mirror for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror, "SILENCE_SECONDS", 0.1)
        train(config, stop_after)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, *rest((1,))])
def test_a_run_that_lost_its_disk_continues_from_the_mirror(runs: Runs, pools: Any, tmp_path: Path, ranks: int) -> None:
    """It merges after steps 4 and 8, is killed after step 6, and goes on from what the mirror has of it."""
    whole = runs.config(tmp_path / "whole", ranks)
    pools(ranks)(train, whole)
    kept = {"mirror": str(tmp_path / "store"), "keep_last": 2, "every_steps": 2}
    lost = runs.config(tmp_path / "lost", ranks, checkpoint=kept)
    pools(ranks)(quickly, lost, stop_after=6)
    wait_for(lambda: (tmp_path / "store/manifests/step-00000006.json").exists())  # a thread sends, cut off or not
    wait_for(lambda: not list((tmp_path / "lost/checkpoints").glob("*.tmp")))
    wait_for(lambda: not (tmp_path / "store/owner.json").exists())
    shutil.rmtree(tmp_path / "lost")
    here = runs.config(tmp_path / "here", ranks, checkpoint=kept)
    pools(ranks)(quickly, here)
    losses = [logged_values(tmp_path / name) for name in ("whole", "here")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10
    assert different_tensors(checkpoint_at(tmp_path / "whole", 10), checkpoint_at(tmp_path / "here", 10)) == []
    there = {path.stem for path in (tmp_path / "store/manifests").iterdir()}
    assert {"step-00000010"} <= there <= {"step-00000008", "step-00000010"}, "a quick run may send only the newest"
    assert not (tmp_path / "store/owner.json").exists()
