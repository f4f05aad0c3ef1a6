"""Whole runs: five methods, warm start, export, evaluation, metrics, accumulation, faults of the user."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from relora_mora.config.registry import METHODS
from relora_mora.data.sets.held_out import load_eval_set
from relora_mora.evaluation.loss import causal_lm_loss, evaluate
from relora_mora.system.run_folder import read_json_lines
from relora_mora.weights.digests import model_digests
from relora_mora.weights.export import export
from tests.tools.commands import PRETRAIN, call
from tests.tools.grids import rest
from tests.tools.helpers import ROOT
from tests.tools.runs import checkpoint_at, logged_steps, logged_values, metrics, run_config, tensors, train

pytestmark = pytest.mark.distributed
UNSAVED: dict[str, dict[str, Any]] = {"checkpoint": {"every_steps": 0}}  # but at the end


@pytest.fixture(scope="module")
def finished(pools, inputs, tokenizer_path, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each method, on two ranks."""
    folders = {method: tmp_path_factory.mktemp("runs") / method for method in METHODS}
    for method, folder in folders.items():
        pools(2)(
            train,
            run_config(
                inputs,
                tokenizer_path,
                folder,
                2,
                method={"name": method},
                log={"tensorboard": True},
                **UNSAVED,
            ),
        )
    return folders


@pytest.mark.more
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_documents_its_run(finished, method):
    folder = finished[method]
    lines = metrics(folder)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    merges = [line["step"] for line in lines if "merge/layers" in line]
    assert merges == ([4, 8] if METHODS[method].merges else [])
    if method == "remora":
        switches = [
            (line["merge/operator_before"], line["merge/operator_after"]) for line in lines if "merge/layers" in line
        ]
        assert switches == [(1, 2), (2, 1)]
    last = next(line for line in reversed(lines) if "train/loss" in line)
    assert last["train/tokens"] == 10 * 8 * 32
    assert last["perf/tokens_per_second"] > 0
    assert 0 < last["perf/mfu"] < 1
    assert last["train/perplexity"] == pytest.approx(math.exp(last["train/loss"]))
    for name in ("config.yaml", "model.json", "starts.jsonl", "tokenizer/tokenizer.model", "checkpoints/latest"):
        assert (folder / name).exists(), name
    assert list((folder / "tensorboard").glob("events.*"))
    start = json.loads((folder / "starts.jsonl").read_text().splitlines()[0])
    assert start["world_size"] == 2
    assert start["step"] == 0
    assert "torch" in start["versions"]


@pytest.mark.more
@pytest.mark.parametrize("method", METHODS)
def test_the_export_is_the_model_that_was_trained(finished, inputs, tokenizer_path, tmp_path, method):
    out = tmp_path / "export"
    checkpoint = export(finished[method], out)
    assert checkpoint.name == "step-00000010"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(out)
    assert type(lm).__name__ == "LlamaForCausalLM"
    assert not any("mora" in name or "lora" in name for name, _ in lm.named_parameters())
    config = run_config(inputs, tokenizer_path, tmp_path / "unused")
    data = load_eval_set(
        config.data.validation[""],
        config=config.data,
        tokenizer_path=tokenizer_path,
        sequence_length=32,
        max_tokens=200,
    )
    result = evaluate(causal_lm_loss(lm), data, micro_batch_size=3, device=torch.device("cpu"))
    logged = [line for line in metrics(finished[method]) if "eval/loss" in line][-1]
    assert (logged["step"], logged["eval/tokens"]) == (10, result.tokens)
    assert result.loss == pytest.approx(logged["eval/loss"], abs=2e-5)
    assert result.bits_per_byte == pytest.approx(result.nats / math.log(2) / data.utf8_bytes)
    text = "the rank of a größer matrix"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    with pytest.raises(FileExistsError, match="not empty"):
        export(finished[method], out)


@pytest.mark.more
@pytest.mark.parametrize("source", ["full", "remora", "export"])
def test_a_warm_start_begins_with_the_weights_of_the_other_run(
    pools, finished, inputs, tokenizer_path, tmp_path, source
):
    origin = finished["remora" if source == "export" else source]
    given = origin
    if source == "export":
        given = tmp_path / "export"
        export(origin, given)
    folder = tmp_path / "warm"
    config = run_config(inputs, tokenizer_path, folder, 2, model={"init_from": str(given)})
    pools(2)(train, config, stop_after=1)
    before = logged_values(origin, "eval/loss")[-1]
    after = logged_values(folder, "eval/loss")[0]
    assert after == pytest.approx(before, abs=2e-5)
    pools(2)(train, config, stop_after=2)  # resumes: no second start
    assert logged_steps(folder, "eval/loss") == [0]
    began, resumed = read_json_lines(folder / "starts.jsonl")
    assert model_digests(config.model).items() <= began["began_with"].items()
    assert began["began_with"].keys() >= {"model.init_from", "tokenizer.path", "data.train"}
    assert "began_with" not in resumed, "it has not read them"


def reads_of_validation(config: Any) -> int:
    """How often this rank reads the held-out text in a whole run."""
    from relora_mora.train.loop import events

    with mock.patch.object(events, "held_out", wraps=events.held_out) as read:
        train(config)
    return read.call_count


@pytest.mark.more
def test_one_rank_reads_the_held_out_text(pools, inputs, tokenizer_path, tmp_path):
    assert pools(2)(reads_of_validation, run_config(inputs, tokenizer_path, tmp_path / "run", 2, **UNSAVED)) == [1, 0]


@pytest.mark.more
def test_micro_batches_do_not_change_the_result(pools, inputs, tokenizer_path, tmp_path):
    losses = []
    for micro in (1, 4):
        folder = tmp_path / f"micro{micro}"
        pools(2)(train, run_config(inputs, tokenizer_path, folder, 2, train={"micro_batch_size": micro}, **UNSAVED))
        losses.append(logged_values(folder))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.more
@pytest.mark.parametrize("stage", [3, *rest((2,))])
def test_activation_checkpointing_does_not_change_the_result(pools, inputs, tokenizer_path, tmp_path, stage):
    losses = []
    for on in (False, True):
        folder = tmp_path / f"{on}"
        sections = {"model": {"activation_checkpointing": on}, "train": {"zero_stage": stage}, **UNSAVED}
        pools(2)(train, run_config(inputs, tokenizer_path, folder, 2, **sections))
        losses.append(logged_values(folder))
    assert losses[0] == losses[1]


def test_documents_can_be_kept_apart(pools, inputs, tokenizer_path, tmp_path):
    losses = []
    for on in (False, True):
        folder = tmp_path / f"{on}"
        pools(2)(
            train, run_config(inputs, tokenizer_path, folder, 2, data={"document_mask": on}, **UNSAVED), stop_after=2
        )
        losses.append(logged_values(folder))
    assert len(losses[1]) == 2
    assert losses[0][0] != losses[1][0]
    assert losses[0] == pytest.approx(losses[1], abs=0.3)


def test_retention_keeps_the_last_and_the_multiples(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    pools(2)(train, run_config(inputs, tokenizer_path, folder, 2, checkpoint={"keep_last": 2, "keep_every_steps": 4}))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["latest", *(f"step-{step:08d}" for step in (4, 8, 9, 10))]
    assert tensors(checkpoint_at(folder, 4))


def test_mistakes_end_before_anything_is_loaded_without_a_traceback(pools, inputs, tokenizer_path, tmp_path):
    remora = str(ROOT / "configs" / "run" / "tiny_remora.yaml")
    cases = [
        ([], "config"),
        ([str(tmp_path / "none.yaml")], "none.yaml"),
        ([remora, "--train.stepz=3", "--optim.lr=fast"], "did you mean steps?"),
        ([remora, "stray"], "stray"),
        (
            [remora, f"--tokenizer.path={tmp_path}", f"--train.run_dir={tmp_path / 'run'}"],
            "this folder has no tokenizer",
        ),
        (
            [
                remora,
                f"--tokenizer.path={tokenizer_path}",
                f"--data.train={tmp_path}/none-*.gz",
                f"--data.validation={inputs}/validation/*.json.gz",
                f"--train.run_dir={tmp_path / 'run'}",
            ],
            "none-*.gz",
        ),
    ]
    for arguments, says in cases:
        (answer,) = pools(1)(call, PRETRAIN, *arguments)
        assert answer.code == 2 and says in answer.err and "Traceback" not in answer.err, answer
        assert not (tmp_path / "run").exists()


@pytest.mark.more
@pytest.mark.parametrize("method", [*METHODS, "remora_paper"])
def test_every_tiny_config_trains_as_shipped(pools, inputs, tokenizer_path, tmp_path, method):
    """A few steps on other text, by the command that the README names."""
    arguments = [
        str(ROOT / "configs" / "run" / f"tiny_{method}.yaml"),
        f"--tokenizer.path={tokenizer_path}",
        f"--data.train={inputs}/train/*.json.gz",
        f"--data.validation={inputs}/validation/*.json.gz",
        f"--train.run_dir={tmp_path / 'run'}",
        "--train.steps=3",
        "--train.batch_size=4",
        "--train.micro_batch_size=2",
        "--data.sequence_length=32",
        "--data.workers=0",
        "--optim.warmup_steps=1",
        "--optim.restart_warmup_steps=1",
        "--method.merge_every=2",
        "--eval.max_tokens=200",
        "--log.every_steps=1",
    ]
    (answer,) = pools(1)(call, PRETRAIN, *arguments)
    assert answer.code == 0, answer
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "merge/layers" in line] == ([2] if method.startswith("re") else [])
    shutil.rmtree(tmp_path / "run")


def rates_of(config: Any) -> list[list[float]]:
    """The learning rates of each step, one for each parameter group."""
    from relora_mora.engine.engine import ZeroEngine

    step = ZeroEngine.step
    rates: list[list[float]] = []

    def noted(self: ZeroEngine, given: Any, loss: torch.Tensor) -> Any:
        rates.append(list(given))
        return step(self, given, loss)

    with mock.patch.object(ZeroEngine, "step", noted):
        train(config)
    return rates


def test_each_step_uses_the_rate_of_its_number(pools, inputs, tokenizer_path, tmp_path):
    """Two steps of warmup, and for the adapters only, two more after the merges of steps 4 and 8."""
    optim = {"schedule": "constant", "rewarm": "adapters"}
    [rates] = pools(1)(rates_of, run_config(inputs, tokenizer_path, tmp_path / "run", optim=optim, **UNSAVED))
    adapters = [0.01, 0.02, 0.02, 0.02, 0.01, 0.02, 0.02, 0.02, 0.01, 0.02]
    others = [0.005, *[0.01] * 9]
    assert rates == [[adapter, other, other] for adapter, other in zip(adapters, others, strict=True)]
    lines = [line for line in metrics(tmp_path / "run") if "train/lr" in line]
    assert [line["train/lr"] for line in lines] == adapters
    assert [line["train/lr_norms"] for line in lines] == [line["train/lr_embeddings"] for line in lines] == others
