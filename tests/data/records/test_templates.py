"""Chat templates: which one is used, which tokens are scored, tools, and messages that a template refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from relora_mora.config.data import RecordsConfig
from relora_mora.data.errors import Skipped, SourceError
from relora_mora.data.records.encoders import record_encoder
from relora_mora.data.records.passages import chatml
from relora_mora.data.rows import Encoded
from relora_mora.data.shard import Record, RecordFormat
from relora_mora.tokenizer.load import load_tokenizer
from tests.data.record_tools import CONVERSATION, encoded, parts
from tests.tools.each import each

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.role == 'assistant' %}{% generation %} {{ message.content | trim }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}{{ date_string }}"
)


@each("template", ["chatml", LLAMA_3])
@each("has_end", [False, True])
def test_masks_agree_with_transformers(tokenizer_path, tmp_path, template, has_end):
    tokenizer = load_tokenizer(tokenizer_path)
    if has_end:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    name = template
    if template == "chatml":
        template = chatml(tokenizer)
    else:
        name = str(tmp_path / "own.jinja")
        Path(name).write_text(template)
    for messages in (CONVERSATION, CONVERSATION[1:3], CONVERSATION[3:]):
        theirs = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"split_special_tokens": False},
            date_string="26 Jul 2024",
        )
        ours = encoded(tokenizer, {"messages": messages}, kind="messages", template=name)
        assert list(ours.ids) == theirs["input_ids"]
        assert np.array(ours.scored, int).tolist() == theirs["assistant_masks"]
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>") if has_end and name == "chatml" else tokenizer.eos_token_id
    assert list(ours.ids).count(ends) == (2 if name == "chatml" else 1)


def test_the_tokenizers_own_template_is_used(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.chat_template = LLAMA_3
    row = encoded(tokenizer, {"messages": CONVERSATION[1:3]}, kind="messages")
    assert parts(tokenizer, row)[1] == (True, " matrix </s> one</s>")


@each(
    "template,score,message",
    [
        (None, "answers", r"has no chat template; set data\.records\.template"),
        ("{{ messages[0].content }}", "answers", r"own\.jinja does not mark answers .* data\.records\.template"),
        ("{% generation %}{{ messages", "answers", r"own\.jinja is not valid Jinja: line 1: "),
        ("{% generation %}{{ strftime_now('%d') }}{% endgeneration %}", "answers", "writes the time of day"),
        ("{% for %}", "all", "is not valid Jinja"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tokenizer, tmp_path, template, score, message):
    name = None
    if template is not None:
        name = str(tmp_path / "own.jinja")
        Path(name).write_text(template)
    with pytest.raises(SourceError, match=message):
        encoded(tokenizer, {"messages": CONVERSATION}, kind="messages", template=name, score=score)


def test_an_answer_that_the_template_does_not_mark_is_reported(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}{% if false %}{% generation %}x{% endgeneration %}{% endif %}")
    row = encoded(tokenizer, {"messages": CONVERSATION}, kind="messages", template=str(path))
    assert row == Skipped("no_answer")
    assert f"has an answer that the template {path} does not mark" in row.detail


def test_a_missing_template_is_refused(tmp_path):
    with pytest.raises(
        SourceError, match=r"the template .*gone\.jinja cannot be read .* give a \.jinja file or chatml"
    ):
        RecordFormat.of(RecordsConfig(kind="messages", template=str(tmp_path / "gone.jinja")))


ALTERNATES = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    "{% generation %}x{% endgeneration %}"
)


def test_a_message_that_calls_a_tool_need_not_have_content(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% for call in m.tool_calls %}{{ call.function.name }}{% endfor %}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "matrix"}}]}
    messages = [{"role": "user", "content": "rank"}, call, {"role": "tool", "content": "over"}]
    row = encoded(tokenizer, {"messages": messages}, kind="messages", template=str(path))
    assert isinstance(row, Encoded)
    assert tokenizer.decode(row.ids) == "rankmatrixover"
    assert tokenizer.decode(np.array(row.ids)[row.scored]) == "matrix"


TOOLS = [{"function": {"name": "matrix", "parameters": {}}}]
CALLED = {"name": "matrix", "arguments": {"rank": "over"}}
CALL = {"role": "assistant", "content": "one", "tool_calls": [{"function": CALLED}]}
WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{% endgeneration %}"
    "{% else %}{{ m.content }}:{% endif %}{% endfor %}"
)


@each("as_json", [False, True])
def test_tools_and_calls_of_them_are_written(tokenizer, tmp_path, as_json):
    path = tmp_path / "own.jinja"
    path.write_text(WITH_TOOLS)
    messages = [{"role": "user", "content": "rank", "tool_calls": None}, CALL]
    given = {"messages": messages, "tools": TOOLS}
    fields = {name: json.dumps(value) for name, value in given.items()} if as_json else given
    row = encoded(tokenizer, fields, kind="messages", template=str(path))
    assert parts(tokenizer, row) == [(False, "matrix rank:"), (True, 'one{"rank": "over"}')]
    filled = CALL | {"tool_calls": [{"function": {"name": "matrix", "arguments": {"rank": "over", "one": None}}}]}
    as_parquet_has_it, plain = (
        encoded(tokenizer, {"messages": [message]}, kind="messages", template=str(path)) for message in (filled, CALL)
    )
    assert list(as_parquet_has_it.ids) == list(plain.ids)


@each("fields", [{"messages": [CALL]}, {"messages": CONVERSATION, "tools": TOOLS}])
def test_tools_that_a_template_leaves_out_are_reported(tokenizer, fields):
    row = encoded(tokenizer, fields, kind="messages", template="chatml")
    assert row == Skipped("template_failed")
    assert "has tools, which the template chatml does not write" in row.detail


def test_a_record_that_the_template_refuses_is_reported(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(ALTERNATES)
    held = RecordFormat.of(RecordsConfig(kind="messages", template=str(path)))
    records = [Record({"messages": CONVERSATION[first:]}, f"row {first}", held) for first in range(2)]
    refused, good = record_encoder(tokenizer, held)(records)
    assert refused == Skipped("template_failed")
    assert "row 0, is refused" in refused.detail
    assert "begin with the user" in refused.detail
    assert isinstance(good, Encoded)
