"""A tiny run on records: it learns only answers, counts epochs, and resumes bit by bit on another number of ranks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from relora_mora.config.load import dump
from relora_mora.tokenizer.load import load_tokenizer
from tests.tools.commands import EVALUATE, PRETRAIN, call, refused
from tests.tools.data_tools import write_json_lines
from tests.tools.each import each
from tests.tools.runs import (
    LLAMA,
    checkpoint_at,
    copy_cut_at,
    different_tensors,
    logged_values,
    metrics,
    run_config,
    train,
)

pytestmark = pytest.mark.distributed
STEPS = 6
KEYS = ("train/loss", "eval/loss", "train/documents", "train/epoch", "perf/data_skipped/no_answer")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    for name, numbers in (("train", range(120)), ("validation", range(200, 220))):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"the rank {number}" * (1 + number % 2)},
                    {"role": "assistant", "content": "" if number % 40 == 7 else "matrix " * (1 + number % 3)},
                ]
            }
            for number in numbers
        ]
        write_json_lines(folder / f"{name}.jsonl", rows)
    (folder / "own.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] + ':' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    (folder / "model.json").write_text(json.dumps(LLAMA))
    return folder


def _config(inputs: Path, tokenizer: str, run_dir: Path, world_size: int, **data: Any) -> Any:
    return run_config(
        inputs,
        tokenizer,
        run_dir,
        world_size,
        data={
            "train": str(inputs / "train.jsonl"),
            "validation": str(inputs / "validation.jsonl"),
            "records": {"kind": "messages", "template": str(inputs / "own.jinja")},
            "sequence_length": 64,
            "max_bad_fraction": 0.1,
            **data,
        },
        method={"name": "mora", "train_embeddings": False, "train_norms": False, "train_head": False},
        train={"steps": STEPS, "zero_stage": 2},
        eval={"every_steps": 3, "max_tokens": None},
    )


def _seen(run_dir: Path) -> list[dict[str, Any]]:
    lines = [{key: line[key] for key in KEYS if key in line} for line in metrics(run_dir)]
    return [line for line in lines if line]


def test_an_interrupted_run_continues_bit_for_bit(pools, inputs, tokenizer_path, tmp_path):
    whole = tmp_path / "whole"
    pools(2)(train, _config(inputs, tokenizer_path, whole, 2))
    copy_cut_at(whole, tmp_path / "cut", 3)
    pools(2)(train, _config(inputs, tokenizer_path, tmp_path / "cut", 2))
    assert different_tensors(*(checkpoint_at(run, STEPS) for run in (whole, tmp_path / "cut"))) == []
    assert _seen(tmp_path / "cut") == _seen(whole)
    losses = [line["train/loss"] for line in _seen(whole) if "train/loss" in line]
    assert losses[-1] < losses[0] < math.log(320) + 0.3
    last = [line for line in metrics(whole) if "train/documents" in line][-1]
    assert last["train/documents"] > STEPS * 8
    assert not any("eval/bits_per_byte" in line for line in metrics(whole))


def test_steps_inside_a_prompt_report_no_loss(pools, inputs, tokenizer_path, tmp_path):
    rows = [{"prompt": f"{number} " + "the rank " * 10, "completion": "matrix"} for number in range(30)]
    write_json_lines(tmp_path / "a.jsonl", rows)
    data = {"train": str(tmp_path / "a.jsonl"), "validation": str(tmp_path / "a.jsonl"), "records": {"kind": "prompt"}}
    config = _config(inputs, tokenizer_path, tmp_path / "run", 1, **data, lanes=1, packing="stream", sequence_length=16)
    sizes = config.train.model_copy(update={"batch_size": 1, "micro_batch_size": 1, "steps": 16})
    seldom = config.checkpoint.model_copy(update={"every_steps": 0})
    evaluation = config.eval.model_copy(update={"every_steps": 0, "at_start": False, "max_tokens": 64})
    pools(1)(train, config.model_copy(update={"train": sizes, "checkpoint": seldom, "eval": evaluation}))
    losses = logged_values(tmp_path / "run")
    assert 0 < len(losses) < 12
    assert min(losses) > 0.5


def test_rows_of_a_run_can_be_shown_before_it_starts(inputs, tokenizer_path, tmp_path):
    config = _config(inputs, tokenizer_path, tmp_path / "run", 1)
    (tmp_path / "run.yaml").write_text(dump(config))
    answer = call(PRETRAIN, tmp_path / "run.yaml", "--show=1")
    assert answer.code == 0
    assert not (tmp_path / "run").exists()
    first, conversation, *_, share = answer.out.replace("·", "").splitlines()
    assert first.startswith("--- row 1: ")
    assert conversation == "u:the rank 0a:[matrix ]"
    assert share.endswith("tokens are scored (the first 117 rows; left out: no_answer: 3)")


@each(
    ("override", "message"),
    [
        (
            "records={kind: text}",
            'has no "text", only messages (set data.text_column to the key of the texts, or data.records',
        ),
        ("records.kind=sharegpt", 'has no "conversations" (data.records.columns), only messages'),
        (
            "sequence_length=4",
            "none of 120 records can be used (over_length: 117, no_answer: 3); for instance train.jsonl, line ",
        ),
        ("max_bad_fraction=0", "1 of 8 records cannot be used, more than data.max_bad_fraction (0); the last one: "),
    ],
)
def test_unusable_records_are_reported_before_the_model_is_built(inputs, tokenizer_path, tmp_path, override, message):
    (tmp_path / "run.yaml").write_text(dump(_config(inputs, tokenizer_path, tmp_path / "run", 1)))
    refused(call(PRETRAIN, tmp_path / "run.yaml", f"--data.{override}"), message)
    assert not (tmp_path / "run").exists()


def _evaluated(*argv: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(call(EVALUATE, *argv).out.splitlines()[-1])
    return answer


@pytest.mark.more
@pytest.mark.parametrize("named", [True, False], ids=["template named", "template of the run"])
def test_the_command_scores_the_answers_that_the_run_scored(pools, inputs, tokenizer_path, tmp_path, named):
    held_out = {"source": str(inputs / "validation.jsonl"), **({} if named else {"records": {"kind": "messages"}})}
    config = _config(inputs, tokenizer_path, tmp_path / "run", 1, validation=[held_out])
    pools(1)(train, config)
    assert load_tokenizer(tmp_path / "run" / "tokenizer").chat_template == (inputs / "own.jinja").read_text()
    lines = [line for line in metrics(tmp_path / "run") if "eval/loss" in line]
    aside = (inputs / "own.jinja").rename(inputs / "aside.jinja")  # the run has what is in it
    try:
        seen = _evaluated(tmp_path / "run")
    finally:
        aside.rename(inputs / "own.jinja")
    assert seen["loss"] == pytest.approx(lines[-1]["eval/loss"], rel=1e-5)
    assert seen["tokens"] == lines[-1]["eval/tokens"]
    assert "bits_per_byte" not in seen
    everything = _evaluated(tmp_path / "run", "--data.records.score=all")
    assert (everything["tokens"] > seen["tokens"]) is named


def of_both(counts: list[dict[str, int]]) -> dict[str, int]:
    """Called by all ranks; each has its own counts."""
    from torch import distributed

    from relora_mora.train.log.report import data_metrics

    return data_metrics(counts[distributed.get_rank()], ["a"], 4)


def test_epochs_done_are_those_of_the_slowest_lane_of_all_ranks(pools):
    counts = [{"epoch": 2, "epoch/a": 1, "documents": 5}, {"epoch": 1, "epoch/a": 3, "documents": 6}]
    for found in pools(2)(of_both, counts):
        assert (found["train/epoch"], found["train/epoch/a"], found["train/documents"]) == (1, 1, 11)
