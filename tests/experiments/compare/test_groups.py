"""Which runs belong together, and how the labels of the others differ."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from relora_mora.experiments.compare.groups import group_of, group_runs
from relora_mora.experiments.compare.runs import CompareError, read_run
from relora_mora.system.run_folder import RunFolder
from tests.experiments.compare.folders import made_run, write_run
from tests.tools.each import each

Sections = dict[str, dict[str, Any]]


def _labels(folder: Path, *runs: Sections) -> list[str]:
    return [group.label for group in group_runs(made_run(folder / f"run{i}", **given) for i, given in enumerate(runs))]


def test_methods_are_named_as_in_papers(tmp_path: Path) -> None:
    runs: list[Sections] = [{"method": {"name": name}} for name in ("full", "lora", "mora", "relora", "remora")]
    assert _labels(tmp_path, *runs) == ["Full rank", "LoRA", "MoRA", "ReLoRA", "ReMoRA (1, 2)"]


def test_optimizers_of_02_keep_their_names(tmp_path: Path) -> None:
    defaults = {"optim.projection_rank": 128, "optim.projection_every": 200, "optim.projection_scale": None}
    defaults["optim.cautious_decay"] = False
    given: list[tuple[str, dict[str, Any]]] = [
        ("adamw", {}),
        ("galore", {"projection_rank": 8}),
        ("galore", {"projection_rank": 16}),
        ("apollo_mini", {}),
        ("muon", {}),
    ]
    runs = []
    for index, (name, optim) in enumerate(given):
        run = made_run(tmp_path / f"run{index}", method={"name": "full"})
        optim = {f"optim.{key}": value for key, value in {"matrices": name, **optim}.items()}
        runs.append(replace(run, settings={**run.settings, **defaults, **optim}))
    labels = ["AdamW", "GaLore, projection rank 8", "GaLore, projection rank 16"]
    labels += ["APOLLO-Mini", "Muon"]
    assert [group.label for group in group_runs(runs)] == [f"Full rank, {label}" for label in labels]


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


@each(
    ("other", "says_so"),
    [
        ({"parameters": {"total": 2_000_000}}, "model"),
        ({"bf16": True}, "train.precision"),
        ({"began_with": {"data.train": "other text"}}, "data.train"),
        ({"began_with": {"model.config": "another model"}}, "model.config"),
    ],
)
def test_runs_with_the_same_settings_but_other_inputs_are_not_one(tmp_path: Path, other: dict[str, Any], says_so: str):
    runs = [write_run(tmp_path / f"run{seed}", [9.0, 4.0], train={"seed": seed}) for seed in (0, 1)]
    noted = {"bf16": False, "began_with": {"model.config": "a model", "data.train": "a text"}}
    for run, changes in zip(runs, (noted, other), strict=True):
        starts = RunFolder(run).starts
        starts.write_text(json.dumps(json.loads(starts.read_text()) | changes) + "\n")
    assert len(group_runs(map(read_run, runs))) == len(group_runs(map(read_run, runs), best=["optim.lr"])) == 2
    assert group_runs(map(read_run, runs))[1].label == f"ReMoRA (1, 2), run1 (other {says_so})"
    silent = made_run(tmp_path / "run2", train={"seed": 2}), made_run(tmp_path / "run3", optim={"lr": 0.5})
    assert len(group_runs([read_run(runs[0]), silent[0]])) == 1, "it noted nothing"
    for order in permutations([*map(read_run, runs), silent[1]]):
        assert len(group_runs(order, best=["optim.lr"])) == 2
    for name in ("model.config", "train.precision", "data.train"):
        assert len(group_runs(map(read_run, runs), best=[name])) == (1 if name.startswith(says_so) else 2)


CHANGED = {"step": 10, "changed": ["optim.lr: 0.1 in the checkpoint, 0.2 now", "data: other sources"]}


@each(
    ("starts", "history"),
    [
        ([{"step": 0}, CHANGED], "optim.lr and data changed at step 10"),
        ([{"step": 10}], "started from a checkpoint of step 10"),
        ([{"step": 5}, CHANGED], "started from a checkpoint of step 5, optim.lr and data changed at step 10"),
    ],
)
def test_a_run_that_changed_at_a_resume_says_so_and_is_not_another_seed(
    tmp_path: Path, starts: list[dict[str, Any]], history: str
) -> None:
    plain, other = (write_run(tmp_path / f"run{seed}", [9.0, 4.0], train={"seed": seed}) for seed in (0, 1))
    RunFolder(other).starts.write_text("".join(json.dumps(start) + "\n" for start in starts))
    assert [group.label for group in group_runs([read_run(other)])] == [f"ReMoRA (1, 2), {history}"]
    silent = write_run(tmp_path / "run2", [9.0, 4.0], train={"seed": 2})
    RunFolder(silent).starts.unlink()  # a run without notes matches any other
    assert [group.label for group in group_runs(map(read_run, (silent, other)))] == [f"ReMoRA (1, 2), {history}"]
    for options in ({}, {"best": ["optim.lr"]}):
        labels = [group.label for group in group_runs(map(read_run, (other, plain)), **options)]
        assert labels == [f"ReMoRA (1, 2), {history}", "ReMoRA (1, 2)"]


def test_runs_that_resumed_with_the_same_from_different_settings_are_separate(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{seed}", [9.0, 4.0], train={"seed": seed}) for seed in (0, 1)]
    for before, run in zip((0.1, 0.3), runs, strict=True):
        change = {"step": 10, "changed": [f"optim.lr: {before} in the checkpoint, 0.2 now"]}
        RunFolder(run).starts.write_text(f'{{"step": 0}}\n{json.dumps(change)}\n')
    first, second = (group.label for group in group_runs(map(read_run, runs)))
    assert first == "ReMoRA (1, 2), optim.lr changed at step 10, run0"
    assert second == "ReMoRA (1, 2), optim.lr changed at step 10, run1 (other settings before a resume)"


def test_changes_without_a_trained_step_do_not_count(tmp_path: Path) -> None:
    change = {"step": 10, "changed": ["optim.lr: 0.1 in the checkpoint, 0.2 now"]}
    histories: list[list[dict[str, Any]]] = [
        [{"step": 0}],
        [{"step": 0}, change, {"step": 10}],  # the next start began at the same step
        [{"step": 0}, change, change],
        [{"step": 0}, change],
        [change, {"step": 20}],  # because it began at another run's checkpoint
        [{"step": 10}],
    ]
    runs = [write_run(tmp_path / f"run{seed}", [9.0, 4.0], train={"seed": seed}) for seed in range(6)]
    for run, history in zip(runs, histories, strict=True):
        RunFolder(run).starts.write_text("".join(json.dumps(start) + "\n" for start in history))
    groups = group_runs(map(read_run, runs))
    assert [[run.folder.name for run in group.runs] for group in groups] == [
        ["run0", "run1"],
        ["run2", "run3"],
        ["run4", "run5"],
    ]


def test_a_run_is_compared_with_all_earlier_runs(tmp_path: Path):
    runs = [write_run(tmp_path / f"run{seed}", [9.0, 4.0], train={"seed": seed}) for seed in (0, 1, 2)]
    for run, text in zip(runs[1:], ("one", "another"), strict=True):  # the first run has no notes
        starts = RunFolder(run).starts
        starts.write_text(json.dumps(json.loads(starts.read_text()) | {"began_with": {"data.train": text}}) + "\n")
    labels = [group.label for group in group_runs(map(read_run, runs))]
    assert labels == ["ReMoRA (1, 2), run0", "ReMoRA (1, 2), run2 (other data.train)"]


def test_a_run_scored_on_other_text_is_not_another_seed(tmp_path: Path) -> None:
    texts = ("a text", "another", "a text", None)
    runs = [made_run(tmp_path / f"run{seed}", digest=text, train={"seed": seed}) for seed, text in enumerate(texts)]
    for run, text in zip(runs, ("as the settings name it", "something else", None, None), strict=True):
        run.start["began_with"] = {} if text is None else {"data.validation": text}  # which a resume may change
    groups = group_runs(runs)
    assert [[run.folder.name for run in group.runs] for group in groups] == [["run0", "run2", "run3"], ["run1"]]
    assert groups[1].label == "ReMoRA (1, 2), run1 (other data.validation)"


def test_sets_of_held_out_text_have_no_order(tmp_path: Path) -> None:
    sets = {"a": "a.jsonl", "b": "b.jsonl"}
    ways = (sets, dict(reversed(sets.items())))
    runs: list[Sections] = [{"data": {"validation": way}, "train": {"seed": seed}} for seed, way in enumerate(ways)]
    assert _labels(tmp_path, *runs) == ["ReMoRA (1, 2)"]
    other: Sections = {"data": {"validation": ways[1]}, "optim": {"lr": 0.5}}
    assert _labels(tmp_path / "rates", runs[0], other) == ["ReMoRA (1, 2), lr 0.0005", "ReMoRA (1, 2), lr 0.5"]


def test_a_source_is_named_without_defaults(tmp_path: Path) -> None:
    pairs = {"source": "q/pairs.jsonl", "records": {"kind": "question", "too_long": "drop"}}
    runs: list[Sections] = [{"data": {"validation": {"a": "a.jsonl", "q": q}}} for q in ("q/q.jsonl", pairs)]
    assert _labels(tmp_path, *runs) == [
        "ReMoRA (1, 2), validation a a.jsonl, q q",
        "ReMoRA (1, 2), validation a a.jsonl, q source pairs, records kind question, too_long drop",
    ]


def test_a_run_with_another_seed_is_not_called_the_same(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / f"run{seed}", digest=f"{seed}", train={"seed": seed}) for seed in (0, 1)]
    labels = [group.label for group in group_runs(runs, unnamed=["data.validation"])]
    assert labels == ["ReMoRA (1, 2), run0", "ReMoRA (1, 2), run1"]


def test_a_repeated_seed_is_not_another_seed(tmp_path: Path) -> None:
    runs: list[Sections] = [{"train": {"seed": 1}}, {"train": {"seed": 1}}, {"train": {"seed": 2}}]
    assert _labels(tmp_path, *runs) == ["ReMoRA (1, 2), run0", "ReMoRA (1, 2), run1 (the same seed)"]


@each(
    ("runs", "expected"),
    [
        (
            [{"optim": {"lr": 1e-3}}, {"optim": {"lr": 2e-4}}, {"method": {"name": "full"}, "optim": {"lr": 1e-3}}],
            ["ReMoRA (1, 2), lr 0.001", "ReMoRA (1, 2), lr 0.0002", "Full rank, lr 0.001"],
        ),
        (
            [{"method": {"merge_until_step": step}} for step in (None, 30)],
            ["ReMoRA (1, 2)", "ReMoRA (1, 2), merge until step 30"],
        ),
        (
            [{"method": {"rank_pattern": ranks}} for ranks in ({}, {"q_proj": 2, "up_proj": 8})],
            ["ReMoRA (1, 2)", "ReMoRA (1, 2), rank pattern q_proj 2, up_proj 8"],
        ),
        (
            [{"optim": {"matrices": name}} for name in ("adamw", "muon")],
            ["ReMoRA (1, 2), AdamW", "ReMoRA (1, 2), Muon"],
        ),
        (
            [{"method": {"reset": "none"}, "optim": {"matrices": name}} for name in ("adamw", "a/rules.py:Mine")],
            ["ReMoRA (1, 2), AdamW", "ReMoRA (1, 2), Mine"],
        ),
        # a setting that the optimizer does not use
        (
            [{"optim": {"matrices": "muon", "rule": {"rank": 2}}}, {"optim": {"momentum": 0.5}}],
            ["ReMoRA (1, 2), Muon", "ReMoRA (1, 2), AdamW"],
        ),
        # a setting that the method does not use
        ([{"method": {"rank": 2}}, {"method": {"rank": 9, "name": "full"}}], ["ReMoRA (1, 2)", "Full rank"]),
        (
            [{"method": {"rank": 2}}, {"method": {"rank": 3}}, {"method": {"name": "full"}}],
            ["ReMoRA (1, 2), rank 2", "ReMoRA (1, 2), rank 3", "Full rank"],
        ),
        (
            [{"method": {"operators": [1, 2]}}, {"method": {"operators": [1, 2, 3, 4]}}],
            ["ReMoRA (1, 2)", "ReMoRA (1, 2, 3, 4)"],
        ),
        (
            [{"method": {"name": "mora", "operators": [1, 2]}}, {"method": {"name": "mora", "operators": [3]}}],
            ["MoRA, operators 1", "MoRA, operators 3"],
        ),
        (
            [{"method": {"merge_every": 20}}, {"method": {"merge_every": 10, "train_norms": False}}],
            ["ReMoRA (1, 2), train norms on, merge every 20", "ReMoRA (1, 2), train norms off, merge every 10"],
        ),
        (
            [{"model": {"config": "configs/small.json"}}, {"model": {"config": "configs/large.json"}}],
            ["ReMoRA (1, 2), config small", "ReMoRA (1, 2), config large"],
        ),
        (
            [{"data": {"validation": "a/held.jsonl"}}, {"data": {"validation": "b/held.jsonl"}}],
            ["ReMoRA (1, 2), validation a/held.jsonl", "ReMoRA (1, 2), validation b/held.jsonl"],
        ),
        (
            [{"optim": {"lr_other": 0.5}}, {"checkpoint": {"every_steps": 3}, "log": {"every_steps": 2}}],
            ["ReMoRA (1, 2), lr other 0.5", "ReMoRA (1, 2)"],
        ),
    ],
)
def test_a_label_names_the_differences(tmp_path: Path, runs: list[Sections], expected: list[str]) -> None:
    assert _labels(tmp_path, *runs) == expected


def test_a_group_says_which_run_has_not_ended(tmp_path: Path) -> None:
    runs = [made_run(tmp_path / "a"), made_run(tmp_path / "b", [9.0, 4.0], train={"seed": 1})]
    [group] = group_runs(runs)
    assert group.state == "unfinished, step 10 of 40"
    assert group_runs(runs[:1])[0].state == ""


def test_a_group_says_that_a_run_has_diverged(tmp_path: Path) -> None:
    [group] = group_runs([made_run(tmp_path / "a", [9.0, 4.0, 3.0, 2.0, math.nan])])
    assert group.state == "its last loss is not finite"


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
