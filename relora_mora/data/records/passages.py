"""Makes texts with answers from the fields of records. A conversation is rendered with a chat template."""

import contextlib
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic_core import from_json

from relora_mora.config.data import CHATML
from relora_mora.data.errors import SourceError
from relora_mora.data.shard import RecordFormat, Shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

# ChatML (github.com/openai/openai-python, chatml.md), with transformers' marks around generated text
_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ message['content'] + END_OF_TURN }}{% endgeneration %}
    {%- else %}
        {{- message['content'] + END_OF_TURN }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_END = "<|im_end|>"
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Llama 3's template writes today's date if it gets none, and this date if it cannot ask for today's
_DATE = "26 Jul 2024"

Message = dict[str, Any]


class Conversation(NamedTuple):
    """The input of a chat template. ``weight: 0`` keeps an answer from being learned."""

    messages: list[Message]
    tools: list[dict[str, Any]]  # descriptions of functions, as JSON


class Passage(NamedTuple):
    """A text, and the character ranges [start, end) of its answers."""

    text: str
    answers: list[tuple[int, int]]


class Unusable(ValueError):
    """A record that is left out for one of ``SKIP_REASONS``; the message says what is wrong with it."""

    def __init__(self, reason: str, fault: str) -> None:
        super().__init__(fault)
        self.reason = reason


def passage_of(kind: str, fields: Mapping[str, Any]) -> Passage:
    """The text of a record that is not a conversation. Raises Unusable."""
    for name, value in fields.items():
        if not isinstance(value, str):
            raise Unusable("bad_record", f'has a "{name}" that is not text')
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


def conversation_of(kind: str, fields: Mapping[str, Any]) -> Conversation:
    """The messages and tools of a conversation; keys that hold null are left out. Raises Unusable."""
    [name] = {"messages", "conversations"} & set(fields)
    try:  # they are strings in CSV, which has no lists
        raw, tools = [
            _without_nulls(from_json(value) if isinstance(value, str) else value)
            for value in (fields[name], fields.get("tools") or [])
        ]
    except (ValueError, RecursionError) as error:
        raise Unusable("bad_record", f'has a "{name}" or "tools" that cannot be read as JSON ({error})') from None
    if not isinstance(raw, list) or not raw:
        raise Unusable("bad_record", f'has a "{name}" that is not a list of messages')
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("bad_record", 'has "tools" that are not a list of descriptions')
    messages: list[Message] = []
    if system := fields.get("system"):
        messages.append({"role": "system", "content": system})
    messages += [_message(kind, each, number) for number, each in enumerate(raw, start=1)]
    return Conversation(messages, tools)


def _without_nulls(value: Any) -> Any:
    """The value as it was written: Parquet gives every object the keys of all others, with null for missing ones."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _message(kind: str, raw: Any, number: int) -> Message:
    """A message in the form that chat templates expect. Raises Unusable."""
    message: Message = dict(raw) if isinstance(raw, dict) else {}
    if kind == "sharegpt":
        weight = {key: value for key, value in message.items() if key == "weight"}
        role = _ROLES_OF_SHAREGPT.get(str(message.get("from")))
        message = {"role": role, "content": message.get("value"), **weight}
    elif message.get("tool_calls"):
        message.setdefault("content", "")
    is_right = message.get("role") in ROLES and isinstance(message.get("content"), str)
    if not is_right or message.get("weight", 1) not in (0, 1):
        raise Unusable(
            "bad_record",
            f"has a message {number} that lacks a role ({', '.join(ROLES)}) or content of text, or has a weight other "
            f"than 0 and 1: {raw!r:.80}",
        )
    return message


class ChatTemplate(NamedTuple):
    """A chat template, the tokenizer whose special tokens it writes, and how messages refer to it."""

    tokenizer: "PreTrainedTokenizerBase"
    text: str
    name: str

    @staticmethod
    def of(tokenizer: "PreTrainedTokenizerBase", record_format: RecordFormat) -> "ChatTemplate":
        """The template for records in this format. Raises SourceError if there is none or it cannot be used."""
        given = record_format.settings.template
        name = f"the template {given}" if given else f"the chat template of {tokenizer.name_or_path}"
        if given == CHATML:
            return ChatTemplate(tokenizer, chatml(tokenizer), name)
        text = record_format.template
        if text is None:
            own: Any = tokenizer.chat_template
            text = own.get("default") if isinstance(own, dict) else own  # some have several
            if text is None:
                raise SourceError(
                    f"{tokenizer.name_or_path} has no chat template, or several and no default; "
                    "set data.records.template to chatml or a .jinja file"
                )
            text = str(text)
        if record_format.settings.score == "answers" and not _MARK.search(text):
            raise SourceError(
                f"{name} does not mark answers ({{% generation %}} ... {{% endgeneration %}}), so nothing would be "
                "learned; set data.records.template=chatml, a .jinja file with these marks, or data.records.score=all"
            )
        if "strftime_now" in text and "date_string" not in text:
            raise SourceError(
                f"{name} writes the time of day (strftime_now), so no two runs would read the same; "
                "set data.records.template to a .jinja file without it"
            )
        return ChatTemplate(tokenizer, text, name)

    def passage_of(self, conversation: Conversation, *, scores_all: bool) -> Passage:
        """The text of a conversation with the answers to score; the whole text if ``scores_all``. Raises Unusable."""
        from jinja2 import TemplateSyntaxError

        try:
            passage = self.render(conversation, marked=not scores_all)
        except TemplateSyntaxError as error:
            raise SourceError(
                f"{self.name} is not valid Jinja: line {error.lineno}: {error.message}; correct it, or set "
                "data.records.template to another one"
            ) from error
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())
            raise Unusable("template_failed", f"is refused by {self.name} ({reason:.200})") from error
        if not passage.answers and any(message["role"] == "assistant" for message in conversation.messages):
            raise Unusable("no_answer", f"has an answer that {self.name} does not mark")
        if self._leaves_out_tools(conversation, passage.text):
            raise Unusable("template_failed", f"has tools, which {self.name} does not write")
        learned = [each.get("weight", 1) == 1 for each in conversation.messages if each["role"] == "assistant"]
        if scores_all or all(learned):
            return passage
        if len(passage.answers) != len(learned):
            fault = f"has a weight, and {self.name} marks {len(passage.answers)} of its {len(learned)} answers"
            raise Unusable("template_failed", fault)
        return passage._replace(answers=list(itertools.compress(passage.answers, learned)))

    def render(self, conversation: Conversation, *, marked: bool) -> Passage:
        """Renders a conversation exactly as transformers' ``apply_chat_template`` does.

        If ``marked``, the answers are the spans that the template marks; otherwise the whole text is one answer. Raises
        jinja2's TemplateSyntaxError if the template is not valid Jinja, and whatever the template raises for messages
        that it rejects.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        variables: dict[str, Any] = {"date_string": _DATE, **self.tokenizer.special_tokens_map}
        rendered: Any = render_jinja_template(
            [conversation.messages],
            tools=conversation.tools or None,  # type: ignore[arg-type]
            chat_template=self.text,
            return_assistant_tokens_mask=marked,
            **variables,
        )
        [text], answers = rendered
        return Passage(text, list(answers[0]) if marked else [(0, len(text))])

    def _leaves_out_tools(self, conversation: Conversation, text: str) -> bool:
        """Whether a conversation renders to the same text without its tools, or without the calls of tools."""
        messages, tools = conversation
        plain = [{key: value for key, value in each.items() if key != "tool_calls" or not value} for each in messages]
        for other in (Conversation(messages, []), Conversation(plain, tools)):
            # a template that rejects what is left reads the part that was left out
            with contextlib.suppress(Exception):
                if other != conversation and self.render(other, marked=False).text == text:
                    return True
        return False


def template_in_use(shards: Iterable[Shard], tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The template of the first shard of conversations, or None if there is none. Raises SourceError."""
    for shard in shards:
        if shard.records.settings.is_conversation:
            return ChatTemplate.of(tokenizer, shard.records).text
    return None


def chatml(tokenizer: "PreTrainedTokenizerBase") -> str:
    """ChatML for a tokenizer: a turn ends in ``<|im_end|>`` if the tokenizer has that token, and otherwise in its EOS.

    An answer therefore always ends in one token, at which generation can stop.
    """
    has_end = tokenizer.get_vocab().get(_END) is not None
    return _CHATML.replace("END_OF_TURN", f"'{_END}'" if has_end else "eos_token")


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token that the tokenizer's chat template writes after an answer, or None."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer.chat_template is None or backend is None:
        return None
    answer = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        template = ChatTemplate(tokenizer, str(tokenizer.get_chat_template()), "")
        text = template.render(Conversation(turns, []), marked=False).text
    except Exception:  # a template may raise anything, and not every template accepts these two turns
        return None
    suffix = text.rpartition(answer)[2].lstrip()
    backend.encode_special_tokens = False
    ids = backend.encode(suffix, add_special_tokens=False).ids
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Tokens that are not part of an answer, such as EOS, and the end of a turn, even one without a role."""
    added = {token for token, described in tokenizer.added_tokens_decoder.items() if described.special}
    end = end_of_turn(tokenizer)
    return frozenset(added | set(tokenizer.all_special_ids) | ({end} if end is not None else set()))
