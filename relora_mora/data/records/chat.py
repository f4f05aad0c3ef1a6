"""Renders conversations as text with a chat template, and locates their answers and the tokens that end them."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from relora_mora.config.data import CHATML
from relora_mora.data.errors import SourceError
from relora_mora.data.records.passages import Conversation, Passage
from relora_mora.data.shard import RecordFormat, Shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def chat_template(tokenizer: "PreTrainedTokenizerBase", record_format: RecordFormat) -> str:
    """The chat template for records in this format. Raises SourceError if there is none or it cannot be used."""
    name = record_format.settings.template
    if name == CHATML:
        return chatml(tokenizer)
    template = record_format.template
    if template is None:
        if tokenizer.chat_template is None:
            raise SourceError(
                f"{tokenizer.name_or_path} has no chat template; set data.records.template to chatml or a .jinja file"
            )
        template = str(tokenizer.get_chat_template())
    label = template_name(tokenizer, record_format)
    if record_format.settings.score == "answers" and not _MARK.search(template):
        raise SourceError(
            f"{label} does not mark answers ({{% generation %}} ... {{% endgeneration %}}), so nothing would be "
            "learned; set data.records.template=chatml, a .jinja file with these marks, or data.records.score=all"
        )
    if "strftime_now" in template and "date_string" not in template:
        raise SourceError(
            f"{label} writes the time of day (strftime_now), so no two runs would read the same; "
            "set data.records.template to a .jinja file without it"
        )
    return template


def template_name(tokenizer: "PreTrainedTokenizerBase", record_format: RecordFormat) -> str:
    """How messages refer to the template of these records."""
    name = record_format.settings.template
    return f"the template {name}" if name else f"the chat template of {tokenizer.name_or_path}"


def template_in_use(shards: Iterable[Shard], tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The template of the first shard of conversations, or None if there is none. Raises SourceError."""
    for shard in shards:
        if shard.records is not None and shard.records.settings.is_conversation:
            return chat_template(tokenizer, shard.records)
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
        text = render(tokenizer, str(tokenizer.get_chat_template()), Conversation(turns, []), marked=False).text
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


def render(tokenizer: "PreTrainedTokenizerBase", template: str, conversation: Conversation, *, marked: bool) -> Passage:
    """Renders a conversation exactly as transformers' ``apply_chat_template`` does.

    If ``marked``, the answers are the spans that the template marks; otherwise the whole text is one answer. Raises
    jinja2's TemplateSyntaxError if the template is not valid Jinja, and whatever the template raises for messages that
    it rejects.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {"date_string": _DATE, **tokenizer.special_tokens_map}
    rendered: Any = render_jinja_template(
        [conversation.messages],
        tools=conversation.tools or None,  # type: ignore[arg-type]
        chat_template=template,
        return_assistant_tokens_mask=marked,
        **variables,
    )
    [text], answers = rendered
    return Passage(text, list(answers[0]) if marked else [(0, len(text))])
