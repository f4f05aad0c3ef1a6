"""Ranks that were given different things, or share no run folder, do not train; a data worker that hangs is missed."""

import errno
import os
import signal
from typing import Any

import pytest

from tests.tools.each import each
from tests.tools.runs import checkpoint_at, metrics, run_config

pytestmark = pytest.mark.distributed


def with_a_stopped_worker(config: Any) -> str:
    """Rank 1 stops its data worker after step 3, as a debugger or a disk that does not answer would. Returns the
    error's text."""
    from relora_mora.train.loop import step as loading
    from relora_mora.train.loop.loop import Trainer
    from relora_mora.train.pretrain import pretrain
    from relora_mora.train.state.run_state import TrainingError

    train_step = Trainer.train_step

    def step(self: Trainer, share: Any) -> Any:
        result = train_step(self, share)
        if self.state.step == 3 and self.rank == 1:
            os.kill(self.data._workers[0].pid, signal.SIGSTOP)
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError) as caught:
        patch.setattr(Trainer, "train_step", step)
        patch.setattr(loading, "WORKER_SECONDS", 0.0)
        pretrain(config)
    return str(caught.value)


@pytest.mark.stops
def test_a_data_worker_that_hangs_ends_the_run_with_its_state_saved(runs, pools, tmp_path):
    folder = tmp_path / "run"
    data = {"workers": 1, "timeout_seconds": 3.0, "prefetch_batches": 1}
    settings = {
        "data": data,
        "train": {"steps": 200},
        "checkpoint": {"every_steps": 0},
        "eval": {"every_steps": 0, "at_start": False},
    }
    first, second = pools(2)(with_a_stopped_worker, runs.config(folder, 2, **settings))
    assert first == second
    assert "data worker " in first
    assert " hangs: it has done nothing for " in first
    step = metrics(folder)[-1]["step"]
    assert step >= 3
    assert (checkpoint_at(folder, step) / "manifest.json").exists()


def of_two_hosts(config: Any, other: Any, *, finds: str = "") -> str:
    """Runs on every rank; the second one has other settings, or finds another content at the same paths. Returns the
    error's text."""
    from relora_mora.train.begin import inputs
    from relora_mora.train.pretrain import pretrain

    second = os.environ["RANK"] == "1"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) as caught:
        if second and finds:
            patch.setattr(inputs, finds, lambda *_: "another")
        pretrain(other if second else config)
    assert getattr(caught.value, "same_on_all_ranks", False), "the others do not learn that this rank is gone"
    return str(caught.value)


@pytest.mark.parametrize("what", ["settings", "content_of", "tokenizer"])
def test_ranks_with_different_inputs_do_not_train(runs, pools, inputs, tokenizer_path, other_tokenizer, tmp_path, what):
    config = runs.config(tmp_path / "run", 2)
    optim = {"lr": 1e-3} if what == "settings" else {}
    different = run_config(
        inputs, other_tokenizer if what == "tokenizer" else tokenizer_path, tmp_path / "run", 2, optim=optim
    )
    first, second = pools(2)(of_two_hosts, config, different, finds=what if what == "content_of" else "")
    expected = {"settings": "optim.lr", "tokenizer": "the tokenizer"}.get(what, "the training data")
    assert first == second
    assert "rank 1 (" in first
    assert expected in first
    assert "start all ranks with the same command" in first
    assert not (tmp_path / "run" / "checkpoints").exists()


def agreed_memory(config: Any) -> float:
    from relora_mora.distributed.collectives import from_first_rank
    from relora_mora.train.begin import inputs

    rank = int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "memory_of_rank", lambda: 1e12 - rank)
        opened = from_first_rank(lambda: inputs.open_inputs(config, 2))
        return inputs.agree(opened, config, rank).memory


def test_all_ranks_choose_forms_by_the_memory_of_the_smallest(runs, pools, tmp_path):
    assert pools(2)(agreed_memory, runs.config(tmp_path / "run", 2)) == [1e12 - 1] * 2


@each("what", ["model", "tokenizer"])
def test_a_file_missing_on_one_host_is_reported_by_the_first_rank(runs, pools, tmp_path, what):
    """Only the first rank reads the files of the model."""
    gone = str(tmp_path / "gone")
    config = runs.config(tmp_path / "run", 2)
    changed = {"config": gone} if what == "model" else {"path": gone}
    section = getattr(config, what).model_copy(update=changed)
    other = config.model_copy(update={what: section})
    first, second = pools(2)(of_two_hosts, config, other)
    assert first == second
    assert "rank 1 (" in first
    assert ("model.config" if what == "model" else gone) in first
    assert "rank 0" not in first
    first, second = pools(2)(of_two_hosts, other, other)
    assert first == second
    assert gone in first
    assert "rank" not in first
    assert not (tmp_path / "run").exists()


def together(errors: list[Exception | None]) -> tuple[str, str, bool]:
    """What ``on_all_ranks`` makes of an outcome of each rank."""
    from relora_mora.distributed.collectives import on_all_ranks

    def outcome() -> str:
        error = errors[int(os.environ["RANK"])]
        if error is not None:
            raise error
        return "done"

    try:
        return on_all_ranks(outcome), "", False
    except (ValueError, OSError) as error:
        return type(error).__name__, str(error), getattr(error, "same_on_all_ranks", False)


def test_faults_of_several_ranks_become_one_end(pools):
    stale = OSError(errno.ESTALE, "Stale file handle", "a.json")
    for errors, expected in (
        ([None, None], [("done", "", False)] * 2),
        ([None, stale], [("OSError", str(stale), True)] * 2),  # it ends with the code that starts a job again
        ([ValueError("in /tmp/x1"), ValueError("in /tmp/x2")], [("ValueError", f"in /tmp/x{n}", True) for n in (1, 2)]),
    ):
        assert pools(2)(together, errors) == expected
    for kind, text, same in pools(2)(together, [None, ValueError("gone")]):
        assert kind == "RanksError"
        assert same
        assert text.startswith("rank 1 (")
        assert text.endswith("not all ranks: gone")


def on_folders_of_their_own(config: Any) -> str:
    """As ``of_two_hosts``, with a run folder that rank 1 does not share."""
    from relora_mora.train.begin import run_folder as agreement

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "APPEAR_SECONDS", 0.5)
        if os.environ["RANK"] == "1":
            patch.setattr(agreement, "_content", lambda file: None)
        return of_two_hosts(config, config)


@pytest.mark.more
def test_a_run_folder_that_the_hosts_do_not_share_is_refused(runs, pools, tmp_path):
    first, second = pools(2)(on_folders_of_their_own, runs.config(tmp_path / "run", 2))
    assert first == second
    assert "train.run_dir: " in first
    assert "put it on a file system that all hosts share" in first
