"""Which lines hold a text, and the reasons why others do not."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from relora_mora.data.errors import SKIP_REASONS, Skipped
from relora_mora.data.lines import parse_line
from tests.tools.data_tools import line
from tests.tools.each import each

LINES = [
    (line("text"), None),
    (b'{"text": "nul \\u0000 escaped"}', None),
    (b'\xef\xbb\xbf{"text": "after a byte order mark"}', None),
    (b'{"text": "\\ud83d\\ude42"}\r', None),
    (b'{"\\u0074ext": "an escaped key"}', None),
    (b'{"text": "beside", "a": NaN, "b": -Infinity}', None),
    (b'{"text": 3, "text": "the last one counts"}', None),
    (b'{"text": "the last one counts", "text": 3}', "text_not_string"),
    (b"hello", "not_json"),
    (b'{"text": "unfinished', "not_json"),
    (b"[" * 100_000, "not_json"),
    (b'["text"]', "no_text"),
    (b'"text"', "no_text"),
    (b'{"body": "x"}', "no_text"),
    (b'{"text": null}', "null_text"),
    (b'{"text": "a", "text": null}', "null_text"),
    (b'{"text": "a", "n": ' + b"1" * 4300 + b"}", None),
    (b'{"text": "a", "n": [' + b"1" * 4301 + b"]}", "not_json"),
    (b'{"text": ["a"]}', "text_not_string"),
    (b'{"text": "\xff"}', "invalid_utf8"),
    (b'{"text": "\\ud83d alone"}', "invalid_utf8"),
    (b'{"text": "a\0b"}', "not_json"),
    (b'{"text": ""}', "empty_text"),
    (b" \t\r", "blank_line"),
]


@each("entry,expected", LINES)
def test_every_reason(entry, expected):
    row = parse_line(entry)
    assert row == Skipped(expected) if expected else isinstance(row, str) and row


@given(st.one_of(st.binary(max_size=40), st.text('{}[]"text:\\u0041 \v\u00a0\ufeff', max_size=30).map(str.encode)))
def test_any_line_is_a_text_or_has_a_reason(entry):
    row = parse_line(entry)
    assert isinstance(row, str) or row.reason in SKIP_REASONS


@each("column", ["content", "größe", "a/b", 'quo"ted', "tab\t"])
def test_the_text_is_under_the_requested_key(column):
    entry = json.dumps({"text": "another one", column: "wanted"}, ensure_ascii=False)
    for written in (entry, json.dumps(json.loads(entry)), entry.replace("/", "\\/")):
        assert parse_line(written.encode(), column=column) == "wanted"
    for other in ('{"text": "another one"}', '{"content/text": "x"}'):
        assert parse_line(other.encode(), column=column) == Skipped("no_text")
