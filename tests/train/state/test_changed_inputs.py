"""A resume with another tokenizer, other text or other settings: what is refused, and what is allowed."""

import gzip
import shutil
from pathlib import Path

import pytest

from tests.tools.runs import checkpoint_at, manifest_at, run_config, train, write_inputs

pytestmark = pytest.mark.distributed


@pytest.mark.more
def test_the_tokenizer_in_a_checkpoint_is_the_one_of_its_fingerprint(
    runs, pools, inputs, tokenizer_path, other_tokenizer, tmp_path
):
    from relora_mora.tokenizer.identity import tokenizer_fingerprint

    folder = tmp_path / "run"
    pools(1)(
        train, run_config(inputs, other_tokenizer, folder), stop_after=0
    )  # the wrong one, noticed before the first checkpoint
    assert tokenizer_fingerprint(folder / "tokenizer") == tokenizer_fingerprint(other_tokenizer)
    runs.train(folder, stop_after=2)
    expected = tokenizer_fingerprint(tokenizer_path)
    for place in (folder, checkpoint_at(folder, 2)):
        assert tokenizer_fingerprint(place / "tokenizer") == expected
    assert manifest_at(folder, 2)["tokenizer_fingerprint"] == expected
    message = runs.refusal(run_config(inputs, other_tokenizer, folder))
    assert "tokenizer" in message
    assert "--train.allow_changes=[tokenizer]" in message
    assert "allow_changes=[data]" not in message
    pools(1)(train, run_config(inputs, other_tokenizer, folder, train={"allow_changes": ["tokenizer"]}), stop_after=3)
    assert tokenizer_fingerprint(checkpoint_at(folder, 3) / "tokenizer") == tokenizer_fingerprint(other_tokenizer)


@pytest.mark.more
def test_other_data_needs_permission_and_is_read_from_its_beginning(runs, pools, tokenizer_path, tmp_path):
    other, folder, fresh = write_inputs(tmp_path / "other"), tmp_path / "run", tmp_path / "fresh"
    for path in sorted((other / "train").iterdir())[1:]:
        path.unlink()  # a smaller source: old places may not exist in it
    runs.train(folder, stop_after=6)
    message = runs.refusal(run_config(other, tokenizer_path, folder))
    assert "data: other sources" in message
    assert "--train.allow_changes=[data]" in message
    pools(1)(train, run_config(other, tokenizer_path, folder, train={"allow_changes": ["data"]}), stop_after=8)
    pools(1)(train, run_config(other, tokenizer_path, fresh), stop_after=2)
    assert manifest_at(folder, 8)["data_state"] == manifest_at(fresh, 2)["data_state"]
    pools(1)(train, run_config(other, tokenizer_path, folder))  # no change any more
    assert manifest_at(folder, 10)["step"] == 10


def _plain_copy(inputs: Path, folder: Path) -> Path:
    """The same inputs with training text that is not compressed, so that its letters can change and its size not."""
    shutil.copytree(inputs, folder)
    for path in (folder / "train").iterdir():
        path.write_bytes(gzip.decompress(path.read_bytes()))
    return folder


def _swap_letters(folder: Path) -> None:
    for path in (folder / "train").iterdir():
        path.write_bytes(path.read_bytes().replace(b"merge", b"rerge"))


@pytest.mark.more
def test_other_text_of_the_same_names_and_sizes_needs_permission_and_keeps_its_lines(
    runs, pools, inputs, tokenizer_path, tmp_path
):
    first = _plain_copy(inputs, tmp_path / "first")
    swapped = _plain_copy(inputs, tmp_path / "swapped")
    folder = tmp_path / "run"
    pools(1)(train, run_config(first, tokenizer_path, folder), stop_after=4)
    pools(1)(train, run_config(swapped, tokenizer_path, folder), stop_after=5)  # a copy is the same
    _swap_letters(swapped)
    message = runs.refusal(run_config(swapped, tokenizer_path, folder))
    assert message.count("  - ") == 1
    assert "files that have changed\nto allow these changes: '--train.allow_changes=[data]'" in message
    allowed = run_config(swapped, tokenizer_path, folder, train={"allow_changes": ["data"]})
    pools(1)(train, allowed, stop_after=6)
    before, after = (manifest_at(folder, step)["data_state"] for step in (5, 6))
    assert all(after[lane]["documents"] >= before[lane]["documents"] > 0 for lane in before)
    pools(1)(train, run_config(swapped, tokenizer_path, folder), stop_after=7)  # no change any more
