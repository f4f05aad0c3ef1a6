"""Records that cannot be learned from are reported before a run; single bad ones are named, counted and skipped."""

from pathlib import Path
from typing import Any

import pytest

from relora_mora.config.data import DataConfig
from relora_mora.data.errors import SourceError
from relora_mora.data.first_rows import check_columns, check_records
from relora_mora.data.sources import configured_shards
from tests.tools.data_tools import data_config, write_json_lines
from tests.tools.each import each

REFUSES_LATER_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system must come first') }}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def _conversation(number: int, role: str = "user") -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"the rank {number}"},
        {"role": role, "content": "over"},
        {"role": "assistant", "content": " matrix"},
    ]
    return {"messages": messages}


def _config(path: Path, template: str = REFUSES_LATER_SYSTEM, **settings: Any) -> DataConfig:
    file = path.parent / "own.jinja"
    file.write_text(template)
    return data_config(path, records={"kind": "messages", "template": str(file)}, **{"sequence_length": 64, **settings})


def _error_of(config: DataConfig, tokenizer: Any) -> str:
    shards = configured_shards(config, "train")
    with pytest.raises(SourceError) as caught:
        check_columns(shards, config)
        check_records(shards, config, tokenizer)
    return str(caught.value)


def test_records_that_are_read_as_text_are_reported_with_their_keys(tmp_path, tokenizer):
    for count in (3, 30):
        path = write_json_lines(tmp_path / "a.jsonl", [_conversation(number) for number in range(count)])
        bad = min(count, 11)
        assert _error_of(data_config(path), tokenizer).startswith(
            f"a.jsonl: {bad} of {bad} lines are bad, more than data.max_bad_fraction (0.01); "
            f'line {bad} has no "text", only messages '
            "(set data.text_column to the key of the texts, or data.records"
        )


@pytest.mark.more
def test_a_small_set_may_have_ten_bad_records_and_a_large_one_is_checked_by_its_first_rows(tmp_path, tokenizer):
    rows = [_conversation(number, "system" if number in range(20, 31) else "user") for number in range(50)]
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    message = _error_of(_config(path), tokenizer)
    assert message.startswith("11 of 31 records cannot be used")
    assert "a.jsonl, line 31, is refused by the template " in message
    assert "(the system must come first)" in message
    few = [*rows[:30], *rows[31:]]
    for allowed in (few, [*few, *rows[:20] * 48, *rows]):
        config = _config(write_json_lines(path, allowed))
        check_records(configured_shards(config, "train"), config, tokenizer)


@each(
    "name,text,said",
    [
        (
            "a.jsonl",
            '{"messages": ' + "[" * 900 + "]" * 900 + "}\n",
            'line 1, has a "messages" or "tools" that cannot be read as JSON (maximum recursion',
        ),
        (
            "a.csv",
            'messages\n"[{""role"": ""user"", ""content"": ""\\ud800""}]"\n',
            'row 1, has a "messages" or "tools" that cannot be read as JSON (',
        ),
    ],
)
def test_messages_that_cannot_be_used_are_a_bad_record(tmp_path, tokenizer, name, text, said):
    (tmp_path / name).write_text(text)
    assert f"{name}, {said}" in _error_of(_config(tmp_path / name), tokenizer)
