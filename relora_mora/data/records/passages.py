"""Builds the messages of a conversation, or a text with its answer, from the fields of a record."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from relora_mora.data.errors import Skipped
from relora_mora.data.formats.json_lines import is_encodable
from relora_mora.data.shard import Record

ROLES = ("system", "user", "assistant", "tool")
# the role names of ShareGPT, and of other sets in the same form
_ROLES_OF_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", **{role: role for role in ROLES}}

# the prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, its README), to which the answer is appended
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
# The space after "Answer:" belongs to the answer: tokenizers join it with the next word, so a prompt that ends in a
# space is tokenized differently from the text that the model trained on.
_QUESTION = "Question: {question}\nAnswer:"

Message = dict[str, Any]


class Conversation(NamedTuple):
    """The input of a chat template; ``tools`` are descriptions of functions, as JSON."""

    messages: list[Message]
    tools: list[dict[str, Any]]

    def without_tools(self) -> "Iterator[Conversation]":
        """Variants without tool descriptions and without tool calls, each only if there is something to leave out."""
        if self.tools:
            yield Conversation(self.messages, [])
        plain = [
            {key: value for key, value in each.items() if key != "tool_calls" or not value} for each in self.messages
        ]
        if plain != self.messages:
            yield Conversation(plain, self.tools)

    def learned(self) -> list[bool]:
        """For each answer, whether it is trained on; ``weight: 0`` turns that off."""
        return [each.get("weight", 1) == 1 for each in self.messages if each["role"] == "assistant"]


class Passage(NamedTuple):
    """A text, and the character ranges [start, end) of its answers."""

    text: str
    answers: list[tuple[int, int]]


def passage_of(kind: str, record: Record) -> Passage | Skipped:
    """The text of a record that is not a conversation."""
    fields = record.fields
    for name, value in fields.items():
        if not isinstance(value, str):
            return _bad(record, f'has a "{name}" that is not text')
    if kind == "alpaca":
        prompt = (_ALPACA_WITH_INPUT if fields.get("input") else _ALPACA).format(**fields)
        answer = fields["output"]
    elif kind == "prompt":
        prompt = fields["prompt"]
        answer = fields["completion"]
    else:
        assert kind == "question"
        prompt = _QUESTION.format(**fields)
        answer = f" {fields['answer']}" if fields["answer"] else ""
    return Passage(prompt + answer, [(len(prompt), len(prompt) + len(answer))])


def conversation_of(kind: str, record: Record) -> Conversation | Skipped:
    """The messages and tools of a conversation; keys that hold null are left out."""
    [name] = {"messages", "conversations"} & set(record.fields)
    fields: dict[str, Any] = {}
    for field in {name, "tools"} & set(record.fields):
        value = record.fields[field]
        if isinstance(value, str):  # as in CSV, which has no lists
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return _bad(record, f'has a "{field}" that is a string but not JSON')
            if not is_encodable(json.dumps(value, ensure_ascii=False)):
                return _bad(record, f'has a "{field}" with half of a surrogate pair')
        try:
            fields[field] = _without_nulls(value)
        except RecursionError:
            return _bad(record, f'has a "{field}" that is nested too deeply')
    if not isinstance(fields[name], list) or not fields[name]:
        return _bad(record, f'has a "{name}" that is not a list of messages')
    tools = fields.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return _bad(record, 'has "tools" that are not a list of descriptions')
    messages: list[Message] = []
    if system := record.fields.get("system"):
        messages.append({"role": "system", "content": system})
    for number, raw in enumerate(fields[name], start=1):
        message = _from_sharegpt(raw) if kind == "sharegpt" else _with_content(raw)
        fault = _fault(message, ("from", "value") if kind == "sharegpt" else ("role", "content"))
        if fault:
            return _bad(record, f"has a message {number} {fault}")
        messages.append(message)
    return Conversation(messages, tools)


def _without_nulls(value: Any) -> Any:
    """The value as it was written: Parquet gives every object the keys of all others, with null for missing ones."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _with_content(message: Any) -> Any:
    """Fills in the content of a message that only calls tools."""
    calls = isinstance(message, dict) and message.get("tool_calls") and message.get("content") is None
    return {**message, "content": ""} if calls else message


def _from_sharegpt(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    role = message.get("from")
    weight = {"weight": message["weight"]} if "weight" in message else {}
    return {"role": _ROLES_OF_SHAREGPT.get(str(role), role), "content": message.get("value"), **weight}


def _fault(message: Any, names: tuple[str, str]) -> str | None:
    """What is wrong with a message, or None. ``names``: the keys that hold role and content in the data."""
    if not isinstance(message, dict):
        return "that is not an object with keys and values"
    if message.get("role") not in ROLES:
        return f'with the "{names[0]}" {message.get("role")!r:.40}, expected one of {", ".join(ROLES)}'
    if message.get("weight", 1) not in (0, 1):
        return f'with the "weight" {message["weight"]!r:.40}, expected 0 or 1'
    return None if isinstance(message.get("content"), str) else f'whose "{names[1]}" is not text'


def _bad(record: Record, fault: str) -> Skipped:
    return Skipped("bad_record", record.describe(fault))
