"""Files of records, the checks of their first rows before a run, and held-out records."""

import json
from pathlib import Path
from typing import Any

import pytest

from relora_mora.config.data import DataConfig, RecordsConfig
from relora_mora.config.schema import Config
from relora_mora.data.errors import SourceError
from relora_mora.data.first_rows import check_columns, check_records, marked, show_records
from relora_mora.data.read import iter_texts, open_rows
from relora_mora.data.records.encoders import encoder_of
from relora_mora.data.sources import configured_shards
from relora_mora.tokenizer.load import load_tokenizer
from tests.data.record_tools import CONVERSATION, encoded, whole
from tests.tools.data_tools import data_config, eval_set, resolve_shards, write_json_lines
from tests.tools.each import each

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
        write_json_lines(path, ROWS)
    return path


@each("suffix", [".jsonl", ".csv", ".parquet", ".arrow"])
def test_every_format_with_columns_holds_records(tokenizer, tmp_path, suffix):
    path = _write(tmp_path / f"a{suffix}")
    held = RecordsConfig(kind="messages", template="chatml")
    config = data_config(path, records=held)
    [shard] = resolve_shards(str(path), records=held)
    encode = encoder_of(tokenizer, shard.records)
    expected = [encoded(tokenizer, {"messages": row["messages"]}, kind="messages", template="chatml") for row in ROWS]
    rows = []
    for lane in range(2):
        opened = open_rows(config, shard, stride=2, phase=lane)
        taken = opened.take(9)
        opened.close()
        rows += [whole(tokenizer, shard.records, row) for row in encode(taken)]
    found = sorted((row.ids.tolist(), row.scored.tolist()) for row in rows)
    assert found == sorted((row.ids.tolist(), row.scored.tolist()) for row in expected)
    shards = resolve_shards(str(path), records=RecordsConfig(kind="sharegpt", template="chatml"))
    message = (
        r'a\.jsonl: 3 of 3 lines are bad, .* line 3 has no "conversations" \(data\.records\.columns\), only messages'
        if suffix == ".jsonl"
        else 'no column "conversations"; set data.records.columns to one of messages, id'
    )
    with pytest.raises(SourceError, match=message):
        check_records(shards, config, tokenizer)


@each("content", ["", "\n \n\n"])
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


def test_an_optional_cell_of_csv_may_be_empty(tokenizer, tmp_path):
    path = tmp_path / "a.csv"
    messages = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).replace('"', '""')
    path.write_text(f'messages,tools\n"{messages}",\n"{messages}","[]"\n')
    config = data_config(path, records={"kind": "messages", "template": "chatml"}, sequence_length=64)
    check_records(configured_shards(config, "train"), config, tokenizer)


@each("packing", [None, "whole", "none", "stream"])
def test_held_out_records_score_their_answers(tokenizer, tokenizer_path, tmp_path, packing):
    path = _write(tmp_path / "a.jsonl")
    records = {"kind": "messages", "template": "chatml"}
    held_out = eval_set(path, tokenizer_path, 400, packing=packing, records=records)
    rows = [encoded(tokenizer, {"messages": row["messages"]}, kind="messages", template="chatml") for row in ROWS]
    assert held_out.predicted == sum(row.scored.sum() for row in rows)
    assert held_out.documents == 3
    assert held_out.utf8_bytes is None
    assert (held_out.document_ids is not None) == (packing in (None, "whole"))
    seen = []
    for _, labels, _ in held_out.batches(0, 1, 2):
        seen += labels[labels != -100].tolist()
    assert sorted(seen) == sorted(int(token) for row in rows for token in row.ids[row.scored])
    of_all = {**records, "score": "all"}
    assert eval_set(path, tokenizer_path, 400, packing=packing, records=of_all).digest != held_out.digest
    write_json_lines(path, [*ROWS, *[{"messages": CONVERSATION[:1], "id": 4}] * 11])
    message = r"11 of 14 records cannot be used, .*; the last one: a\.jsonl, line 14, has no answer"
    with pytest.raises(SourceError, match=message):
        eval_set(path, tokenizer_path, 400, records=records)
    assert eval_set(path, tokenizer_path, 400, records=records, max_bad_fraction=0.3).documents == 3
    if packing == "stream":
        return
    write_json_lines(path, ROWS)
    with pytest.raises(
        SourceError, match=r"none of 3 records can be used \(over_length: 3\); .* \d+ tokens, .*; raise"
    ):
        eval_set(path, tokenizer_path, 4, packing=packing, records=records)


def test_whole_texts_score_what_a_stream_scores(tokenizer_path, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("the rank", "matrix over", "one")))
    stream, whole, one = (
        eval_set(path, tokenizer_path, 400, packing=packing) for packing in ("stream", "whole", "none")
    )
    assert stream.predicted == whole.predicted == one.predicted
    assert stream.utf8_bytes == whole.utf8_bytes == 22
    assert (len(whole.tokens), len(one.tokens)) == (1, 3)
    cut = eval_set(path, tokenizer_path, 4, packing="whole")
    assert cut.utf8_bytes is None
    assert cut.predicted < whole.predicted


def test_training_rows_are_shown(tokenizer_path, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"the rank {n}?", "answer": "one\nmore"}) for n in range(5)))
    data = data_config(path, records={"kind": "question"}, sequence_length=64)
    show_records(
        Config(model={"config": "c"}, tokenizer={"path": tokenizer_path}, data=data, train={"run_dir": "r"}), 2
    )
    output = capsys.readouterr().out.replace("·", "")
    assert "--- row 2: 9 of " in output
    assert "--- row 3" not in output
    assert "Question: the rank 1?\\n\nAnswer:[ one\\n\nmore</s>]\n" in output
    assert output.endswith("tokens are scored (the first 5 rows)\n")
    with path.open("a") as stream:
        stream.write("\n" + json.dumps({"question": "the rank " * 90, "answer": "one"}))
    show_records(
        Config(model={"config": "c"}, tokenizer={"path": tokenizer_path}, data=data, train={"run_dir": "r"}), 1
    )
    assert capsys.readouterr().out.endswith("(the first 5 rows; left out: over_length: 1)\n")
    tokenizer = load_tokenizer(tokenizer_path)
    ids = [*tokenizer("the").input_ids, *tokenizer("a").input_ids]
    assert marked(tokenizer, ids, [False, True], colour=True) == "the·\x1b[32ma\x1b[0m"


def test_training_of_tokenizers_takes_only_text(tmp_path):
    path = _write(tmp_path / "a.jsonl")
    config = data_config(path, records={"kind": "messages", "template": "chatml"})
    message = r"a\.jsonl holds tokens, or records by data\.records, but text is needed here; .* data\.records=null"
    with pytest.raises(SourceError, match=message):
        list(iter_texts(str(path), split="train", config=config))


# ---- the first rows --------------------------------------------------------------------------------------------------

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
