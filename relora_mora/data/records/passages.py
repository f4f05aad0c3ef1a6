"""From the fields of a record to what is tokenized: the messages of a conversation, or a text and its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from relora_mora.data.errors import Skipped
from relora_mora.data.formats.json_lines import is_encodable
from relora_mora.data.shard import Record

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


class Conversation(NamedTuple):
    """What a chat template writes; ``tools`` are descriptions of functions, as JSON."""

    messages: list[Message]
    tools: list[dict[str, Any]]

    def without_tools(self) -> Iterator[Conversation]:
        """The same where no tool is described, and where none is called; neither where it has none."""
        if self.tools:
            yield Conversation(self.messages, [])
        plain = [
            {key: value for key, value in each.items() if key != "tool_calls" or not value} for each in self.messages
        ]
        if plain != self.messages:
            yield Conversation(plain, self.tools)

    def learned(self) -> list[bool]:
        """Of each answer, whether it is; ``weight: 0`` says that it is not."""
        return [each.get("weight", 1) == 1 for each in self.messages if each["role"] == "assistant"]


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


def conversation_of(kind: str, record: Record) -> Conversation | Skipped:
    """The messages of a conversation and the tools that it has; keys that hold nothing are left out."""
    [name] = {"messages", "conversations"} & set(record.fields)
    found: dict[str, Any] = {}
    for field in {name, "tools"} & set(record.fields):
        given = record.fields[field]
        if isinstance(given, str):  # as in CSV, which has no lists
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                return _bad(record, f'has a "{field}" that is a text and no JSON')
            if not is_encodable(json.dumps(given, ensure_ascii=False)):
                return _bad(record, f'has a "{field}" with half of a surrogate pair')
        try:
            found[field] = _without_nulls(given)
        except RecursionError:
            return _bad(record, f'has a "{field}" that is nested too deeply')
    given = found[name]
    if not isinstance(given, list) or not given:
        return _bad(record, f'has a "{name}" that is no list of messages')
    tools = found.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return _bad(record, 'has "tools" that are no list of descriptions')
    messages: list[Message] = []
    if system := record.fields.get("system"):
        messages.append({"role": "system", "content": system})
    for number, message in enumerate(given, start=1):
        read = _of_sharegpt(message) if kind == "sharegpt" else _with_content(message)
        fault = _fault(read, ("from", "value") if kind == "sharegpt" else ("role", "content"))
        if fault:
            return _bad(record, f"has a message {number} {fault}")
        messages.append(read)
    return Conversation(messages, tools)


def _without_nulls(value: Any) -> Any:
    """As it was written: Parquet gives every object the keys of all others, with null for what it has not."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _with_content(message: Any) -> Any:
    """A message that calls tools need not say anything."""
    calls = isinstance(message, dict) and message.get("tool_calls") and message.get("content") is None
    return {**message, "content": ""} if calls else message


def _of_sharegpt(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    role = message.get("from")
    weight = {"weight": message["weight"]} if "weight" in message else {}
    return {"role": _ROLES_OF_SHAREGPT.get(str(role), role), "content": message.get("value"), **weight}


def _fault(message: Any, names: tuple[str, str]) -> str | None:
    """``names``: what role and content are called in the data."""
    if not isinstance(message, dict):
        return "that has no keys and values"
    if message.get("role") not in ROLES:
        return f'with the "{names[0]}" {message.get("role")!r:.40}, expected one of {", ".join(ROLES)}'
    if message.get("weight", 1) not in (0, 1):
        return f'with the "weight" {message["weight"]!r:.40}, expected 0 or 1'
    return None if isinstance(message.get("content"), str) else f'whose "{names[1]}" is no text'


def _bad(record: Record, what: str) -> Skipped:
    return Skipped("bad_record", record.describe(what))
