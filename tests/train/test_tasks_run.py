"""Tasks that a run scores: the same on all ranks and after a stop, and training does not see them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from xxhash import xxh3_64_hexdigest

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config
from relora_mora.evaluation.harness import _shared
from relora_mora.evaluation.local_tasks import HarnessError
from relora_mora.evaluation.loss import Ranks
from tests.evaluation.tools import ROWS, own_task
from tests.tools.commands import EVALUATE, call
from tests.tools.data_tools import write_json_lines
from tests.tools.each import each
from tests.tools.runs import LLAMA, checkpoint_at, metrics, run_config, tensors, train, write_inputs
from tests.tools.shared import needs_lm_eval

pytestmark = [pytest.mark.distributed, pytest.mark.more]
TASKS = {"tasks_every_steps": 2, "every_steps": 3, "limit": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("tasks"))
    (folder / "model.json").write_text(
        json.dumps(LLAMA | {"max_position_embeddings": 512, "tie_word_embeddings": True})
    )
    write_json_lines(folder / "uuid.jsonl", ROWS["local_uuid"])
    own_task(folder)
    return folder


def scored(inputs: Path, tokenizer: str, run_dir: Path, world_size: int = 1, **sections: dict[str, Any]) -> Config:
    """Six steps; the rows of tasks are an odd number for two ranks."""
    tasks = {"tasks": [str(inputs / "own.yaml"), "local_uuid"], "task_data": str(inputs)}
    sections = {"eval": {**TASKS, **tasks}, "train": {}, **sections}
    sections["train"] = {"steps": 6, **sections["train"]}
    return run_config(inputs, tokenizer, run_dir, world_size, **sections)


def scores(run_dir: Path) -> dict[int, dict[str, float]]:
    lines = [line for line in metrics(run_dir) if any(tag.startswith("tasks/") for tag in line)]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: {tag: line[tag] for tag in line if tag.startswith("tasks/")} for line in lines}


@needs_lm_eval
@pytest.mark.parametrize("stage", [1, 3])
def test_tasks_are_scored_as_by_evaluate_on_any_ranks_and_do_not_affect_training(
    pools, inputs, tokenizer_path, tmp_path, stage
):
    own = {"train": {"zero_stage": stage}}
    pools(2)(train, scored(inputs, tokenizer_path, tmp_path / "with", 2, **own))
    pools(2)(train, scored(inputs, tokenizer_path, tmp_path / "without", 2, **own, eval={"at_start": False}))
    with_tasks, without = (tensors(checkpoint_at(tmp_path / name, 6)) for name in ("with", "without"))
    assert with_tasks.keys() == without.keys()
    assert all(torch.equal(with_tasks[key], without[key]) for key in without)
    found = scores(tmp_path / "with")
    assert list(found) == [0, 2, 4, 6]
    assert [line["step"] for line in metrics(tmp_path / "with") if "eval/loss" in line] == [0, 3, 6]
    options = (f"--tasks={inputs}/own.yaml,local_uuid", f"--task_data={inputs}", "--limit=3")
    for step in (2, 6):
        answer = call(EVALUATE, checkpoint_at(tmp_path / "with", step), *options)
        alone = json.loads(answer.out.splitlines()[-1])["tasks"]
        tagged = {f"tasks/{task}/{name}/first-3": value for task in alone for name, value in alone[task].items()}
        assert found[step] == pytest.approx(tagged)


@needs_lm_eval
def test_a_stopped_run_neither_loses_nor_repeats_scores(pools, inputs, tokenizer_path, tmp_path):
    best = {"every_steps": 1, "keep_last": 1, "keep_best": "tasks/local_uuid/character_accuracy"}
    for name, stops in (("whole", (None,)), ("stopped", (2, 3, None))):
        for stop in stops:
            config = scored(inputs, tokenizer_path, tmp_path / name, 2, checkpoint=best)
            pools(2)(train, config, stop)
    assert scores(tmp_path / "stopped") == scores(tmp_path / "whole")
    first = max(range(2, 7, 2), key=lambda step: scores(tmp_path / "whole")[step][f"{best['keep_best']}/first-3"])
    assert [(tmp_path / name / "checkpoints" / "best").read_text() for name in ("whole", "stopped")] == [
        f"step-{first:08d}\n"
    ] * 2


def test_ranks_with_other_rows_do_not_score_together():
    """The first of two ranks has the row of another file than the second."""
    others = Ranks(0, 2, gather=lambda mine: [mine, (xxh3_64_hexdigest(b"[('b',)]"), iter([]))])
    lm: Any = torch.nn.Linear(1, 1)
    answers = _shared(lambda requests: [1.0] * len(requests), lm, others)
    with pytest.raises(HarnessError, match="different rows"):
        answers([SimpleNamespace(doc_id=0, args=("a",))])
    assert answers([SimpleNamespace(doc_id=0, args=("b",))]) == [1.0]


@needs_lm_eval
@each(
    "settings,error,expected",
    [
        ({"tasks": ["nonsense"]}, HarnessError, "eval.tasks: lm-eval has no task nonsense"),
        ({"tasks": ["local_uuid"]}, HarnessError, "local_uuid: needs eval.task_data"),
        ({"tasks": ["{inputs}/none.yaml"]}, HarnessError, "eval.tasks: lm-eval has no task"),
        ({"tasks": ["{inputs}/own.yaml"], "keep_best": "tasks/own/exact"}, ConfigError, "tasks/own/acc_norm"),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused_before_a_model_is_built(
    runs, inputs, tokenizer_path, tmp_path, settings, error, expected
):
    own_task(inputs)
    settings = {**settings, "tasks": [name.format(inputs=inputs) for name in settings["tasks"]]}
    best = {"keep_best": settings.pop("keep_best", None)}
    config = scored(inputs, tokenizer_path, tmp_path / "run", eval=settings, checkpoint=best)
    message = runs.refusal(config, error)
    assert expected in message
    assert not (tmp_path / "run" / "checkpoints").exists()
