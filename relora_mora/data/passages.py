"""From the fields of a record to what is tokenized: the messages of a conversation, or a text and its answer."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from relora_mora.data.parse import is_encodable
from relora_mora.data.record_format import Record
from relora_mora.data.skipped import Skipped

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's names, and those of other sets in its form
_ROLES_OF_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", **{role: role for role in ROLES}}

# the prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, its README), to which the answer is appended
_ALPACA_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
# the space is the answer's: tokenizers join it with what follows, and a prompt that ends in one is never continued so
_QUESTION = "Question: {question}\nAnswer:"

Message = dict[str, Any]


class Passage(NamedTuple):
    """A text, and the characters [start, end) of its answers."""

    text: str
    answers: list[tuple[int, int]]


def passage_of(kind: str, record: Record) -> Passage | Skipped:
    """The text of a record that is no conversation."""
    fields = record.fields
    for name, value in fields.items():
        if not isinstance(value, str):
            return _bad(record, f'has a "{name}" that is no text')
    if kind == "alpaca":
        prompt = (_ALPACA_WITH_INPUT if fields.get("input") else _ALPACA_ALONE).format(**fields)
        answer = fields["output"]
    elif kind == "prompt":
        prompt = fields["prompt"]
        answer = fields["completion"]
    else:
        assert kind == "question"
        prompt = _QUESTION.format(**fields)
        answer = f" {fields['answer']}" if fields["answer"] else ""
    return Passage(prompt + answer, [(len(prompt), len(prompt) + len(answer))])


def messages_of(kind: str, record: Record) -> list[Message] | Skipped:
    """The messages of a conversation, each with a role and its content; keys that hold nothing are left out."""
    [name] = {"messages", "conversations"} & set(record.fields)
    given = record.fields[name]
    if isinstance(given, str):  # as in CSV, which has no lists
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return _bad(record, f'has a "{name}" that is a text and no JSON')
        if not is_encodable(json.dumps(given, ensure_ascii=False)):
            return _bad(record, f'has a "{name}" with half of a surrogate pair')
    if not isinstance(given, list) or not given:
        return _bad(record, f'has a "{name}" that is no list of messages')
    messages: list[Message] = []
    if system := record.fields.get("system"):
        messages.append({"role": "system", "content": system})
    for number, message in enumerate(given, start=1):
        read = _of_sharegpt(message) if kind == "sharegpt" else _with_content(message)
        fault = _fault(read, ("from", "value") if kind == "sharegpt" else ("role", "content"))
        if fault:
            return _bad(record, f"has a message {number} {fault}")
        messages.append({key: value for key, value in read.items() if value is not None})
    return messages


def _with_content(message: Any) -> Any:
    """A message that calls tools need not say anything."""
    calls = isinstance(message, dict) and message.get("tool_calls") and message.get("content") is None
    return {**message, "content": ""} if calls else message


def _of_sharegpt(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    role = message.get("from")
    return {"role": _ROLES_OF_SHAREGPT.get(str(role), role), "content": message.get("value")}


def _fault(message: Any, names: tuple[str, str]) -> str | None:
    """``names``: what role and content are called in the data."""
    if not isinstance(message, dict):
        return "that has no keys and values"
    if message.get("role") not in ROLES:
        return f'with the "{names[0]}" {message.get("role")!r:.40}, expected one of {", ".join(ROLES)}'
    return None if isinstance(message.get("content"), str) else f'whose "{names[1]}" is no text'


def _bad(record: Record, what: str) -> Skipped:
    return Skipped("bad_record", record.told(what))
