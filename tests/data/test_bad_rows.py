"""Bad lines are counted by reason, named, skipped up to a limit, and the same on every resume."""

import json
import re

import pyarrow
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relora_mora.data import rows
from relora_mora.data.errors import BAD_REASONS, Skipped, SourceError
from relora_mora.data.first_rows import check_columns
from relora_mora.data.sources import configured_shards
from tests.tools.data_tools import (
    WRITE_GROUPS,
    data_config,
    documents_in,
    epoch_tokens,
    line,
    make_lane,
    resolve_shards,
    rows_of,
    some_texts,
    write_shard,
)
from tests.tools.each import each

ENTRIES = {
    ".json": {
        "not_json": b"rubbish",
        "no_text": b"{}",
        "text_not_string": b'{"text": 3}',
        "invalid_utf8": b'{"text": "\xff"}',
        "too_long": b'{"text": "' + b"x" * 2000 + b'"}',
        "null_text": line(None),
        "empty_text": line(""),
        "blank_line": b"",
    },
    ".csv": {
        "not_csv": b'x,"a"b,',
        "field_count": b"x,y",
        "invalid_utf8": b'x,"\xff",',
        "too_long": b'x,"' + b"x" * 2007 + b'",',
        "empty_text": b"x,,",
        "blank_line": b"",
    },
    ".txt": {"invalid_utf8": b"first line\na\xff", "too_long": b"many lines\n" * 182 + b"the end 12"},
}
UNITS = {".json": "line", ".csv": "row", ".txt": "paragraph"}


def _lane(path, lanes=1, number=0, state=None, **changes):
    given = {"max_line_bytes": 1000, "max_bad_fraction": 1.0, "sequence_length": 8, "shuffle_documents": 1, **changes}
    return make_lane(data_config(path, **given), lanes, number, state)


@each("suffix", ENTRIES)
def test_bad_lines_are_counted_by_kind_with_shard_and_line(tmp_path, suffix):
    entries = ENTRIES[suffix]
    good = [f"text {n}" for n in range(20)]
    if suffix == ".json":
        good[-1] = "a\0b"  # an escaped NUL is text
    written = [row for n, text in enumerate(good) for row in (text, *list(entries.values())[n : n + 1])]
    lane = _lane(write_shard(tmp_path / f"a{suffix}", written), sequence_length=2)
    assert documents_in(epoch_tokens(lane))[:20] == good
    assert lane.state()["skipped"] == dict.fromkeys(entries, 1)
    bad = [kind for kind in entries if kind in BAD_REASONS]
    assert set(entries) - set(bad) <= {"null_text", "empty_text", "blank_line"}
    for n, (kind, note) in enumerate(zip(bad, lane.notes, strict=False)):
        said = BAD_REASONS[kind].format(column="text")
        if kind == "too_long":
            said = "has a length of 2,012, more than data.max_line_bytes (1,000)"
        assert note.startswith(f"a{suffix}: {UNITS[suffix]} {2 * n + 2} {said}")
        assert note.endswith("; skipped")
    assert len(lane.notes) >= len(bad)


def test_shards_without_text_between_good_ones(tmp_path):
    texts = some_texts(40)
    good = [write_shard(tmp_path / f"good{n}.json.gz", texts[20 * n : 20 * n + 20]) for n in range(2)]
    page = b"<!DOCTYPE html>\n<html>\n\n<body>Log in</body>\n</html>\n" + b"<br>\n" * 9
    for name, body in {"empty.json": b"", "page.json.gz": page}.items():
        (tmp_path / name).write_bytes(body)
    paths = [*map(str, good), f"{tmp_path}/empty.json", f"{tmp_path}/page.json.gz"]
    lane = _lane(paths)
    assert set(documents_in(epoch_tokens(lane))) >= set(texts)
    while lane.state()["epoch"] < 2:  # skipped shards at the end of an epoch are counted with the next document
        lane.next_block()
    assert set(lane.state()["skipped"]) == {"empty_shard", "not_json", "blank_line"}
    assert "empty.json is empty; skipped" in lane.notes
    assert any(note.startswith("page.json.gz: line 2 is not JSON (Expecting value:") for note in lane.notes)
    with pytest.raises(SourceError, match=r"page\.json\.gz: 11 of \d+ lines are bad"):
        epoch_tokens(_lane(paths, max_bad_fraction=0.01))
    page = resolve_shards([str(write_shard(tmp_path / "page.json", [b"<br>"] * 50)), paths[2]])
    check_columns(page, data_config("unused", max_bad_fraction=1.0))
    with pytest.raises(SourceError, match="16 of 16 lines are bad"):
        check_columns(page, data_config("unused", max_bad_fraction=0.5))


@each("suffix", [".json", ".json.gz", ".parquet", ".arrow"])
def test_a_file_of_nothing_but_null_is_harmless_in_every_format(tmp_path, suffix):
    """Its column has the type null in Parquet and Arrow."""
    path = write_shard(tmp_path / f"b{suffix}", pyarrow.nulls(9) if suffix in WRITE_GROUPS else [line(None)] * 9)
    config = data_config(path, max_bad_fraction=0.0)
    check_columns(configured_shards(config, "train"), config)
    assert rows_of(path, max_bad_fraction=0.0) == [Skipped("null_text")] * 9


def _until_stop(lane, blocks):
    """The states before each block, the blocks, and the error that ended them."""
    states = []
    made = []
    try:
        while len(made) < blocks:
            states.append(json.loads(json.dumps(lane.state())))
            made.append(lane.next_block().tokens.tolist())
    except SourceError as error:  # a resume may not have met the last bad line again
        return states, made, re.split(r" \w+ are bad", str(error))[0]
    return [*states, lane.state()], made, None


PLAIN = {"suffix": ".json", "cut": 0, "length": 8}


@settings(max_examples=10, deadline=None)
@given(
    kinds=st.lists(
        st.sampled_from(["text", "text", "text", *ENTRIES[".json"], *ENTRIES[".csv"]]), min_size=1, max_size=40
    ),
    suffix=st.sampled_from([".json", ".json.gz", ".jsonl.zst", ".csv", ".csv.gz", ".txt", ".txt.zst"]),
    cut=st.integers(0, 40),
    lanes=st.integers(1, 3),
    shuffle=st.integers(1, 7),
    fraction=st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]),
    length=st.integers(2, 40),
)
# a random choice seldom stops because of a line long before the position, or has bad and good lines in one block
@example(kinds=["text", "not_json", *["text"] * 5], fraction=0.14, lanes=1, shuffle=1, **PLAIN)
@example(kinds=["not_json", "text", "not_json", *["text"] * 15], fraction=0.1, lanes=2, shuffle=2, **PLAIN)
@example(kinds=["text", "text", "not_json", *["text"] * 8], fraction=1.0, lanes=1, shuffle=2, **PLAIN)
def test_a_resume_at_every_block_skips_and_stops_as_before(
    tmp_path_factory, kinds, suffix, cut, lanes, shuffle, fraction, length
):
    entries = next(ENTRIES[known] for known in ENTRIES if suffix.startswith(known))
    texts = [f"{n} " + "x" * (7 * n % 70 if n % 3 else 0) for n in range(len(kinds))]
    written = [entries.get(kind, text) for kind, text in zip(kinds, texts, strict=True)]
    path = write_shard(tmp_path_factory.mktemp("any") / f"a{suffix}", written)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    again = {"max_bad_fraction": fraction, "shuffle_documents": shuffle, "sequence_length": length}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "FEWEST_ROWS", 8)  # so that some stop inside the shard
        for number in range(lanes):
            states, blocks, stop = _until_stop(_lane(path, lanes, number, **again), 24)
            for at, state in enumerate(states[: len(blocks) + 1]):
                resumed = _until_stop(_lane(path, lanes, number, state, **again), 24 - at)
                assert resumed == (states[at:], blocks[at:], stop)


@each("suffix", [".json", ".csv", ".txt"])
def test_each_lane_judges_its_own_rows(tmp_path, suffix):
    bad = next(iter(ENTRIES[suffix].values()))
    written = [row for n in range(1500) for row in (f"text {n}", bad if n % 50 == 0 else f"other {n}")]
    path = write_shard(tmp_path / f"a{suffix}", written)
    allowed = data_config(path, max_bad_fraction=0.01)
    first, second = (make_lane(allowed, 2, number) for number in range(2))
    epoch_tokens(first)  # all of its rows are good
    assert first.state()["skipped"] == {}
    with pytest.raises(SourceError, match=r"11 of 501 \w+s are bad, .*max_bad_fraction \(0\.01\); \w+ 1002 "):
        epoch_tokens(second)
