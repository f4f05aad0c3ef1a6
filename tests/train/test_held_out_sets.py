"""Named sets of held-out text: each is scored independently, and all of them in total."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from relora_mora.evaluation.loss import held_out
from tests.tools.commands import EVALUATE, call, refused
from tests.tools.data_tools import some_texts, write_shard
from tests.tools.each import each
from tests.tools.runs import metrics, run_config, train, write_inputs

pytestmark = pytest.mark.distributed
KEYS = ("loss", "perplexity", "bits_per_byte", "tokens", "digest")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    write_shard(folder / "books.json", some_texts(20, seed=7, words=12))
    rows = [json.dumps({"body": text}).encode() for text in some_texts(12, seed=8, words=40)]
    write_shard(folder / "web.json", rows)
    return folder


def _sets(inputs: Path) -> dict[str, Any]:
    return {
        "books": str(inputs / "books.json"),
        "web": {"source": str(inputs / "web.json"), "text_column": "body"},
    }


def _run(pools, inputs: Path, tokenizer: str, folder: Path, world_size: int, validation: Any) -> list[dict[str, Any]]:
    """The evaluations before and after the only step."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"validation": validation},
        "method": {"name": "mora"},
        "optim": {"warmup_steps": 0},
        "train": {"steps": 1},
    }
    pools(world_size)(train, run_config(inputs, tokenizer, folder, world_size, **sections))
    return [line for line in metrics(folder) if "eval/loss" in line]


@pytest.fixture(scope="module")
def together(pools, inputs, tokenizer_path, tmp_path_factory) -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    """Runs with both sets, by the number of ranks."""
    folders = {ranks: tmp_path_factory.mktemp("together") / f"run{ranks}" for ranks in (1, 2)}
    return {
        ranks: (folder, _run(pools, inputs, tokenizer_path, folder, ranks, _sets(inputs)))
        for ranks, folder in folders.items()
    }


@each("world_size", [1, 2])
def test_the_total_equals_the_loss_of_one_text(runs, inputs, tokenizer_path, together, tmp_path, world_size):
    config = runs.config(tmp_path, data={"validation": _sets(inputs)})
    size = sum(each.utf8_bytes for each in held_out(config.data, tokenizer_path, config.eval.max_tokens).values())
    before, after = together[world_size][1]
    assert (before["step"], after["step"]) == (0, 1) and before["eval/loss"] != after["eval/loss"]
    for line in (before, after):
        nats = sum(line[f"eval/{name}/loss"] * line[f"eval/{name}/tokens"] for name in ("books", "web"))
        tokens = sum(line[f"eval/{name}/tokens"] for name in ("books", "web"))
        assert line["eval/tokens"] == tokens > max(line["eval/books/tokens"], line["eval/web/tokens"])
        assert max(line["eval/books/tokens"], line["eval/web/tokens"]) <= 200, "the limit holds for each set"
        assert line["eval/loss"] == pytest.approx(nats / tokens, rel=1e-12)
        assert line["eval/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-12)
        assert line["eval/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-12)


def test_the_command_scores_the_text_of_the_run(inputs, together):
    folder, lines = together[2]
    answer = call(EVALUATE, folder, "--max_tokens=200")
    assert answer.code == 0, answer.err
    values = json.loads(answer.out.splitlines()[-1])
    assert list(values) == [*KEYS, "sets"]
    assert list(values["sets"]) == ["books", "web"]
    for prefix, of_text in (("eval", values), *((f"eval/{name}", one) for name, one in values["sets"].items())):
        assert of_text["loss"] == pytest.approx(lines[-1][f"{prefix}/loss"], abs=2e-5)
        assert [of_text[key] for key in KEYS[-2:]] == [lines[-1][f"{prefix}/{key}"] for key in KEYS[-2:]]
    heading, *rows = (row.split() for row in answer.err.splitlines()[-4:])
    assert heading == ["tokens", "loss", "perplexity", "bits", "per", "byte"]
    assert [row[0] for row in rows] == ["books", "web", "all"]
    assert float(rows[1][2]) == pytest.approx(values["sets"]["web"]["loss"], abs=1e-4)


def test_a_set_that_cannot_be_read_is_named(inputs, together):
    folder, _ = together[1]
    books = inputs / "books.json"
    answer = call(EVALUATE, folder, f"--data={{books: {books}, gone: {inputs}/nowhere.json}}")
    refused(answer, "data.validation.gone: no file matches")
    answer = call(EVALUATE, folder, f"--data={{books: {books}, web: {inputs}/web.json}}")
    notes = sum(line.endswith("; skipped") for line in answer.err.splitlines())
    refused(
        answer,
        "data.validation.web: web.json: ",
        "lines are bad",
        'no "text", only body (set data.text_column',
        notes=notes,
    )
