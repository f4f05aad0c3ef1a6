"""What a run reads and what is not there: one error for all of it, with the command that makes it."""

from pathlib import Path
from typing import Any

import pytest

from relora_mora.config.load import ConfigError, load_config
from relora_mora.config.schema import Config
from relora_mora.data.errors import SourceError
from relora_mora.data.sources import configured_shards
from relora_mora.data.tokens.make import make_tokens
from relora_mora.evaluation.loss import held_out
from relora_mora.train.begin.inputs import open_inputs, open_text
from tests.tools.data_tools import write_parquet
from tests.tools.each import each
from tests.tools.helpers import ROOT
from tests.tools.runs import write_inputs


@pytest.fixture
def config(tmp_path: Path, tokenizer_path: str) -> Config:
    folder = write_inputs(tmp_path)
    text = f"{folder}/train/*.json.gz"
    return settings(**{"tokenizer.path": tokenizer_path, "data.train": text, "data.validation": text})


def settings(**overrides: str) -> Config:
    return load_config(ROOT / "configs" / "run" / "tiny_remora.yaml", overrides, world_size=1)


def changed(config: Config, section: str, **values: Any) -> Config:
    before = getattr(config, section)
    inner = type(before).model_validate({**before.model_dump(), **values})
    return config.model_copy(update={section: inner})


@each("start", ["config", "init_from"])
def test_all_missing_files_are_named_together_with_their_commands(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        open_inputs(settings(**{f"model.{start}": "nowhere"}), 1)
    assert [fault.partition(":")[0] for fault in raised.value.faults] == [
        f"model.{start}",
        "tokenizer.path",
        "data.train",
        "data.validation",
    ]
    for fault in raised.value.faults[1:]:
        assert "runs/demo/" in fault
        assert "(relora-mora demo creates it" in fault
        assert str(tmp_path) in fault


def test_files_of_text_are_counted_with_how_they_are_split(config: Config, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO", "relora_mora")
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("a\n\nb\n")
    open_text(changed(config, "data", train=f"{tmp_path}/*.txt"))
    assert caplog.messages == ["3 files of text, split at blank lines; one document a file: --data.sample_by=document"]
    open_text(changed(config, "data", train=f"{tmp_path}/*.txt", sample_by="document"))
    open_text(config)
    assert len(caplog.messages) == 1


def test_a_wrong_column_is_reported_with_other_faults(config: Config, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["text"])
    wrong = changed(config, "data", train=str(path), validation=str(tmp_path / "b.json"), text_column="body")
    with pytest.raises(ConfigError) as raised:
        open_text(wrong)
    train, validation = raised.value.faults
    assert "no file matches" in validation
    assert train.startswith('data.train: a.parquet has no column "body"; set data.text_column to one of id, text, url')


def test_all_missing_sets_are_named_together(config: Config, tmp_path: Path) -> None:
    gone = {name: str(tmp_path / f"{name}.json") for name in ("books", "web")}
    with pytest.raises(ConfigError) as raised:
        open_text(changed(config, "data", validation={**gone, "there": config.data.train[0].source}))
    named = [f"data.validation.{name}: no file matches {path} " for name, path in gone.items()]
    assert len(raised.value.faults) == len(named)
    assert all(map(str.startswith, raised.value.faults, named))
    assert "relora-mora demo" not in str(raised.value)


def test_tokens_of_another_tokenizer_are_reported_with_other_faults(
    config: Config, other_tokenizer: str, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    shards = configured_shards(config.data, "train")
    make_tokens(shards, out, config=config.data, tokenizer_path=other_tokenizer, processes=1)
    wrong = changed(config, "data", train=str(out), validation=str(tmp_path / "b.json"))
    with pytest.raises(ConfigError) as raised:
        open_text(wrong)
    train, validation = raised.value.faults
    assert "no file matches" in validation
    assert train.startswith(f"data.train: {out} holds tokens of another tokenizer than ")
    with pytest.raises(ConfigError, match="holds tokens of another tokenizer"):
        open_text(changed(config, "data", validation=str(out)))


def test_held_out_tokens_that_changed_are_refused(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    shards = configured_shards(config.data, "train")
    make_tokens(shards, out, config=config.data, tokenizer_path=config.tokenizer_path, processes=1)
    open_text(changed(config, "data", validation=str(out)))
    [file, *_] = sorted(out.glob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damaged = changed(config, "data", validation={"web": str(out)})
    message = "data.validation.web: .*has changed since its tokens were made"
    with pytest.raises(ConfigError, match=message):
        open_text(damaged)
    with pytest.raises(SourceError, match=message):
        held_out(damaged.data, damaged.tokenizer_path, None)
