"""Tasks of lm-evaluation-harness: local tasks against a count by hand, and one-line messages for what is missing."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from relora_mora.data.records.passages import passage_of
from relora_mora.evaluation.harness import TaskSettings, record, table
from relora_mora.evaluation.local_tasks import LOCAL_TASKS, local_task
from relora_mora.evaluation.score import ready_to_generate
from relora_mora.system.run_folder import RunFolder, read_json_lines
from relora_mora.tokenizer.load import load_tokenizer
from relora_mora.weights.export import export
from relora_mora.weights.load import find_model
from tests.evaluation.tools import CHOICES, QUESTIONS, own_task
from tests.tools.adapter_tools import write_adapter_folder
from tests.tools.checkpoints import write_checkpoint
from tests.tools.commands import EVALUATE, call, refused
from tests.tools.runs import LLAMA, checkpoint_at
from tests.tools.shared import needs_lm_eval
from tests.tools.tokenizer_tools import save_bytes_tokenizer

pytestmark = pytest.mark.more


@pytest.fixture
def model(tmp_path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=257, max_position_embeddings=1024, initializer_range=0.3, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    save_bytes_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def nats(lm: LlamaForCausalLM, tokenizer: Any, prompt: str, answer: str) -> float:
    before = tokenizer(prompt).input_ids
    ids = torch.tensor([before + tokenizer(answer).input_ids])
    with torch.no_grad():
        chances = lm(ids).logits.log_softmax(-1)
    return sum(float(chances[0, place - 1, ids[0, place]]) for place in range(len(before), ids.shape[1]))


def test_a_run_keeps_the_scores_of_its_tasks(tmp_path):
    results = {"local_uuid": {"exact_match": 0.5, "character_accuracy": 0.75}}
    record(tmp_path, 10, results, TaskSettings(["local_uuid"]))
    few = TaskSettings(["local_uuid"], num_fewshot=5, limit=100)
    record(tmp_path, 20, {"local_uuid": {"exact_match": 0.25}}, few)
    lines = read_json_lines(RunFolder(tmp_path).tasks)
    assert [(line["step"], line["num_fewshot"], line["limit"]) for line in lines] == [(10, None, None), (20, 5, 100)]
    assert [line["tasks/local_uuid/exact_match"] for line in lines] == [0.5, 0.25]
    assert few.tagged(results)["tasks/local_uuid/exact_match/5-shot/first-100"] == 0.5
    assert table(results).splitlines()[1].split() == ["local_uuid", "exact_match", "0.5000"]


def test_options_without_effect_are_refused(model):
    refused(call(EVALUATE, model, "--tasks=local_uuid", "--data=x.jsonl"), "--data: only used for text")
    for option in ("--data.document_mask=true", "--data.records.kind=prompt"):
        refused(call(EVALUATE, model, "--tasks=local_uuid", option), f"{option.partition('=')[0]}: only used for text")
    refused(call(EVALUATE, model, "--data=x.jsonl", "--limit=3"), "--limit: only used with --tasks")
    refused(call(EVALUATE, model, "--tasks=local_uuid", "--limit=0"), "--limit: got 0; ")
    refused(call(EVALUATE, model, "--tasks=hellaswag", "--task_data=x"), "--task_data: only local tasks use it")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_message_says_how_to_install_it(model):
    refused(call(EVALUATE, model, "--tasks=local_uuid"), "--tasks: lm-evaluation-harness is not installed", "[eval]")


# ---- with lm-eval: make test-extras ----------------------------------------------------------------------------------


@needs_lm_eval
def test_scores_of_tasks_equal_a_count_by_hand(model, data):
    answer = call(EVALUATE, model, f"--tasks={own_task(data)},{','.join(LOCAL_TASKS)}", f"--task_data={data}")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out.splitlines()[-1])["tasks"]
    lm = LlamaForCausalLM.from_pretrained(model).eval()
    tokenizer = load_tokenizer(model)
    right = 0
    for row in QUESTIONS:
        chances = {each: nats(lm, tokenizer, f"Question: {row['question']}\nAnswer:", f" {each}") for each in CHOICES}
        right += max(CHOICES, key=lambda each, chances=chances: chances[each]) == row["answer"]
    assert found["own"]["acc"] == right / 4
    assert found["local_gsm8k"] == {"exact_match/strict": 0.0, "exact_match/flexible": 0.0}
    assert found["local_uuid"]["exact_match"] == 0.0
    assert 0 <= found["local_uuid"]["character_accuracy"] < 0.5
    assert "local_uuid" in answer.err
    assert "acc" in answer.err


@needs_lm_eval
def test_a_tokenizer_or_task_that_does_not_fit_the_model_is_refused(model, data, tmp_path):
    save_bytes_tokenizer(tmp_path / "wider")
    wider = load_tokenizer(tmp_path / "wider")
    wider.add_tokens([f"more{number}" for number in range(50)])
    wider.save_pretrained(tmp_path / "wider")
    task = ("--tasks=local_gsm8k", f"--task_data={data}")
    refused(call(EVALUATE, model, *task, f"--tokenizer={tmp_path / 'wider'}"), "token ids, but the model has only 257")
    small = LlamaForCausalLM.from_pretrained(model)
    small.config.max_position_embeddings = 256
    small.save_pretrained(model)
    refused(
        call(EVALUATE, model, *task),
        "local_gsm8k: its answers have up to 256 tokens",
        "256 positions",
        "leave the task out",
    )
    refused(call(EVALUATE, tmp_path / "none", "--tasks=local_uuid", "--task_data=nowhere"), "nowhere cannot be read")


def test_a_run_and_an_adapter_on_it_end_answers_as_their_exports(tmp_path, tokenizer_path):
    """With the tokenizer's EOS, even if the model's config names another token, and as the run's base for the rest."""
    lm = LlamaForCausalLM(LlamaConfig(**LLAMA | {"eos_token_id": 7}))
    checkpoint = write_checkpoint(checkpoint_at(tmp_path / "run", 5), lm, tokenizer_path)
    RunFolder(tmp_path / "run").generation_config.write_text('{"top_k": 3}')
    export(checkpoint, tmp_path / "export")
    factors = {"A": torch.zeros(2, 24), "B": torch.zeros(24, 2)}
    adapter = write_adapter_folder(tmp_path / "adapter", {"base_model_name_or_path": str(checkpoint)}, **factors)
    file = adapter / "adapter_model.safetensors"
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({name.replace("base_model.model.model.q", layer): x for name, x in load_file(file).items()}, file)
    for given in (checkpoint, tmp_path / "export", adapter):
        ready, tokenizer = ready_to_generate(find_model(given), torch.float32)
        assert ready.generation_config.eos_token_id == tokenizer.eos_token_id != 7
        assert ready.generation_config.top_k == 3


def test_the_prompt_of_metamath_is_the_one_used_in_training(data):
    asked = str(local_task("local_metamath", str(data), list)["doc_to_text"])
    learned = passage_of("alpaca", {"instruction": "{{question}}", "output": "x"})
    assert asked + "x" == learned.text
