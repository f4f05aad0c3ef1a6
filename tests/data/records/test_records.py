"""Records of every kind are encoded to the right tokens and masks."""

import json

import numpy as np
import pytest

from relora_mora.config.data import RecordsConfig
from relora_mora.data.errors import Skipped, SourceError
from relora_mora.data.read import open_rows
from relora_mora.data.shard import Record
from relora_mora.tokenizer.load import load_tokenizer
from tests.data.record_tools import CONVERSATION, encoded, parts
from tests.tools.data_tools import data_config, resolve_shards
from tests.tools.each import each
from tests.tools.tokenizer_tools import save_bytes_tokenizer

BELOW = "Below is an instruction that describes a task"
FORMS = {
    "alpaca": (
        {"instruction": "over {x}", "output": "one more"},
        f"{BELOW}. Write a response that appropriately completes the request.\n\n### Instruction:\nover {{x}}\n\n"
        "### Response:",
        "one more",
    ),
    "alpaca with input": (
        {"instruction": "over", "input": "the rank", "output": "one more"},
        f"{BELOW}, paired with an input that provides further context. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nover\n\n### Input:\nthe rank\n\n### Response:",
        "one more",
    ),
    "prompt": ({"prompt": "over the rank\n", "completion": "one more"}, "over the rank\n", "one more"),
    "question": ({"question": "the rank?", "answer": "one more"}, "Question: the rank?\nAnswer:", " one more"),
}


@each("form", FORMS)
def test_the_answer_and_the_end_after_it_are_scored(tokenizer, form):
    fields, prompt, answer = FORMS[form]
    kind = form.split()[0]
    row = encoded(tokenizer, fields, kind=kind)
    assert parts(tokenizer, row) == [(False, prompt), (True, answer + "</s>")]
    assert row.ids[-1] == tokenizer.eos_token_id
    # a prompt begins as it does at inference
    asked = tokenizer(prompt).input_ids
    assert row.ids[: len(asked)].tolist() == asked
    in_stream = encoded(tokenizer, fields, "stream", kind=kind)  # a stream adds the EOS after each row itself
    assert list(in_stream.ids) == row.ids[:-1].tolist()
    assert list(in_stream.scored) == row.scored[:-1].tolist()


def test_a_tokenizer_that_begins_texts_with_bos_begins_records_with_it(tokenizer_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    row = encoded(tokenizer, FORMS["question"][0], kind="question")
    assert row.ids[0] == tokenizer.bos_token_id
    assert not row.scored[0]
    assert (
        row.ids[1:].tolist()
        == encoded(load_tokenizer(tokenizer_path), FORMS["question"][0], kind="question").ids.tolist()
    )


def test_the_end_of_an_answer_is_learned_if_spaces_are_trimmed_off_offsets(tmp_path):
    from tokenizers.processors import ByteLevel

    save_bytes_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    row = encoded(tokenizer, {"prompt": "6 * 7 = ", "completion": "42 "}, kind="prompt")
    assert parts(tokenizer, row) == [(False, "6 * 7 = "), (True, "42 <|endoftext|>")]


def test_columns_may_have_other_names(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"q": "the rank?", "a": "one more"}))
    records = RecordsConfig(kind="question", columns={"question": "q", "answer": "a"})
    [shard] = resolve_shards(str(path), records=records)
    [record] = open_rows(data_config(path), shard).take(5)
    assert record == Record(FORMS["question"][0], "a.jsonl, line 1")


def test_every_turn_of_the_assistant_is_scored_with_its_end(tokenizer):
    row = encoded(tokenizer, {"messages": CONVERSATION}, kind="messages", template="chatml")
    start = "<|im_start|>"
    assert parts(tokenizer, row) == [
        (False, f"{start}system\nover the rank</s>\n{start}user\nthe rank of größer?</s>\n{start}assistant\n"),
        (True, "matrix </s> one</s>"),
        (False, f"\n{start}user\n  more</s>\n{start}assistant\n"),
        (True, "the same</s>"),
        (False, "\n"),
    ]
    everything = encoded(tokenizer, {"messages": CONVERSATION}, kind="messages", template="chatml", score="all")
    assert everything.scored is None
    assert list(everything.ids) == list(row.ids)


def test_sharegpt_is_the_same_conversation(tokenizer):
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names.get(turn["role"], turn["role"]), "value": turn["content"]} for turn in CONVERSATION]
    expected = encoded(tokenizer, {"messages": CONVERSATION}, kind="messages", template="chatml")
    for fields in (
        {"conversations": turns},
        {"conversations": turns[1:], "system": turns[0]["value"]},
        {"conversations": json.dumps(turns)},  # as in CSV
    ):
        row = encoded(tokenizer, fields, kind="sharegpt", template="chatml")
        assert np.array_equal(row.ids, expected.ids)
        assert np.array_equal(row.scored, expected.scored)
    weighed = [turn | {"weight": int(at != 2)} for at, turn in enumerate(turns)]
    row = encoded(tokenizer, {"conversations": weighed}, kind="sharegpt", template="chatml")
    assert [text for is_scored, text in parts(tokenizer, row) if is_scored] == ["the same</s>"]


BAD = [
    ("messages", {"messages": "x"}, "bad_record", "cannot be read as JSON"),
    ("messages", {"messages": {"role": "user"}}, "bad_record", "that is not a list of messages"),
    ("messages", {"messages": []}, "bad_record", "that is not a list of messages"),
    ("messages", {"messages": ["x"]}, "bad_record", "message 1 that lacks a role"),
    ("messages", {"messages": [{"role": "human", "content": "x"}]}, "bad_record", "than 0 and 1: {'role': 'human'"),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "bad_record", "or content of text"),
    ("messages", {"messages": [CONVERSATION[1] | {"weight": 0.5}]}, "bad_record", "than 0 and 1: {'role': 'user'"),
    ("messages", {"messages": CONVERSATION[:2]}, "no_answer", "has no answer to learn"),
    ("sharegpt", {"conversations": [{"from": "x", "value": "x"}]}, "bad_record", "message 1 that lacks a role"),
    ("alpaca", {"instruction": None, "output": "x"}, "bad_record", 'has a "instruction" that is not text'),
    ("alpaca", {"instruction": "x", "output": ""}, "no_answer", "has no answer"),
    ("question", {"question": "x", "answer": ""}, "no_answer", "has no answer"),
    ("prompt", {"prompt": "x", "completion": ["y"]}, "bad_record", 'has a "completion" that is not text'),
]


@each("kind,fields,reason,message", BAD)
def test_a_bad_record_is_reported_with_its_place(tokenizer, kind, fields, reason, message):
    settings = {"template": "chatml"} if kind in ("messages", "sharegpt") else {}
    row = encoded(tokenizer, fields, kind=kind, **settings)
    assert row == Skipped(reason)
    assert row.detail.startswith("a.jsonl, line 1, ")
    assert message in row.detail
    assert str(fields)[:50] in row.detail


def test_weights_need_a_template_that_marks_every_answer(tokenizer, tmp_path):
    weighed = [message | {"weight": int(at != 2)} for at, message in enumerate(CONVERSATION)]
    path = tmp_path / "last.jinja"
    path.write_text("{% generation %}{{ messages[-1].content }}{% endgeneration %}")
    detail = encoded(tokenizer, {"messages": weighed}, kind="messages", template=str(path)).detail
    assert "marks 1 of its 2 answers" in detail


def test_a_record_longer_than_a_sequence_is_cut_at_its_end_or_dropped(tokenizer):
    fields = FORMS["question"][0]
    row = encoded(tokenizer, fields, kind="question")
    count = len(row.ids)
    answer = int(np.flatnonzero(row.scored)[0])
    for most in range(answer - 2, count + 2):
        cut = encoded(tokenizer, fields, length=most - 1, kind="question")
        if most <= answer:  # no token of the answer is left
            assert cut == Skipped("over_length")
            continue
        assert list(cut.ids) == row.ids[:most].tolist()
        assert list(cut.scored) == row.scored[:most].tolist()
        assert cut.cut == (most < count)
        dropped = encoded(tokenizer, fields, length=most - 1, kind="question", too_long="drop")
        assert dropped == Skipped("over_length") if most < count else list(dropped.ids) == row.ids.tolist()


def test_a_tokenizer_without_offsets_is_refused(tokenizer_path):
    class Slow:
        name_or_path = "slow"
        eos_token_id = 2

    with pytest.raises(SourceError, match="slow does not report the character offsets of its tokens"):
        encoded(Slow(), {}, kind="question")
