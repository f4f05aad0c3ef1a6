"""Records of every kind become the tokens and masks that they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relora_mora.config import Config, RecordsConfig
from relora_mora.data import (
    SourceError,
    check_records,
    configured_shards,
    iter_texts,
    load_eval_set,
    make_tokens,
    show_records,
)
from relora_mora.data.chat import chatml
from relora_mora.data.encoders import encoder_of, record_encoder
from relora_mora.data.plain_text import open_rows
from relora_mora.data.record_format import Record, RecordFormat
from relora_mora.data.rows import Encoded
from relora_mora.data.show import marked
from relora_mora.data.skipped import Skipped
from relora_mora.data.sources import resolve_shards
from relora_mora.tokenizer import load_tokenizer
from tests.tools.data_tools import data_config

CONVERSATION = [
    {"role": "system", "content": "over the rank"},
    {"role": "user", "content": "the rank of größer?"},
    {"role": "assistant", "content": "matrix </s> one"},
    {"role": "user", "content": "  more"},
    {"role": "assistant", "content": "the same"},
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
    return load_tokenizer(tokenizer_path)


def _encoded(tokenizer, fields: dict[str, Any], packing: str = "whole", length: int = 1000, **settings: Any) -> Any:
    held = RecordFormat.of(RecordsConfig(**settings))
    [row] = encoder_of(tokenizer, [held], packing, length)([Record(fields, "a.jsonl, line 1", held)])
    return row


def _parts(tokenizer, row: Encoded) -> list[tuple[bool, str]]:
    """Runs of tokens that are scored or not, as text."""
    runs: list[tuple[bool, list[int]]] = []
    for token, scored in zip(row.ids, row.scored, strict=True):
        if not runs or runs[-1][0] != bool(scored):
            runs.append((bool(scored), []))
        runs[-1][1].append(int(token))
    return [(scored, tokenizer.decode(ids)) for scored, ids in runs]


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


@pytest.mark.parametrize("form", FORMS)
def test_the_answer_and_the_end_behind_it_are_scored(tokenizer, form):
    fields, prompt, answer = FORMS[form]
    kind = form.split()[0]
    row = _encoded(tokenizer, fields, kind=kind)
    assert _parts(tokenizer, row) == [(False, prompt), (True, answer + "</s>")]
    assert row.ids[-1] == tokenizer.eos_token_id
    # a prompt begins as it does where a model is asked for its answer
    asked = tokenizer(prompt).input_ids
    assert row.ids[: len(asked)].tolist() == asked
    in_stream = _encoded(tokenizer, fields, "stream", kind=kind)  # which puts an EOS behind each row itself
    assert list(in_stream.ids) == row.ids[:-1].tolist() and list(in_stream.scored) == row.scored[:-1].tolist()


def test_a_tokenizer_that_begins_texts_with_bos_begins_records_with_it(tokenizer_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    row = _encoded(tokenizer, FORMS["question"][0], kind="question")
    assert row.ids[0] == tokenizer.bos_token_id and not row.scored[0]
    assert (
        row.ids[1:].tolist()
        == _encoded(load_tokenizer(tokenizer_path), FORMS["question"][0], kind="question").ids.tolist()
    )


def test_columns_may_have_other_names(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"q": "the rank?", "a": "one more"}))
    records = RecordsConfig(kind="question", columns={"question": "q", "answer": "a"})
    [shard] = resolve_shards(str(path), records=records)
    [record] = open_rows(data_config(path), shard).take(5)
    assert record == Record(FORMS["question"][0], "a.jsonl, line 1", shard.records)


def test_every_turn_of_the_assistant_is_scored_with_its_end(tokenizer):
    row = _encoded(tokenizer, {"messages": CONVERSATION}, kind="messages", template="chatml")
    start = "<|im_start|>"
    assert _parts(tokenizer, row) == [
        (False, f"{start}system\nover the rank</s>\n{start}user\nthe rank of größer?</s>\n{start}assistant\n"),
        (True, "matrix </s> one</s>"),
        (False, f"\n{start}user\n  more</s>\n{start}assistant\n"),
        (True, "the same</s>"),
        (False, "\n"),
    ]
    everything = _encoded(tokenizer, {"messages": CONVERSATION}, kind="messages", template="chatml", score="all")
    assert everything.scored is None and list(everything.ids) == list(row.ids)


def test_sharegpt_is_the_same_conversation(tokenizer):
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names.get(turn["role"], turn["role"]), "value": turn["content"]} for turn in CONVERSATION]
    expected = _encoded(tokenizer, {"messages": CONVERSATION}, kind="messages", template="chatml")
    for fields in (
        {"conversations": turns},
        {"conversations": turns[1:], "system": turns[0]["value"]},
        {"conversations": json.dumps(turns)},  # as in CSV
    ):
        row = _encoded(tokenizer, fields, kind="sharegpt", template="chatml")
        assert np.array_equal(row.ids, expected.ids) and np.array_equal(row.scored, expected.scored)


LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.role == 'assistant' %}{% generation %} {{ message.content | trim }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}{{ date_string }}"
)


@pytest.mark.parametrize("template", ["chatml", LLAMA_3])
@pytest.mark.parametrize("has_end", [False, True])
def test_masks_are_those_of_transformers(tokenizer_path, tmp_path, template, has_end):
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
        ours = _encoded(tokenizer, {"messages": messages}, kind="messages", template=name)
        assert list(ours.ids) == theirs["input_ids"]
        assert np.array(ours.scored, int).tolist() == theirs["assistant_masks"]
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>") if has_end and name == "chatml" else tokenizer.eos_token_id
    assert list(ours.ids).count(ends) == (2 if name == "chatml" else 1)


def test_the_tokenizers_own_template_is_used(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.chat_template = LLAMA_3
    row = _encoded(tokenizer, {"messages": CONVERSATION[1:3]}, kind="messages")
    assert _parts(tokenizer, row)[1] == (True, " matrix </s> one</s>")


@pytest.mark.parametrize(
    "template,score,said",
    [
        (None, "answers", r"has no chat template; set data\.records\.template to chatml or a \.jinja file"),
        (
            "{{ messages[0].content }}",
            "answers",
            r"the template .*own\.jinja does not mark answers .* data\.records\.template=chatml",
        ),
        (
            "{% generation %}{{ messages",
            "answers",
            r"the template .*own\.jinja is no Jinja: line 1: .*; correct it, or",
        ),
        ("{% generation %}{{ strftime_now('%d') }}{% endgeneration %}", "answers", "writes the time of day"),
        ("{% for %}", "all", "is no Jinja"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tokenizer, tmp_path, template, score, said):
    name = None
    if template is not None:
        name = str(tmp_path / "own.jinja")
        Path(name).write_text(template)
    with pytest.raises(SourceError, match=said):
        _encoded(tokenizer, {"messages": CONVERSATION}, kind="messages", template=name, score=score)


def test_an_answer_that_the_template_does_not_mark_is_said(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}{% if false %}{% generation %}x{% endgeneration %}{% endif %}")
    row = _encoded(tokenizer, {"messages": CONVERSATION}, kind="messages", template=str(path))
    assert row == Skipped("no_answer") and f"has an answer that the template {path} does not mark" in row.told


def test_a_template_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        SourceError, match=r"the template .*gone\.jinja cannot be read .* give a \.jinja file, or chatml"
    ):
        RecordFormat.of(RecordsConfig(kind="messages", template=str(tmp_path / "gone.jinja")))


ALTERNATES = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    "{% generation %}x{% endgeneration %}"
)
BAD = [
    ("messages", {"messages": "x"}, "bad_record", "that is a text and no JSON"),
    ("messages", {"messages": {"role": "user"}}, "bad_record", "that is no list of messages"),
    ("messages", {"messages": []}, "bad_record", "that is no list of messages"),
    ("messages", {"messages": ["x"]}, "bad_record", "message 1 that has no keys and values"),
    (
        "messages",
        {"messages": [{"role": "human", "content": "x"}]},
        "bad_record",
        "with the \"role\" 'human', expected",
    ),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "bad_record", 'whose "content" is no text'),
    ("messages", {"messages": CONVERSATION[:2]}, "no_answer", "has no answer to learn"),
    ("sharegpt", {"conversations": [{"from": "x", "value": "x"}]}, "bad_record", "with the \"from\" 'x', expected"),
    ("alpaca", {"instruction": None, "output": "x"}, "bad_record", 'has a "instruction" that is no text'),
    ("alpaca", {"instruction": "x", "output": ""}, "no_answer", "has no answer"),
    ("question", {"question": "x", "answer": ""}, "no_answer", "has no answer"),
    ("prompt", {"prompt": "x", "completion": ["y"]}, "bad_record", 'has a "completion" that is no text'),
]


@pytest.mark.parametrize("kind,fields,reason,said", BAD)
def test_a_record_that_is_none_is_told_with_its_place(tokenizer, kind, fields, reason, said):
    settings = {"template": "chatml"} if kind in ("messages", "sharegpt") else {}
    row = _encoded(tokenizer, fields, kind=kind, **settings)
    assert row == Skipped(reason)
    assert row.told.startswith("a.jsonl, line 1, ") and said in row.told and str(fields)[:50] in row.told


def test_a_message_that_calls_a_tool_need_not_have_content(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% for call in m.tool_calls %}{{ call.function.name }}{% endfor %}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "matrix"}}]}
    messages = [{"role": "user", "content": "rank"}, call, {"role": "tool", "content": "over"}]
    row = _encoded(tokenizer, {"messages": messages}, kind="messages", template=str(path))
    assert isinstance(row, Encoded) and tokenizer.decode(row.ids) == "rankmatrixover"
    assert tokenizer.decode(np.array(row.ids)[row.scored]) == "matrix"


TOOLS = [{"function": {"name": "matrix", "parameters": {}}}]
CALL = {
    "role": "assistant",
    "content": "one",
    "tool_calls": [{"function": {"name": "matrix", "arguments": {"rank": "over"}}}],
}
WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{% endgeneration %}"
    "{% else %}{{ m.content }}:{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_calls_of_them_are_written(tokenizer, tmp_path, as_json):
    path = tmp_path / "own.jinja"
    path.write_text(WITH_TOOLS)
    messages = [{"role": "user", "content": "rank", "tool_calls": None}, CALL]
    given = {"messages": messages, "tools": TOOLS}
    fields = {name: json.dumps(value) for name, value in given.items()} if as_json else given
    row = _encoded(tokenizer, fields, kind="messages", template=str(path))
    assert _parts(tokenizer, row) == [(False, "matrix rank:"), (True, 'one{"rank": "over"}')]
    filled = CALL | {"tool_calls": [{"function": {"name": "matrix", "arguments": {"rank": "over", "one": None}}}]}
    as_parquet_has_it, plain = (
        _encoded(tokenizer, {"messages": [message]}, kind="messages", template=str(path)) for message in (filled, CALL)
    )
    assert list(as_parquet_has_it.ids) == list(plain.ids)


@pytest.mark.parametrize(
    "fields", [{"messages": [CALL]}, {"messages": CONVERSATION, "tools": TOOLS}], ids=["calls", "tools"]
)
def test_tools_that_a_template_leaves_out_are_told(tokenizer, fields):
    row = _encoded(tokenizer, fields, kind="messages", template="chatml")
    assert row == Skipped("template_failed") and "has tools, which the template chatml does not write" in row.told


def test_an_answer_without_weight_is_not_learned(tokenizer, tmp_path):
    weighed = [message | {"weight": int(at != 2)} for at, message in enumerate(CONVERSATION)]
    plain = _encoded(tokenizer, {"messages": CONVERSATION}, kind="messages", template="chatml")
    row = _encoded(tokenizer, {"messages": weighed}, kind="messages", template="chatml")
    scored = [text for is_scored, text in _parts(tokenizer, plain) if is_scored]
    assert len(scored) == 2 and [text for is_scored, text in _parts(tokenizer, row) if is_scored] == scored[1:]
    assert list(row.ids) == list(plain.ids)
    half = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x", "weight": 0.5}]
    assert 'with the "weight" 0.5' in _encoded(tokenizer, {"messages": half}, kind="messages", template="chatml").told
    path = tmp_path / "last.jinja"
    path.write_text("{% generation %}{{ messages[-1].content }}{% endgeneration %}")
    told = _encoded(tokenizer, {"messages": weighed}, kind="messages", template=str(path)).told
    assert "marks 1 of its 2 answers" in told


def test_a_record_that_the_template_refuses_is_told(tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(ALTERNATES)
    held = RecordFormat.of(RecordsConfig(kind="messages", template=str(path)))
    records = [Record({"messages": CONVERSATION[first:]}, f"row {first}", held) for first in range(2)]
    refused, good = record_encoder(tokenizer, held)(records)
    assert refused == Skipped("template_failed") and "row 0, is refused" in refused.told
    assert "begin with the user" in refused.told and isinstance(good, Encoded)


def test_a_record_longer_than_a_sequence_is_cut_at_its_end_or_dropped(tokenizer):
    fields = FORMS["question"][0]
    row = _encoded(tokenizer, fields, kind="question")
    count = len(row.ids)
    answer = int(np.flatnonzero(row.scored)[0])
    for most in range(answer - 2, count + 2):
        cut = _encoded(tokenizer, fields, length=most - 1, kind="question")
        if most <= answer:  # no token of the answer is left
            assert cut == Skipped("over_length")
            continue
        assert list(cut.ids) == row.ids[:most].tolist() and list(cut.scored) == row.scored[:most].tolist()
        assert cut.cut == (most < count)
        dropped = _encoded(tokenizer, fields, length=most - 1, kind="question", too_long="drop")
        assert dropped == Skipped("over_length") if most < count else list(dropped.ids) == row.ids.tolist()


def test_a_tokenizer_without_offsets_is_refused(tokenizer_path):
    class Slow:
        name_or_path = "slow"
        eos_token_id = 2

    with pytest.raises(SourceError, match="slow does not tell which characters its tokens are of"):
        _encoded(Slow(), {}, kind="question")


ROWS = [
    {"messages": CONVERSATION[1:3], "id": 1},
    {"messages": CONVERSATION, "id": 2},
    {"messages": CONVERSATION[3:], "id": 3},
]


def _write(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif path.suffix == ".csv":
        cells = ['"' + json.dumps(row["messages"]).replace('"', '""') + f'",{row["id"]}' for row in ROWS]
        path.write_text("\n".join(["messages,id", *cells]) + "\n")
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".arrow"])
def test_every_format_with_columns_holds_records(tokenizer, tmp_path, suffix):
    path = _write(tmp_path / f"a{suffix}")
    held = RecordsConfig(kind="messages", template="chatml")
    config = data_config(path, records=held)
    [shard] = resolve_shards(str(path), records=held)
    encode = encoder_of(tokenizer, [shard.records], "whole", 1000)
    expected = [_encoded(tokenizer, {"messages": row["messages"]}, kind="messages", template="chatml") for row in ROWS]
    rows = []
    for lane in range(2):
        opened = open_rows(config, shard, stride=2, phase=lane)
        taken = opened.take(9)
        opened.close()
        rows += list(encode(taken))
    found = sorted((row.ids.tolist(), row.scored.tolist()) for row in rows)
    assert found == sorted((row.ids.tolist(), row.scored.tolist()) for row in expected)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".arrow"])
def test_a_column_that_is_not_there_is_told(tokenizer, tmp_path, suffix):
    path = _write(tmp_path / f"a{suffix}")
    shards = resolve_shards(str(path), records=RecordsConfig(kind="sharegpt", template="chatml"))
    said = (
        r'a\.jsonl: 3 of 3 lines are bad, .* line 3 has no "conversations" \(data\.records\.columns\), but messages, id'
        if suffix == ".jsonl"
        else 'no column "conversations"; set data.records.columns to one of messages, id'
    )
    with pytest.raises(SourceError, match=said):
        check_records(shards, data_config(path), tokenizer)


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_a_file_without_records_is_refused(tokenizer, tokenizer_path, tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    held = RecordsConfig(kind="prompt")
    shards = resolve_shards(str(tmp_path / "a.jsonl"), records=held)
    with pytest.raises(SourceError, match=r"a\.jsonl: holds no record; give a file with at least one"):
        check_records(shards, data_config(tmp_path / "a.jsonl", records=held), tokenizer)
    settings = {"model": {"config": "c"}, "tokenizer": {"path": tokenizer_path}, "train": {"run_dir": "r"}}
    config = Config(data=data_config(tmp_path / "a.jsonl"), **settings)
    with pytest.raises(SourceError, match=r"the training data .*a\.jsonl holds no text; give a file with at least one"):
        show_records(config, 1)


def test_text_files_hold_no_records(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the rank")
    with pytest.raises(SourceError, match=r"a\.txt holds text without columns, .* messages; give files with columns"):
        resolve_shards(str(path), records=RecordsConfig(kind="messages"))
    [shard] = resolve_shards(str(path), records=RecordsConfig(kind="text"))
    assert not shard.holds_records


def _held_out(path: Path, tokenizer_path: str, length: int = 400, **settings: Any) -> Any:
    return load_eval_set(
        str(path),
        config=data_config(path, **settings),
        tokenizer_path=tokenizer_path,
        sequence_length=length,
        max_tokens=None,
    )


@pytest.mark.parametrize("packing", [None, "whole", "none", "stream"])
def test_held_out_records_score_their_answers(tokenizer, tokenizer_path, tmp_path, packing):
    path = _write(tmp_path / "a.jsonl")
    held_out = _held_out(path, tokenizer_path, packing=packing, records={"kind": "messages", "template": "chatml"})
    rows = [_encoded(tokenizer, {"messages": row["messages"]}, kind="messages", template="chatml") for row in ROWS]
    assert held_out.predicted == sum(row.scored.sum() for row in rows)
    assert held_out.documents == 3 and held_out.utf8_bytes is None
    assert (held_out.document_ids is not None) == (packing in (None, "whole"))
    seen = []
    for _, labels, _ in held_out.batches(0, 1, 2):
        seen += labels[labels != -100].tolist()
    assert sorted(seen) == sorted(int(token) for row in rows for token in row.ids[row.scored])


def test_whole_texts_score_what_a_stream_scores(tokenizer_path, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("the rank", "matrix over", "one")))
    stream, whole, one = (_held_out(path, tokenizer_path, packing=packing) for packing in ("stream", "whole", "none"))
    assert stream.predicted == whole.predicted == one.predicted and stream.utf8_bytes == whole.utf8_bytes == 22
    assert (len(whole.tokens), len(one.tokens)) == (1, 3)
    cut = _held_out(path, tokenizer_path, length=4, packing="whole")
    assert cut.utf8_bytes is None and cut.predicted < whole.predicted


def test_too_many_records_that_cannot_be_used_end_an_evaluation(tokenizer_path, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [*ROWS, {"messages": CONVERSATION[:1], "id": 4}]
    path.write_text("\n".join(map(json.dumps, rows)))
    records = {"kind": "messages", "template": "chatml"}
    with pytest.raises(
        SourceError, match=r"1 of 4 records cannot be used, .*; the last one: a\.jsonl, line 4, has no answer"
    ):
        _held_out(path, tokenizer_path, records=records)
    assert _held_out(path, tokenizer_path, records=records, max_bad_fraction=0.3).documents == 3


def test_held_out_records_that_are_all_too_long_are_named_as_such(tokenizer_path, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "the rank of the matrix?", "answer": "one"}))
    with pytest.raises(SourceError, match=r"no record can be used \(over_length: 1\); .* 36 tokens, .*; raise"):
        _held_out(path, tokenizer_path, 4, records={"kind": "question"})


def test_what_is_trained_on_is_shown(tokenizer_path, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"the rank {n}?", "answer": "one\nmore"}) for n in range(5)))
    data = data_config(path, records={"kind": "question"}, sequence_length=64)
    show_records(
        Config(model={"config": "c"}, tokenizer={"path": tokenizer_path}, data=data, train={"run_dir": "r"}), 2
    )
    output = capsys.readouterr().out.replace("·", "")
    assert "--- row 2: 9 of " in output and "--- row 3" not in output
    assert "Question: the rank 1?\\n\nAnswer:[ one\\n\nmore</s>]\n" in output
    assert output.endswith("tokens are scored (the first 5 rows)\n")
    with path.open("a") as stream:
        stream.write("\n" + json.dumps({"question": "the rank " * 90, "answer": "one"}))
    show_records(
        Config(model={"config": "c"}, tokenizer={"path": tokenizer_path}, data=data, train={"run_dir": "r"}), 1
    )
    assert capsys.readouterr().out.endswith("(the first 5 rows, 1 left out: over_length)\n")
    tokenizer = load_tokenizer(tokenizer_path)
    ids = [*tokenizer("the").input_ids, *tokenizer("a").input_ids]
    assert marked(tokenizer, ids, [False, True], colour=True) == "the·\x1b[32ma\x1b[0m"


def test_tokens_in_advance_and_training_of_tokenizers_take_text_alone(tokenizer_path, tmp_path):
    path = _write(tmp_path / "a.jsonl")
    config = data_config(path, records={"kind": "messages", "template": "chatml"})
    shards = configured_shards(config, "train")
    said = r"a\.jsonl is read as records \(data\.records\), and text is needed here; set data\.records=null"
    with pytest.raises(SourceError, match=said):
        make_tokens(shards, tmp_path / "out", config=config, tokenizer_path=tokenizer_path, processes=1)
    with pytest.raises(SourceError, match=said):
        list(iter_texts(str(path), split="train", config=config))
