"""Between a stop and a resume nothing is lost: place in the data, what was about to happen, what there is to go back
to."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relora_mora.data.sources.resolve import configured_shards
from relora_mora.data.tokens.folder import make_tokens
from tests.tools.faulty_server import serving
from tests.tools.runs import Stopped, different_tensors, metrics, run_config, train, write_inputs
from tests.train.state.faults import NAN, fault_settings, faulty, same_run, spiked

pytestmark = pytest.mark.distributed
SPIKES = {"spike_window": 8, "spike_deviations": 20.0, "on_spike": "rollback"}


def stopped(config: Any, *, where: str = "start", number: int = 0) -> int:
    """Trains on every rank until rank 1 is asked to stop: at the start, in the last evaluation, or after global batch
    ``number``, whose loss is a spike. Returns the exit code, as a signal would give it."""
    from relora_mora.supervise.guard import Guard
    from relora_mora.train.loop.events import Evaluating
    from relora_mora.train.loop.loop import Trainer
    from relora_mora.train.pretrain import pretrain

    guard = Guard(signals=False)
    train_step = Trainer.train_step
    stop_evaluation = Evaluating._stop

    def ask(rank: int) -> None:
        if rank == 1:
            guard.stop_reason = "the test"

    def after_the_spike(self: Trainer, share: Any) -> Any:
        result = train_step(self, share)
        if self.state.step == number:
            ask(self.rank)
            result = replace(result, loss=result.loss + (1000.0 if self.rank == 1 else 0.0))
        return result

    def in_the_last_evaluation(self: Evaluating, step: int) -> bool:
        if step == self.config.train.steps:
            ask(self.engine.rank)
        return stop_evaluation(self, step)

    if where == "start":
        guard.stop_reason = "the test"
    elif where == "spike":
        Trainer.train_step = after_the_spike  # type: ignore[method-assign]
    else:
        Evaluating._stop = in_the_last_evaluation  # type: ignore[method-assign]
    try:
        return pretrain(config, guard)
    finally:
        Trainer.train_step = train_step  # type: ignore[method-assign]
        Evaluating._stop = stop_evaluation  # type: ignore[method-assign]


def _manifest(run_dir: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return found


def test_a_resume_in_a_new_folder_that_stops_before_its_first_step_keeps_its_data_position(
    pools, inputs, tokenizer_path, tmp_path
):
    never, first, second = (tmp_path / name for name in ("never", "first", "second"))
    pools(2)(train, run_config(inputs, tokenizer_path, never, 2))
    pools(2)(train, run_config(inputs, tokenizer_path, first, 2), stop_after=5)
    taken = run_config(inputs, tokenizer_path, second, 2, train={"resume": str(first)})
    assert pools(2)(stopped, taken) == [75, 75]
    assert _manifest(second, 5)["data_state"] == _manifest(first, 5)["data_state"]
    pools(2)(train, run_config(inputs, tokenizer_path, second, 2))
    assert different_tensors(*(folder / "checkpoints" / "step-00000010" for folder in (never, second))) == []


@pytest.mark.parametrize(
    ("section", "setting", "value", "expected"),
    [
        ("method", "merge_every", 5, "has made 2 merges, with these settings a run at step 4 has made 0"),
        ("method", "operators", [2, 1], "was made with operator 1, the settings say 2 after step 4"),
        ("train", "steps", 3, "train.steps: the checkpoint is already at step 4"),
    ],
)
def test_a_resume_that_cannot_be_allowed_is_refused_and_moves_no_checkpoint(
    pools, inputs, tokenizer_path, tmp_path, section, setting, value, expected
):
    config = run_config(inputs, tokenizer_path, tmp_path / "run", method={"merge_every": 2})
    pools(1)(train, config, stop_after=6)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    back = {
        "train": {
            "resume": str(tmp_path / "run" / "checkpoints" / "step-00000004"),
            "allow_changes": [f"{section}.{setting}"],
        },
        "method": {"merge_every": 2},
    }
    back[section][setting] = value
    (message,) = pools(1)(_refused, run_config(inputs, tokenizer_path, tmp_path / "run", **back))
    assert expected in message
    assert "step-00000004" in message
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == checkpoints


def test_a_checkpoint_without_a_data_position_is_refused(pools, inputs, tokenizer_path, tmp_path):
    from relora_mora.checkpoint.layout import content_checksum

    config = run_config(inputs, tokenizer_path, tmp_path / "run")
    pools(1)(train, config, stop_after=2)
    for step in (1, 2):
        values = _manifest(tmp_path / "run", step) | {"data_state": {}}
        del values["checksum"]
        path = tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "manifest.json"
        path.write_text(json.dumps(values | {"checksum": content_checksum(values)}))
    (message,) = pools(1)(_refused, config)
    assert "does not hold its position in the data" in message


def test_a_spike_of_the_last_step_is_flagged_and_the_run_is_saved(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    assert pools(2)(spiked, fault_settings(folder, inputs, tokenizer_path, **SPIKES), 10) == ["", ""]
    assert [line["step"] for line in metrics(folder) if "train/loss_spike" in line] == [10]
    assert _manifest(folder, 10)["step"] == 10
    assert not (folder / "rollbacks.json").exists()


def test_a_stop_right_after_a_spike_does_not_change_the_rollback(pools, inputs, tokenizer_path, tmp_path):
    reference, folder = tmp_path / "reference", tmp_path / "run"
    pools(2)(faulty, fault_settings(reference, inputs, tokenizer_path, **SPIKES), {}, drop=(7, 8))
    config = fault_settings(folder, inputs, tokenizer_path, **SPIKES)
    assert pools(2)(stopped, config, where="spike", number=8) == [75, 75]
    saved = _manifest(folder, 8)
    assert "standard deviations" in saved["counters"]["trouble"]
    assert (saved["merges_done"], saved["operator"]) == (1, 2), "the merge of step 8 was not made"
    assert pools(2)(faulty, config, {}) == ["", ""]
    assert same_run(folder, reference)
    (entry,) = json.loads((folder / "rollbacks.json").read_text())
    assert (entry["step"], entry["at"]) == (6, 8)


def test_a_resume_repeats_a_last_evaluation_that_was_stopped(pools, inputs, tokenizer_path, tmp_path):
    config = run_config(inputs, tokenizer_path, tmp_path / "run", 2, eval={"every_steps": 0, "at_start": False})
    assert pools(2)(stopped, config, where="evaluation") == [75, 75]
    assert not [line for line in metrics(tmp_path / "run") if "eval/loss" in line]
    pools(2)(train_without_text, config)
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval/loss" in line] == [10]


def test_a_repeated_evaluation_that_was_not_saved_has_its_lines_once(pools, inputs, tokenizer_path, tmp_path):
    config = run_config(inputs, tokenizer_path, tmp_path / "run", 2, eval={"every_steps": 0, "at_start": False})
    assert pools(2)(stopped, config, where="evaluation") == [75, 75]
    pools(2)(killed_in_the_save, config)
    pools(2)(train, config)
    lines = metrics(tmp_path / "run")
    saves = [line["step"] for line in lines if "perf/checkpoint_stall_seconds" in line]
    assert saves == [*range(1, 11), 10]  # the second one has the evaluation
    assert [line["step"] for line in lines if "eval/loss" in line] == [10]


def killed_in_the_save(config: Any) -> None:
    """As by a kill after the line that the next save writes, and before that is whole."""
    from relora_mora.checkpoint.writer import CheckpointWriter
    from relora_mora.train.loop.events import Saving

    save = Saving.save

    def cut_off(self: Saving, state: Any) -> None:
        save(self, state)
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "save", lambda *_: 0.0)
        patch.setattr(Saving, "save", cut_off)
        train(config)


def train_without_text(config: Any) -> None:
    from relora_mora.train.loop.loop import Trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "next_batch", lambda self: pytest.fail("no step is left that needs a batch"))
        train(config)


def test_a_line_of_metrics_over_several_steps_is_the_same_after_a_stop(pools, inputs, tokenizer_path, tmp_path):
    found = []
    for stop in (None, 3, 7):
        config = run_config(inputs, tokenizer_path, tmp_path / f"run{stop}", 2, log={"every_steps": 5})
        if stop:
            pools(2)(train, config, stop_after=stop)
        pools(2)(train, config)
        lines = [line for line in metrics(tmp_path / f"run{stop}") if "train/loss" in line]
        found.append([(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines])
    assert [line[0] for line in found[0]] == [5, 10]
    for lines in found[1:]:
        assert lines == [pytest.approx(line, rel=1e-12) for line in found[0]]


def test_the_checkpoint_to_go_back_to_outlives_the_bad_steps(pools, inputs, tokenizer_path, tmp_path):
    """Step 6 is the first of a row and is saved: retention would keep only it."""
    config = fault_settings(tmp_path / "run", inputs, tokenizer_path)
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep_last": 1})})
    assert pools(2)(faulty, config, {6: float("nan"), 7: float("nan")}) == ["", ""]
    (entry,) = json.loads((tmp_path / "run" / "rollbacks.json").read_text())
    assert (entry["step"], entry["at"]) == (3, 7)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")) == ["step-00000010"]


def test_two_rollbacks_to_the_same_step_are_both_remembered(pools, inputs, tokenizer_path, tmp_path):
    bad = {number: float("nan") for number in (4, 5, 6, 7)}
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    pools(2)(faulty, fault_settings(reference, inputs, tokenizer_path), {}, drop=(4, 5, 6, 7))
    config = fault_settings(killed, inputs, tokenizer_path, max_rollbacks=2)
    pools(2)(faulty, config, bad, stop_at=(2, 5))
    assert [entry["step"] for entry in json.loads((killed / "rollbacks.json").read_text())] == [3, 3]
    assert pools(2)(faulty, config, bad) == ["", ""]
    assert same_run(killed, reference)
    assert not [line for line in metrics(killed) if "train/skipped_steps" in line], "nothing bad was read again"


def test_a_resume_from_a_named_checkpoint_starts_another_history(pools, inputs, tokenizer_path, tmp_path):
    """Rollbacks after that checkpoint are forgotten, and a checkpoint that was about to get its name is abandoned."""
    clean, folder = tmp_path / "clean", tmp_path / "run"
    pools(2)(faulty, fault_settings(clean, inputs, tokenizer_path), {})
    pools(2)(faulty, fault_settings(folder, inputs, tokenizer_path), NAN)
    third = folder / "checkpoints" / "step-00000003"
    shutil.copytree(folder / "checkpoints" / "step-00000009", folder / "checkpoints" / "step-00000009.new")
    again = fault_settings(folder, inputs, tokenizer_path, resume=str(third))
    assert pools(2)(stopped, again) == [75, 75]
    assert not (folder / "rollbacks.json").exists()
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000003\n"
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert "abandoned-step-00000009" in names
    assert not names & {"step-00000009", "step-00000009.new", "step-00000010"}
    assert pools(2)(faulty, fault_settings(folder, inputs, tokenizer_path), {}) == ["", ""]
    assert same_run(folder, clean)


# ---- another tokenizer, other data ------------------------------------------------------------------------------


def _refused(config: Any) -> str:
    from relora_mora.checkpoint.layout import CheckpointError
    from relora_mora.train.pretrain import pretrain

    with pytest.raises(CheckpointError) as caught:
        pretrain(config)
    return str(caught.value)


def test_the_tokenizer_in_a_checkpoint_is_the_one_of_its_fingerprint(
    pools, inputs, tokenizer_path, other_tokenizer, tmp_path
):
    from relora_mora.tokenizer.identity import tokenizer_fingerprint

    folder = tmp_path / "run"
    pools(1)(
        train, run_config(inputs, other_tokenizer, folder), stop_after=0
    )  # the wrong one, noticed before the first checkpoint
    assert tokenizer_fingerprint(folder / "tokenizer") == tokenizer_fingerprint(other_tokenizer)
    pools(1)(train, run_config(inputs, tokenizer_path, folder), stop_after=2)
    expected = tokenizer_fingerprint(tokenizer_path)
    for place in (folder, folder / "checkpoints" / "step-00000002"):
        assert tokenizer_fingerprint(place / "tokenizer") == expected
    assert _manifest(folder, 2)["tokenizer_fingerprint"] == expected
    (message,) = pools(1)(_refused, run_config(inputs, other_tokenizer, folder))
    assert "tokenizer" in message
    assert "--train.allow_changes=[tokenizer]" in message
    assert "allow_changes=[data]" not in message
    pools(1)(train, run_config(inputs, other_tokenizer, folder, train={"allow_changes": ["tokenizer"]}), stop_after=3)
    assert tokenizer_fingerprint(folder / "checkpoints" / "step-00000003" / "tokenizer") == tokenizer_fingerprint(
        other_tokenizer
    )


def test_another_end_of_document_is_another_tokenizer(pools, inputs, tokenizer_path, tmp_path):
    """With the same vocabulary, so that the fingerprint of the Hugging Face folder is the same."""
    from relora_mora.tokenizer.files import MODEL_FILE
    from relora_mora.tokenizer.identity import save_tokenizer, tokenizer_fingerprint
    from relora_mora.tokenizer.load import load_tokenizer

    first = tmp_path / "first"
    save_tokenizer(tokenizer_path, first)
    (first / MODEL_FILE).unlink()
    other = tmp_path / "other"
    shutil.copytree(first, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings["eos_token"] = settings["bos_token"] = "<s>"
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(other)
    before, after = (load_tokenizer(folder).eos_token_id for folder in (first, other))
    assert before != after
    pools(1)(train, run_config(inputs, str(first), tmp_path / "run"), stop_after=2)
    (message,) = pools(1)(_refused, run_config(inputs, str(other), tmp_path / "run"))
    assert f"documents ended with token {before}" in message
    assert f"they end with {after}; to allow it: '--train.allow_changes=[tokenizer]'" in message


def test_other_data_needs_permission_and_is_read_from_its_beginning(pools, inputs, tokenizer_path, tmp_path):
    other, folder, fresh = write_inputs(tmp_path / "other"), tmp_path / "run", tmp_path / "fresh"
    for path in sorted((other / "train").iterdir())[1:]:
        path.unlink()  # a smaller source: old places may not exist in it
    pools(1)(train, run_config(inputs, tokenizer_path, folder), stop_after=6)
    (message,) = pools(1)(_refused, run_config(other, tokenizer_path, folder))
    assert "data: other sources" in message
    assert "--train.allow_changes=[data]" in message
    pools(1)(train, run_config(other, tokenizer_path, folder, train={"allow_changes": ["data"]}), stop_after=8)
    assert len(_manifest(folder, 8)["counters"]["losses"]) == 2  # no spike is judged by losses of the other text
    pools(1)(train, run_config(other, tokenizer_path, fresh), stop_after=2)
    assert _manifest(folder, 8)["data_state"] == _manifest(fresh, 2)["data_state"]
    pools(1)(train, run_config(other, tokenizer_path, folder))  # no change any more
    assert _manifest(folder, 10)["step"] == 10


def test_another_setting_of_the_data_needs_one_permission(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    pools(1)(train, run_config(inputs, tokenizer_path, folder), stop_after=2)
    changed = {"seed": 5, "max_bad_fraction": 0.5}
    (message,) = pools(1)(_refused, run_config(inputs, tokenizer_path, folder, data=changed))
    assert "data.seed: " in message
    assert message.count("to allow it") == 1
    pools(1)(
        train,
        run_config(inputs, tokenizer_path, folder, data=changed, train={"allow_changes": ["data.seed"]}),
        stop_after=3,
    )


def test_a_fixed_shard_is_continued_from_the_same_line(pools, inputs, tokenizer_path, tmp_path):
    repaired, folder, never = tmp_path / "repaired", tmp_path / "run", tmp_path / "never"
    shutil.copytree(inputs, repaired)
    pools(1)(train, run_config(repaired, tokenizer_path, never))
    pools(1)(train, run_config(repaired, tokenizer_path, folder), stop_after=4)
    for path in (repaired / "train").iterdir():
        path.write_bytes(
            gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1)
        )  # the same lines, another size
    (message,) = pools(1)(_refused, run_config(repaired, tokenizer_path, folder))
    assert "files that have changed" in message
    pools(1)(train, run_config(repaired, tokenizer_path, folder, train={"allow_changes": ["data"]}))
    assert different_tensors(*(run / "checkpoints" / "step-00000010" for run in (never, folder))) == []


def test_a_run_can_switch_between_text_and_pre_tokenized_text(pools, inputs, tokenizer_path, tmp_path):
    never, folder = tmp_path / "never", tmp_path / "run"
    text = run_config(inputs, tokenizer_path, folder)
    tokens = {}
    for split in ("train", "validation"):
        tokens[split] = str(tmp_path / split)
        shards = configured_shards(text.data, split)
        make_tokens(shards, Path(tokens[split]), config=text.data, tokenizer_path=tokenizer_path, processes=1)
    pools(1)(train, run_config(inputs, tokenizer_path, never))
    pools(1)(train, text, stop_after=3)
    pools(1)(train, run_config(inputs, tokenizer_path, folder, data=tokens), stop_after=7)
    pools(1)(train, text)
    assert different_tensors(*(run / "checkpoints" / "step-00000010" for run in (never, folder))) == []
    losses = [[line["eval/loss"] for line in metrics(run) if "eval/loss" in line] for run in (never, folder)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def _plain_copy(inputs: Path, folder: Path) -> Path:
    """The same inputs with training text that is not compressed, so that its letters can change and its size not."""
    shutil.copytree(inputs, folder)
    for path in (folder / "train").iterdir():
        path.write_bytes(gzip.decompress(path.read_bytes()))
    return folder


def _swap_letters(folder: Path) -> None:
    for path in (folder / "train").iterdir():
        path.write_bytes(path.read_bytes().replace(b"merge", b"rerge"))


def test_other_text_of_the_same_names_and_sizes_needs_permission_and_keeps_its_lines(
    pools, inputs, tokenizer_path, tmp_path
):
    first = _plain_copy(inputs, tmp_path / "first")
    swapped = _plain_copy(inputs, tmp_path / "swapped")
    folder = tmp_path / "run"
    pools(1)(train, run_config(first, tokenizer_path, folder), stop_after=4)
    pools(1)(train, run_config(swapped, tokenizer_path, folder), stop_after=5)  # a copy is the same
    _swap_letters(swapped)
    (message,) = pools(1)(_refused, run_config(swapped, tokenizer_path, folder))
    assert message.count("  - ") == 1
    assert "files that have changed; to allow it: '--train.allow_changes=[data]'" in message
    changed = {"data": {"seed": 5}, "train": {"allow_changes": ["data.seed"]}}
    (message,) = pools(1)(_refused, run_config(swapped, tokenizer_path, folder, **changed))
    assert "files that have changed" in message  # a setting that differs explains no other text
    allowed = run_config(swapped, tokenizer_path, folder, train={"allow_changes": ["data"]})
    pools(1)(train, allowed, stop_after=6)
    before, after = (_manifest(folder, step)["data_state"] for step in (5, 6))
    assert all(after[lane]["documents"] >= before[lane]["documents"] > 0 for lane in before)
    pools(1)(train, run_config(swapped, tokenizer_path, folder), stop_after=7)  # no change any more


def test_the_first_rank_asks_the_server_for_the_content_of_all_files(pools, inputs, tokenizer_path, tmp_path):
    served, folder = _plain_copy(inputs, tmp_path / "served"), tmp_path / "run"
    with serving(served) as server:
        data = {"train": f"{server.url}/train/part-{{00000..00002}}.json.gz"}
        config = run_config(inputs, tokenizer_path, folder, 2, data=data)
        pools(2)(train, config, stop_after=2)
        assert sorted(server.heads) == [f"/train/part-0000{n}.json.gz" for n in range(3)]
        pools(2)(train, config, stop_after=3)
        _swap_letters(served)
        first, second = pools(2)(_refused, config)
        assert first == second
        assert "files that have changed; to allow it: '--train.allow_changes=[data]'" in first
        assert len(server.heads) == 9


@pytest.fixture(scope="module")
def begun(pools, inputs, tokenizer_path, tmp_path_factory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    pools(1)(train, run_config(inputs, tokenizer_path, folder), stop_after=1)
    return folder


def test_a_method_with_the_same_adapter_continues_if_allowed(pools, inputs, tokenizer_path, tmp_path):
    """With its moments and its place in the data; from then on it merges."""
    folder = tmp_path / "run"
    lora = {"name": "lora", "merge_every": 4}
    pools(1)(train, run_config(inputs, tokenizer_path, folder, method=lora), stop_after=3)
    relora = run_config(
        inputs, tokenizer_path, folder, method=lora | {"name": "relora"}, train={"allow_changes": ["method.name"]}
    )
    pools(1)(train, relora)
    assert [line["step"] for line in metrics(folder) if "train/loss" in line] == list(range(1, 11))
    assert [line["step"] for line in metrics(folder) if "merge/layers" in line] == [4, 8]


@pytest.mark.parametrize(
    "what,change,says",
    [
        ("model", {"model": {"overrides": {"rms_norm_eps": 1e-3}}}, "model: rms_norm_eps is"),
        ("operators", {"method": {"operators": [2, 1]}}, "method.operators: [1, 2] in the checkpoint, [2, 1] now"),
        ("precision", {"train": {"precision": "bf16"}}, "train.precision: 'fp32' in the checkpoint, 'bf16' now"),
        ("sequence", {"data": {"sequence_length": 16}}, "data.sequence_length: 32 in the checkpoint, 16 now"),
        (
            "method",
            {"method": {"name": "mora", "merge_every": 2000}},
            "to allow these changes: '--train.allow_changes=[method.merge_every,method.name]'",
        ),
        (
            "another adapter",
            {"method": {"name": "relora"}, "train": {"allow_changes": ["method.name"]}},
            "method.name: 'remora' in the checkpoint, 'relora' now; the checkpoint holds the state of what trained by",
        ),
    ],
)
def test_settings_that_would_change_the_result_are_refused(pools, inputs, tokenizer_path, begun, what, change, says):
    (message,) = pools(1)(_refused, run_config(inputs, tokenizer_path, begun, **change))
    assert says in message, message
