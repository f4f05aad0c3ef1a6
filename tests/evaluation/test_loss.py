"""Held-out loss: any causal LM of transformers, any batch size, and bits per byte by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from relora_mora.checkpoint.layout import CheckpointError
from relora_mora.config.data import DataConfig, RecordsConfig
from relora_mora.config.load import parse_typed
from relora_mora.data.errors import SourceError
from relora_mora.data.named_sets import with_commits
from relora_mora.evaluation.loss import EvalResult, evaluate, held_out, is_causal
from relora_mora.model.causal import LossModel, build_model
from relora_mora.tokenizer.load import load_tokenizer
from relora_mora.weights.load import ModelSource, find_model
from tests.tools.any_model import any_config
from tests.tools.commands import EVALUATE, Answer, call, refused
from tests.tools.data_tools import data_config, eval_set, write_shard
from tests.tools.each import each
from tests.tools.runs import LLAMA
from tests.tools.tiny import tiny_llama

TEXTS = ["the rank of a merge", "größer als the matrix", "🙂 one more of the same"]


@pytest.fixture
def source(tmp_path):
    return write_shard(tmp_path / "text.json.gz", TEXTS)


def _gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=64)).eval()


def _score(model, data, micro_batch_size=2) -> EvalResult:
    return evaluate(model, {"": data}, micro_batch_size=micro_batch_size, device=torch.device("cpu"))[""]


def test_every_token_counts_once_with_any_batch_size(source, tokenizer_path):
    model = LossModel(_gpt2())
    tokens = sum(len(load_tokenizer(tokenizer_path)(text, add_special_tokens=False).input_ids) + 1 for text in TEXTS)
    results = []
    for length, micro in ((8, 1), (8, 3), (8, 100)):
        results.append(_score(model, eval_set(source, tokenizer_path, length), micro))
    assert {result.tokens for result in results} == {tokens}
    assert all(result.loss == pytest.approx(results[0].loss, rel=1e-6) for result in results)
    size = sum(len(text.encode()) for text in TEXTS)
    assert results[0].bits_per_byte == pytest.approx(results[0].loss * tokens / math.log(2) / size)
    assert results[0].perplexity == pytest.approx(math.exp(results[0].loss))


def test_sets_are_scored_in_turn(source, tokenizer_path, tmp_path):
    other = write_shard(tmp_path / "other.json", TEXTS[:2])
    config = data_config(source, sequence_length=8).model_copy(
        update={"validation": {"all": str(source), "two": [str(other)]}}
    )
    sets = held_out(config, tokenizer_path, max_tokens=None)
    steps: list[tuple[int, int]] = []
    results = evaluate(
        LossModel(_gpt2()),
        sets,
        micro_batch_size=2,
        device=torch.device("cpu"),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert {name: result.tokens for name, result in results.items()} == {
        name: data.predicted for name, data in sets.items()
    }
    whole = EvalResult.of_all(results.values())
    assert len({whole.digest, *(data.digest for data in sets.values())}) == 3
    assert EvalResult.of_all(reversed(results.values())).digest == whole.digest
    assert EvalResult.of_all([results["two"]]) == results["two"]
    both = sum(data.predicted for data in sets.values())
    assert steps == sorted(steps)
    assert {total for _, total in steps} == {both}
    assert steps[-1][0] == both
    other.write_text('{"text": ""}\n')
    with pytest.raises(SourceError, match=r"^data\.validation\.two: the validation data .* holds no text"):
        held_out(config, tokenizer_path, max_tokens=None)


def test_the_text_that_a_command_scores():
    """A glob may begin with a bracket, and a range with a brace."""
    for source in ("[ab]*.json", "{00..15}.json.gz", "a: b.json", "allenai/c4", "*.json"):
        assert parse_typed(source, "--data") == source
    record = {"source": "b", "text_column": "body"}
    assert parse_typed("{web: a, books: [b]}", "--data") == {"web": "a", "books": ["b"]}
    assert parse_typed("{source: b, text_column: body}", "--data") == record
    assert parse_typed("[{source: b, text_column: body}, c]", "--data") == [record, "c"]


def _source(data: DataConfig) -> ModelSource:
    return ModelSource(lambda dtype: _gpt2(), _gpt2().config, Path("none"), data, "a run")


def test_text_is_read_as_in_the_run_but_for_what_the_command_sets():
    commits = ["a" * 40, "b" * 40]
    own = {"c4": "allenai/c4", "here": "a.jsonl"}
    noted = {"other/set@main": commits[1]}
    data = DataConfig(train="allenai/c4", validation=own, revision=commits[0], commits=noted, document_mask=True)
    source = _source(data)
    own_settings = source.data_settings(None, {})
    assert (own_settings.validation, own_settings.document_mask) == (data.validation, True)
    for given in (None, {"c4": "allenai/c4"}, "a.jsonl"):
        settings = source.data_settings(given, {"data.sequence_length": "64"})
        assert (settings.revision, settings.sequence_length) == (commits[0], 64)
    asked = source.data_settings("other/set", {"data.revision": "main"})
    assert with_commits(asked).commits["other/set@main"] == commits[1]
    rows = {"data.records.kind": "question", "data.packing": "none"}
    assert not source.data_settings(["a.jsonl"], rows).document_mask


def test_conversations_of_a_run_use_the_template_saved_with_its_tokenizer():
    """The file may be another by now. Another tokenizer has no template of the run."""
    records = {"kind": "messages", "template": "chat.jinja"}
    data = DataConfig(train="a.jsonl", validation="b.jsonl", records=records)
    source = _source(data)
    assert source.data_settings(None, {}).records.template is None
    assert source.data_settings(None, {}, own_tokenizer=False).records.template == "chat.jinja"


@each("own", [{"kind": "messages", "template": "chatml"}, {"kind": "alpaca", "columns": {"output": "a"}}])
def test_records_of_another_kind_do_not_use_the_settings_of_the_run(own):
    data = DataConfig(train="a.jsonl", validation="b.jsonl", records=own)
    source = _source(data)
    for kind in ("question", "text"):
        asked = source.data_settings("c.jsonl", {"data.records.kind": kind})
        assert asked.records == RecordsConfig(kind=kind)
    assert source.data_settings("c.jsonl", {"data.records.kind": own["kind"]}).records == data.records


def _llama(**changes) -> LlamaForCausalLM:
    return build_model(tiny_llama(vocab_size=320, **changes), seed=3).eval()


def _loss_of_documents(lm, texts: list[str], tokenizer, length: int) -> float:
    """One forward pass of plain transformers per document, each cut at the end of its packed sequence."""
    nats = tokens = place = 0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        begin = 0
        while begin < len(ids) - 1:
            end = min(len(ids) - 1, begin + length - place % length)
            logits = lm(torch.tensor([ids[begin:end]])).logits[0].double()
            nats -= logits.log_softmax(-1).gather(1, torch.tensor(ids[begin + 1 : end + 1])[:, None]).sum().item()
            place += end - begin
            tokens += end - begin
            begin = end
    return nats / tokens


@each("make", [_gpt2, _llama])
@each("length,micro", [(8, 3), (64, 1)])
def test_with_a_document_mask_each_document_is_scored_separately(source, tokenizer_path, make, length, micro):
    lm = make()
    data = eval_set(source, tokenizer_path, length, document_mask=True)
    expected = _loss_of_documents(lm, TEXTS, load_tokenizer(tokenizer_path), length)
    model = LossModel(lm)
    assert _score(model, data, micro).loss == pytest.approx(expected, abs=1e-6)
    together = eval_set(source, tokenizer_path, length)
    assert abs(_score(model, together, micro).loss - expected) > 1e-5


def test_a_foreign_model_does_not_name_its_text(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(call(EVALUATE, tmp_path), f"--data: {tmp_path} is not a run", "give text to score")


def test_other_content_of_a_foreign_folder_is_reported(tmp_path, caplog):
    folder = tmp_path / "llama"
    _llama().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    with caplog.at_level("WARNING"):
        find_model(folder).read(torch.float32)
    assert "these weights do not belong to its model" in caplog.text
    assert "model.layers.1.mlp.up_proj.weight" in caplog.text
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a PEFT adapter next to its model"):
        find_model(folder).read(torch.float32)


def test_a_model_that_sees_what_it_predicts_is_refused(source, tokenizer_path, tmp_path):
    """Its loss would look like a very good one."""
    torch.manual_seed(0)
    sizes = {**LLAMA, "num_hidden_layers": 1, "initializer_range": 0.5}
    encoder, decoder = (BertLMHeadModel(BertConfig(**sizes, is_decoder=causal)).eval() for causal in (False, True))
    encoder.save_pretrained(tmp_path)
    answer = call(EVALUATE, tmp_path, f"--data={source}", f"--tokenizer={tokenizer_path}")
    says = f"{tmp_path} (bert): BertLMHeadModel predicts a token from the token itself and later ones"
    refused(answer, says, notes=_lines(answer) - 1)
    assert is_causal(decoder, torch.device("cpu"))
    assert is_causal(_gpt2(), torch.device("cpu"))


def test_records_packed_whole_cannot_be_scored_without_a_document_mask(source, tokenizer_path, tmp_path):
    _gpt2().save_pretrained(tmp_path)
    given = (f"--data={source}", f"--tokenizer={tokenizer_path}", "--data.document_mask=false")
    answer = call(EVALUATE, tmp_path, *given, "--data.records={kind: prompt}")
    refused(answer, "--data.document_mask: records that are packed whole are always masked")


def test_a_model_whose_documents_leak_is_scored_only_without_a_mask(source, tokenizer_path, tmp_path):
    build_model(any_config("mamba", vocab_size=320), seed=0).save_pretrained(tmp_path)
    given = (f"--data={source}", f"--tokenizer={tokenizer_path}", "--data.sequence_length=32")
    refused(call(EVALUATE, tmp_path, *given, "--data.document_mask=true"), "data.document_mask: in a mamba")
    assert call(EVALUATE, tmp_path, *given).code == 0


def test_documents_too_long_for_longropes_first_factors_are_refused(source, tokenizer_path, tmp_path):
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "original_max_position_embeddings": 16}
    lm = _llama(rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors})
    lm.save_pretrained(tmp_path)
    given = (f"--data={source}", f"--tokenizer={tokenizer_path}", "--data.document_mask=true")
    refused(call(EVALUATE, tmp_path, *given), "data.sequence_length: ", "(16); longrope")
    assert call(EVALUATE, tmp_path, *given, "--data.sequence_length=16").code == 0


def test_a_nonfinite_loss_is_not_a_result(source, tokenizer_path, tmp_path):
    lm = _gpt2()
    with torch.no_grad():
        lm.transformer.ln_f.weight[0] = math.nan
    lm.save_pretrained(tmp_path)
    answer = call(EVALUATE, tmp_path, f"--data={source}", f"--tokenizer={tokenizer_path}")
    refused(answer, str(tmp_path), "its loss in float32 is nan", notes=_lines(answer) - 1)
    assert not answer.out


def _lines(answer: Answer) -> int:
    return len(answer.err.splitlines())
