"""Chat templates: which one is used, which tokens are scored, tools, and messages that a template refuses."""

import json

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


def _written(tokenizer, folder, template, fields, **settings):
    """The row that a template in a file makes of a record."""
    (folder / "own.jinja").write_text(template)
    return encoded(tokenizer, fields, kind="messages", template=str(folder / "own.jinja"), **settings)


@each("template", ["chatml", LLAMA_3])
@each("has_end", [False, True])
def test_masks_agree_with_transformers(tokenizer_path, tmp_path, template, has_end):
    tokenizer = load_tokenizer(tokenizer_path)
    if has_end:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    is_chatml = template == "chatml"
    if is_chatml:
        template = chatml(tokenizer)
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
        fields = {"messages": messages}
        ours = _written(tokenizer, tmp_path, template, fields)
        if is_chatml:
            assert list(encoded(tokenizer, fields, kind="messages", template="chatml").ids) == list(ours.ids)
        assert list(ours.ids) == theirs["input_ids"]
        assert np.array(ours.scored, int).tolist() == theirs["assistant_masks"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>") if has_end and is_chatml else tokenizer.eos_token_id
    assert list(ours.ids).count(end) == (2 if is_chatml else 1)


def test_the_tokenizers_own_template_is_used(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.chat_template = LLAMA_3
    row = encoded(tokenizer, {"messages": CONVERSATION[1:3]}, kind="messages")
    assert parts(tokenizer, row)[1] == (True, " matrix </s> one</s>")


@each(
    "template,score,message",
    [
        (None, "answers", r"has no chat template, .*; set data\.records\.template"),
        ({"tool_use": ""}, "answers", r"several and no default; set data\.records\.template"),
        ("gone", "answers", r"the template .*gone\.jinja cannot be read .* give a \.jinja file or chatml"),
        ("{{ messages[0].content }}", "answers", r"own\.jinja does not mark answers .* data\.records\.template"),
        ("{% generation %}{{ messages", "answers", r"own\.jinja is not valid Jinja: line 1: "),
        ("{% generation %}{{ strftime_now('%d') }}{% endgeneration %}", "answers", "writes the time of day"),
        ("{% for %}", "all", "is not valid Jinja"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tokenizer, tmp_path, template, score, message, monkeypatch):
    fields = {"messages": CONVERSATION}
    with pytest.raises(SourceError, match=message):
        if template is None or isinstance(template, dict):
            monkeypatch.setattr(tokenizer, "chat_template", template)
            encoded(tokenizer, fields, kind="messages", score=score)
        elif template == "gone":
            encoded(tokenizer, fields, kind="messages", template=str(tmp_path / "gone.jinja"))
        else:
            _written(tokenizer, tmp_path, template, fields, score=score)


def test_an_answer_that_the_template_does_not_mark_is_reported(tokenizer, tmp_path):
    template = "{{ messages[0].content }}{% if false %}{% generation %}x{% endgeneration %}{% endif %}"
    row = _written(tokenizer, tmp_path, template, {"messages": CONVERSATION})
    assert row == Skipped("no_answer")
    assert f"has an answer that the template {tmp_path}/own.jinja does not mark" in row.detail


WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{% endgeneration %}"
    "{% else %}{{ m.content }}:{% endif %}{% endfor %}"
)
TOOLS = [{"function": {"name": "matrix", "parameters": {}}}]


def _call(content: str | None, **more: None) -> dict:
    calls = [{"function": {"name": "matrix", "arguments": {"rank": "over", **more}}}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


@each("as_json", [False, True])
@each("content", ["one", None])  # a message that calls a tool need not have content
def test_tools_and_calls_of_them_are_written(tokenizer, tmp_path, as_json, content):
    messages = [{"role": "user", "content": "rank", "tool_calls": None}, _call(content, one=None)]  # as Parquet has it
    given = {"messages": messages, "tools": TOOLS}
    fields = {name: json.dumps(value) for name, value in given.items()} if as_json else given
    row = _written(tokenizer, tmp_path, WITH_TOOLS, fields)
    assert parts(tokenizer, row) == [(False, "matrix rank:"), (True, (content or "") + '{"rank": "over"}')]


@each("fields", [{"messages": [_call("one")]}, {"messages": CONVERSATION, "tools": TOOLS}])
def test_tools_that_a_template_leaves_out_are_reported(tokenizer, fields):
    row = encoded(tokenizer, fields, kind="messages", template="chatml")
    assert row == Skipped("template_failed")
    assert "has tools, which the template chatml does not write" in row.detail


def test_a_record_that_the_template_refuses_is_reported(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
        "{% generation %}x{% endgeneration %}"
    )
    held = RecordFormat.of(RecordsConfig(kind="messages", template=str(path)))
    records = [Record({"messages": CONVERSATION[first:]}, f"row {first}") for first in range(2)]
    refused, good = record_encoder(tokenizer, held)(records)
    assert refused == Skipped("template_failed")
    assert "row 0, is refused" in refused.detail
    assert "begin with the user" in refused.detail
    assert isinstance(good, Encoded)
