"""Answers that a run generates at its evaluations: the same on every ZeRO stage, and training does not see them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.uuid_pairs import uuid_pairs
from relora_mora.config.schema import Config
from relora_mora.tokenizer.load import load_tokenizer
from relora_mora.weights.export import export
from tests.tools.data_tools import write_json_lines
from tests.tools.grids import rest
from tests.tools.runs import checkpoint_at, metrics, run_config, tensors, train, write_inputs

pytestmark = pytest.mark.distributed

PAIRS = 6
TAGS = ("eval/exact_match", "eval/character_accuracy")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("pairs"))
    rows = [
        {"prompt": f"{row['prompt'][:7]}\n", "completion": row["completion"][: 4 + number]}
        for number, row in enumerate(uuid_pairs(PAIRS, 0))
    ]
    write_json_lines(folder / "pairs.jsonl", rows)
    return folder


def memory(inputs: Path, tokenizer: str, run_dir: Path, world_size: int = 1, **sections: dict[str, Any]) -> Config:
    """Learns all pairs in each step; what is held out is what is learned."""
    pairs = str(inputs / "pairs.jsonl")
    changes: dict[str, dict[str, Any]] = {
        "data": {
            "train": pairs,
            "validation": pairs,
            "records": {"kind": "prompt"},
            "packing": "none",
            "sequence_length": 60,
            "lanes": 2,
        },
        "method": {"name": "mora", "rank": 8, "operators": [1]},
        "optim": {"warmup_steps": 5, "lr": 1e-2, "lr_other": 1e-2},
        "train": {"steps": 6, "batch_size": PAIRS, "micro_batch_size": 1},
        "eval": {"every_steps": 3, "generate": 4},
        "checkpoint": {"every_steps": 0},
    }
    for section, values in sections.items():
        changes[section] |= values
    return run_config(inputs, tokenizer, run_dir, world_size, **changes)


def generated(run_dir: Path) -> list[list[float]]:
    return [[line[tag] for tag in TAGS] for line in metrics(run_dir) if TAGS[0] in line]


@pytest.mark.more
def test_a_chat_that_was_learned_stops_by_itself_in_plain_transformers(pools, inputs, tokenizer_path, tmp_path):
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    rows = [json.loads(line) for line in (inputs / "pairs.jsonl").read_text().splitlines()[:3]]
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in rows
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"messages": each}) for each in turns))
    data = {"train": str(chats), "validation": str(chats), "records": {"kind": "messages", "template": "chatml"}}
    sections = {"data": data, "train": {"steps": 70, "micro_batch_size": 6}, "eval": {"every_steps": 0}}
    pools(1)(train, memory(inputs, str(tmp_path / "tokenizer"), tmp_path / "run", **sections))
    assert generated(tmp_path / "run")[-1] == [1.0, 1.0]
    export(tmp_path / "run", tmp_path / "out")
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for turn in turns:
        ids = plain.apply_chat_template(turn[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        found = model.generate(**ids, max_new_tokens=50, do_sample=False, pad_token_id=plain.eos_token_id)
        assert plain.decode(found[0, ids.input_ids.shape[1] :]) == turn[1]["content"] + "<|im_end|>"


@pytest.mark.more
@pytest.mark.parametrize("stage", [3, *rest((2,))])
def test_generation_does_not_affect_training(pools, inputs, tokenizer_path, tmp_path, stage):
    runs = {}
    for count in (0, 5):  # two ranks and one answer at a time: the last round has an answer only for the first rank
        runs[count] = tmp_path / f"run{count}"
        sections = {"train": {"zero_stage": stage}, "eval": {"generate": count, "at_start": False}}
        pools(2)(train, memory(inputs, tokenizer_path, runs[count], 2, **sections))
    without, with_answers = (tensors(checkpoint_at(runs[count], 6)) for count in (0, 5))
    assert without.keys() == with_answers.keys()
    assert all(torch.equal(with_answers[key], without[key]) for key in without)
    assert not generated(runs[0])
    assert len(generated(runs[5])) == 2
