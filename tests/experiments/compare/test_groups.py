"""Which runs belong together, and how the labels of the others differ."""

import json
import math
import re
from collections import defaultdict
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from relora_mora.experiments.compare.groups import group_of, group_runs
from relora_mora.experiments.compare.runs import CompareError, Run, read_run
from relora_mora.system.run_folder import RunFolder
from tests.experiments.compare.folders import made_run, write_run
from tests.tools.each import each


def test_unnamed_settings_still_separate_runs(tmp_path: Path) -> None:
    given = [(1e-3, 16), (2e-3, 32), (4e-3, 32)]
    runs = [
        made_run(tmp_path / f"run{rate:g}", optim={"lr": rate}, method={"name": "mora", "rank": rank})
        for rate, rank in given
    ]
    labels = [group.label for group in group_runs(runs, ["optim.lr"])]
    assert labels == ["MoRA, rank 16", "MoRA, rank 32, run0.002", "MoRA, rank 32, run0.004"]
    with pytest.raises(CompareError, match=r"--unnamed: no run has a setting lr; docs/settings\.md"):
        group_runs(runs, ["lr"])


def test_runs_that_differ_in_seeds_are_one(tmp_path: Path) -> None:
    runs = [
        made_run(tmp_path / f"run{train}{data}", train={"seed": train}, data={"seed": data, "workers": train})
        for train, data in ((0, 0), (1, 0), (0, 1))
    ]
    [group] = group_runs(runs)
    assert group.label == "ReMoRA (1, 2)"
    assert list(group.runs) == runs
    assert group_of([group], str(tmp_path / "run10")) is group
    assert group_of([group], "run10") is group
    with pytest.raises(CompareError, match="matches none of the runs"):
        group_of([group], str(tmp_path))
    twin = made_run(tmp_path / "study/run10", train={"seed": 7})
    with pytest.raises(CompareError, match=r"run10, .*study/run10; give the path of one"):
        group_of(group_runs([*runs, twin]), "run10")


def _noting(run: Path, **noted: Any) -> Run:
    """The run with this in its start, too."""
    starts = RunFolder(run).starts
    starts.write_text(json.dumps(json.loads(starts.read_text()) | noted) + "\n")
    return read_run(run)


@each(
    ("other", "labels"),
    [
        ({"bf16": True}, ["ReMoRA (1, 2), precision fp32", "ReMoRA (1, 2), precision bf16"]),
        ({"began_with": {"data.train": "other text"}}, ["ReMoRA (1, 2), run0", "ReMoRA (1, 2), run1"]),
        ({"began_with": {"model.config": "another model"}}, ["ReMoRA (1, 2), run0", "ReMoRA (1, 2), run1"]),
    ],
)
def test_runs_with_the_same_settings_but_other_inputs_are_not_one(
    tmp_path: Path, other: dict[str, Any], labels: list[str]
) -> None:
    seeds = [write_run(tmp_path / f"run{seed}", [9.0, 4.0], train={"seed": seed}) for seed in range(4)]
    noted = {"bf16": False, "began_with": {"model.config": "a model", "data.train": "a text"}}
    runs = [_noting(seeds[0], **noted), _noting(seeds[1], **{**noted, **other})]
    assert [group.label for group in group_runs(runs)] == labels
    assert len(group_runs(runs, best=["optim.lr"])) == 2
    silent = _noting(seeds[2], bf16=False)
    assert [len(group.runs) for group in group_runs([silent, runs[0]])] == [2], "what it has not noted is the same"
    elsewhere = made_run(tmp_path / "run4", optim={"lr": 0.5})
    for order in permutations([*runs, elsewhere]):
        assert len(group_runs(order, best=["optim.lr", "train.precision"])) == 2 - ("bf16" in other)
    changed = "train.precision" if "bf16" in other else next(iter(other["began_with"]))
    for name in ("model.config", "train.precision", "data.train"):
        assert len(group_runs(runs, best=[name])) == (1 if name == changed else 2), name


CHANGE = {"step": 10, "changed": ["optim.lr: 0.1 in the checkpoint, 0.2 now", "data: other sources"]}
OTHER = {"step": 10, "changed": ["optim.lr: 0.3 in the checkpoint, 0.2 now"]}


def test_which_changes_at_resumes_count(tmp_path: Path) -> None:
    histories: list[list[dict[str, Any]]] = [
        [{"step": 0}],
        [{"step": 0}, CHANGE, {"step": 10}],  # the next start began at the same step
        [{"step": 0}, CHANGE, CHANGE],
        [{"step": 0}, CHANGE],
        [CHANGE, {"step": 20}],  # because it began at another run's checkpoint
        [{"step": 10}],
        [{"step": 0}, OTHER],
        [{"step": 5}, CHANGE],
    ]
    runs = [write_run(tmp_path / f"run{seed}", [9.0, 4.0], train={"seed": seed}) for seed in range(len(histories))]
    for run, history in zip(runs, histories, strict=True):
        RunFolder(run).starts.write_text("".join(json.dumps(start) + "\n" for start in history))
    groups = group_runs(map(read_run, runs))
    assert {group.differs: [run.folder.name for run in group.runs] for group in groups} == {
        "": ["run0", "run1"],
        "optim.lr and data changed at step 10": ["run2", "run3"],
        "started from a checkpoint of step 10": ["run4", "run5"],
        "optim.lr changed at step 10": ["run6"],
        "started from a checkpoint of step 5, optim.lr and data changed at step 10": ["run7"],
    }
    assert len(group_runs(map(read_run, runs), best=["optim.lr"])) == len(groups)


def test_a_run_scored_on_other_text_is_not_another_seed(tmp_path: Path) -> None:
    texts = ("a text", "another", "a text", None)
    runs = [made_run(tmp_path / f"run{seed}", digest=text, train={"seed": seed}) for seed, text in enumerate(texts)]
    for run, text in zip(runs, ("as the settings name it", "something else", None, None), strict=True):
        run.starts[-1]["began_with"] = {} if text is None else {"data.validation": text}  # which a resume may change
    groups = group_runs(runs)
    assert [[run.folder.name for run in group.runs] for group in groups] == [["run0", "run2", "run3"], ["run1"]]
    assert groups[1].label == "ReMoRA (1, 2), run1"


SETS = {"a": "a.jsonl", "b": "b.jsonl"}
PAIRS = {"source": "q/pairs.jsonl", "records": {"kind": "question", "too_long": "drop"}}
MUON_RULE = {"optim.matrices": "muon", "optim.rule": {"rank": 2}}


@each(
    ("runs", "labels"),
    [
        ([{"method.name": name} for name in ("full", "lora", "relora")], ["Full rank", "LoRA", "ReLoRA"]),
        ([{"train.seed": 1}, {"train.seed": 1}, {"train.seed": 2}], ["-, run0", "-, run1"]),  # not another seed
        ([{"data.validation": SETS}, {"data.validation": dict(reversed(SETS.items())), "train.seed": 1}], ["-"]),
        (
            [{"data.validation": {"a": "a.jsonl", "q": q}} for q in ("q/q.jsonl", PAIRS)],
            [
                "-, validation a a.jsonl, q q",
                "-, validation a a.jsonl, q source pairs, records kind question, too_long drop",
            ],
        ),
        (
            [{"optim.lr": 1e-3}, {"optim.lr": 2e-4}, {"method.name": "full", "optim.lr": 1e-3}],
            ["-, lr 0.001", "-, lr 0.0002", "Full rank, lr 0.001"],
        ),
        (
            [{"method.rank_pattern": ranks} for ranks in ({}, {"q_proj": 2, "up_proj": 8})],
            ["-", "-, rank pattern q_proj 2, up_proj 8"],
        ),
        (
            [{"method.reset": "none", "optim.matrices": name} for name in ("adamw", "a/rules.py:Mine")],
            ["-, AdamW", "-, Mine"],
        ),
        ([MUON_RULE, {"optim.momentum": 0.5}], ["-, Muon", "-, AdamW"]),  # settings that the optimizers do not use
        ([{"method.rank": 2}, {"method.rank": 9, "method.name": "full"}], ["-", "Full rank"]),  # nor the method
        ([{"method.operators": [1, 2]}, {"method.operators": [1, 2, 3, 4]}], ["-", "ReMoRA (1, 2, 3, 4)"]),
        (
            [{"method.name": "mora", "method.operators": operators} for operators in ([1, 2], [3])],
            ["MoRA, operators 1", "MoRA, operators 3"],
        ),
        (
            [{"method.merge_every": 20}, {"method.merge_every": 10, "method.train_norms": False}],
            ["-, train norms on, merge every 20", "-, train norms off, merge every 10"],
        ),
        (
            [{"model.config": f"configs/{size}.json"} for size in ("small", "large")],
            ["-, config small", "-, config large"],
        ),
        (
            [{"data.validation": f"{folder}/held.jsonl"} for folder in "ab"],
            ["-, validation held, run0", "-, validation held, run1"],
        ),
        ([{"optim.lr_other": 0.5}, {"checkpoint.every_steps": 3, "log.every_steps": 2}], ["-, lr other 0.5", "-"]),
    ],
)
def test_a_label_names_the_differences(tmp_path: Path, runs: list[dict[str, Any]], labels: list[str]) -> None:
    """``-`` stands for the method of most runs."""
    made = []
    for number, settings in enumerate(runs):
        sections: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, value in settings.items():
            section, _, key = name.partition(".")
            sections[section][key] = value
        made.append(made_run(tmp_path / f"run{number}", **sections))
    assert [group.label for group in group_runs(made)] == [re.sub("^-", "ReMoRA (1, 2)", label) for label in labels]


def test_a_group_says_which_run_has_not_ended_or_has_diverged(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / "a"), made_run(tmp_path / "b", [9.0, 4.0], train={"seed": 1})]
    runs.append(made_run(tmp_path / "c", [9.0, 4.0, 3.0, 2.0, math.nan]))
    states = [group.state for of_group in (runs[:1], runs[:2], runs[2:]) for group in group_runs(of_group)]
    assert states == ["", "unfinished, step 10 of 40", "its last loss is not finite"]


@each("fraction", [0.1, None])
def test_epochs_of_another_order_may_be_other_steps(tmp_path: Path, fraction: float | None) -> None:
    """Each seed is judged at its own last step."""
    runs = []
    for steps, loss in ((40, 2.0), (30, 1.0)):
        losses = [9.0] * (steps // 10) + [loss]
        given = {"train": {"steps": steps, "seed": steps}, "optim": {"warmup_steps": steps // 10}}
        folder = write_run(tmp_path / str(steps), losses, **given)
        start = {"step": 0, "epochs": 3.0, "warmup_fraction": fraction}
        (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
        runs.append(read_run(folder))
    if fraction is None:
        assert [group.differs for group in group_runs(runs)] == ["warmup steps 4", "warmup steps 3"]
        return
    [group] = group_runs(runs)
    assert group.last("") == [(40, 2.0), (30, 1.0)]
    assert group.state == ""
