"""A run that begins at full rank: the switch to adapters, its resumes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from relora_mora.adapters.inject import inject
from relora_mora.adapters.layers import adapter_parameters
from relora_mora.checkpoint.reader import CheckpointReader
from relora_mora.config.load import ConfigError, validate, with_epochs
from relora_mora.config.phases import phases_of
from relora_mora.config.schema import Config
from relora_mora.model.llama import build_model
from relora_mora.optim.groups import group_of
from relora_mora.sizing.memory import state_memory
from relora_mora.sizing.setup import Setup
from relora_mora.sizing.work import meta_model
from relora_mora.system.run_folder import read_json_lines
from relora_mora.train.begin import check
from relora_mora.weights.export import export
from tests.tools.grids import STAGES, rest
from tests.tools.runs import (
    LLAMA,
    checkpoint_at,
    copy_cut_at,
    different_tensors,
    log_lines,
    logged_steps,
    logged_values,
    manifest_at,
    metrics,
    refusal_of,
    run_config,
    tensors,
    train,
)
from tests.train.state.faults import fault_settings, faulty, same_run

pytestmark = pytest.mark.distributed
FULL = 3  # steps at full rank


def full_start(
    inputs: Path, tokenizer: str | None, run_dir: Path, world_size: int = 1, **sections: dict[str, Any]
) -> Config:
    """Seven steps; adapters begin after the third and are merged after the fifth."""
    method = {"full_steps": FULL, "merge_every": 5, **sections.pop("method", {})}
    train = {"steps": 7, **sections.pop("train", {})}
    given = {"eval": {"every_steps": 3}} | sections
    return run_config(inputs, tokenizer, run_dir, world_size, method=method, train=train, **given)


def whole(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor of a checkpoint, put together, by its kind and its parameter."""
    reader = CheckpointReader(checkpoint)
    manifest = reader.manifest
    kinds = {name: manifest.kinds(name) for name in manifest.parameters} | dict.fromkeys(manifest.frozen, ("base",))
    return {
        (kind, name): reader.piece(kind, name, 0, manifest.numel(name, kind)) for name in kinds for kind in kinds[name]
    }


def test_the_first_steps_are_those_of_a_run_at_full_rank(pools, inputs, tokenizer_path, tmp_path):
    folder, full = tmp_path / "run", tmp_path / "full"
    rates = {"lr": 5e-3, "lr_full": 2e-2, "lr_other": 1e-2}
    pools(2)(train, full_start(inputs, tokenizer_path, folder, 2, optim=rates))
    at_full_rank = full_start(inputs, tokenizer_path, full, 2, method={"name": "full", "full_steps": 0})
    pools(2)(train, at_full_rank, stop_after=FULL)
    assert different_tensors(*(checkpoint_at(each, FULL) for each in (folder, full))) == []
    assert logged_values(folder)[:FULL] == logged_values(full)
    assert logged_values(folder, "eval/loss")[:2] == logged_values(full, "eval/loss")
    assert logged_steps(folder, "merge/layers") == [5]
    assert logged_steps(folder, "train/adapters_began") == [FULL]
    # another run has no adapters to begin, and its peak rate is in optim.lr
    before, after = logged_values(folder, "train/lr")[FULL - 1 : FULL + 1]
    assert before > 2 * 5e-3 > after


def train_and_keep_batches(config: Config) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Trains on one rank; returns input_ids and labels of each step."""
    from relora_mora.train.loop.loop import Trainer

    kept = []
    train_step = Trainer.train_step

    def keep(self: Trainer, share: Any) -> Any:
        kept.append((share.batch.input_ids, share.batch.labels))
        return train_step(self, share)

    with mock.patch.object(Trainer, "train_step", keep):
        train(config)
    return kept


def reference_losses(config: Config, batches: list[tuple[torch.Tensor, torch.Tensor]], run: Path) -> list[float]:
    """The run in plain torch: one AdamW, which keeps its state of embeddings and norms when adapters begin."""
    lm = build_model(LlamaConfig(**LLAMA), seed=config.train.seed)
    rates = list(zip(*(logged_values(run, f"train/lr{of}") for of in ("", "_norms")), strict=True))
    settings = {"betas": config.optim.betas, "eps": config.optim.eps, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": [p], "name": name} for name, p in lm.named_parameters()], **settings)
    losses = []
    for step, (ids, labels) in enumerate(batches, start=1):
        if step == FULL + 1:
            inject(lm, config.method, seed=config.train.seed)
            adapters = adapter_parameters(lm)
            optimizer.param_groups = [g for g in optimizer.param_groups if group_of(g["name"]) != "linears"]
            for name in adapters:
                optimizer.add_param_group({"params": [lm.get_parameter(name)], "name": name})
        for group in optimizer.param_groups:
            group["lr"] = rates[step - 1][group_of(group["name"]) != "linears"]
        loss = F.cross_entropy(lm(input_ids=ids).logits.flatten(0, 1), labels.flatten())
        lm.zero_grad()
        loss.backward()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, config.optim.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", ["lora", *rest(("mora",))])
def test_losses_equal_a_reference_that_keeps_the_moments_of_everything_else(
    pools, inputs, tokenizer_path, tmp_path, method
):
    folder = tmp_path / "run"
    config = full_start(inputs, tokenizer_path, folder, method={"name": method})
    [batches] = pools(1)(train_and_keep_batches, config)
    expected = reference_losses(config, batches, folder)
    assert len(expected) == 7
    assert logged_values(folder) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "stage", "precision", "world_size"), [("remora", 0, "fp32", 2), ("lora", 3, "bf16", 1)]
)
def test_adapters_begin_on_exactly_the_weights_that_were_trained(
    pools, inputs, tokenizer_path, tmp_path, method, stage, precision, world_size
):
    """Also if ``world_size`` ranks at stage 2 trained them, and two ranks at another stage go on."""
    origin, folder = tmp_path / "origin", tmp_path / "run"
    options: dict[str, Any] = {"method": {"name": method}, "optim": {"weight_decay": 0.01}}
    config = full_start(inputs, tokenizer_path, origin, world_size, train={"precision": precision}, **options)
    pools(world_size)(train, config)
    given = {"precision": precision, "zero_stage": stage, "resume": str(checkpoint_at(origin, FULL))}
    config = full_start(inputs, tokenizer_path, folder, 2, train=given, **options)
    pools(2)(train, config, stop_after=FULL)  # it saves a checkpoint of its own before its first step
    before, after = (whole(checkpoint_at(each, FULL)) for each in (origin, folder))
    manifest = manifest_at(folder, FULL)
    linears = [name for name in manifest["frozen"] if name.endswith("_proj.weight")]
    assert len(linears) == 14 == len(manifest["frozen"])
    assert all(torch.equal(after["base", name], before["master", name]) for name in linears)
    lm = build_model(LlamaConfig(**LLAMA), seed=0)
    inject(lm, config.method, seed=config.train.seed)
    adapters = adapter_parameters(lm)
    for kind, name in after.keys() - {("base", name) for name in linears}:
        fresh = lm.get_parameter(name).detach().flatten() if name in adapters else before.get((kind, name))
        expected = torch.zeros_like(fresh) if name in adapters and kind != "master" else fresh
        assert torch.equal(after[kind, name], expected), (kind, name)
    assert manifest["group_steps"] == {"adapters": 0, "embeddings": FULL, "norms": FULL}
    [loss], at_full_rank = logged_values(folder, "eval/loss"), logged_values(origin, "eval/loss")[1]
    assert loss == (at_full_rank if world_size == 2 else pytest.approx(at_full_rank, rel=1e-3))
    assert logged_steps(folder, "train/adapters_began") == [FULL]


GALORE = {"optim": {"matrices": "galore", "projection_rank": 4, "projection_every": 2}}
MUON = {"method": {"target_modules": ["q_proj", "up_proj"]}, "optim": {"matrices": "muon"}}
INT8, RELORA = {"method": {"base": "int8", "base_products": True}}, {"method": {"name": "relora"}}
BEFORE, AFTER = FULL - 1, FULL + 1
SWITCHES: list[Any] = [
    (0, "fp32", {}, (FULL,)),
    (1, "bf16", GALORE, (BEFORE,)),
    (2, "fp32", MUON, (AFTER,)),
    (3, "bf16", {}, (BEFORE, FULL, AFTER)),
    *rest((0, "fp32", {}, (BEFORE, AFTER)), (1, "bf16", GALORE, (FULL, AFTER)), (2, "fp32", MUON, (BEFORE, FULL))),
    *rest(*((2, "bf16", sections, (BEFORE, FULL, AFTER)) for sections in (INT8, RELORA))),
]


@pytest.mark.parametrize("stage,precision,sections,stops", SWITCHES)
def test_a_resume_before_at_and_after_the_switch_is_bit_equal(
    pools, ranks, inputs, tokenizer_path, tmp_path, stage, precision, sections, stops
):
    training = {"zero_stage": stage, "precision": precision, "deterministic": True}
    never = tmp_path / "never"
    pools(ranks)(train, full_start(inputs, tokenizer_path, never, ranks, train=training, **sections))
    for stop in stops:
        run_dir = copy_cut_at(never, tmp_path / f"stop{stop}", stop)
        unsaved = full_start(
            inputs, tokenizer_path, run_dir, ranks, train=training, checkpoint={"every_steps": 0}, **sections
        )
        pools(ranks)(train, unsaved)
        assert different_tensors(*(checkpoint_at(each, 7) for each in (never, run_dir))) == []
        for name in ("train/loss", "eval/loss", "train/lr", "train/adapters_began", "merge/layers"):
            assert logged_values(run_dir, name) == logged_values(never, name), name
        assert logged_steps(run_dir, "train/adapters_began") == [FULL]
        starts = read_json_lines(run_dir / "starts.jsonl")
        assert [start["step"] for start in starts] == [0, stop]
        assert starts[0]["parameters"] == starts[1]["parameters"]
        shutil.rmtree(run_dir)
    assert checkpoint_at(never, FULL).exists()


def test_the_last_checkpoint_at_full_rank_is_always_saved(pools, inputs, tokenizer_path, tmp_path):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    pools(1)(train, full_start(inputs, tokenizer_path, folder, checkpoint={"every_steps": 0}))
    assert sorted(path.name for path in folder.glob("checkpoints/step-*")) == ["step-00000003", "step-00000007"]
    assert "adapters" not in manifest_at(folder, FULL)["group_steps"]
    copy_cut_at(folder, moved, FULL)
    pools(2)(train, full_start(inputs, tokenizer_path, moved, 2))  # on more ranks
    assert logged_values(moved) == pytest.approx(logged_values(folder), rel=1e-4)


def left_at_each_build(config: Config) -> list[list[str]]:
    """Trains; the tensors of the phase before that still take memory when a phase is built."""
    from relora_mora.train import pretrain

    known: dict[str, weakref.ref[torch.Tensor]] = {}
    left = []
    build = pretrain.build

    def watched(*args: Any, **kwargs: Any) -> Any:
        left.append([name for name, kept in known.items() if (tensor := kept()) is not None and tensor.numel()])
        run = build(*args, **kwargs)
        engine = run.engine
        parts = dict(engine.parameters)
        parts |= {f"slice of {name}": p.ds_tensor for name, p in engine.parameters.items() if hasattr(p, "ds_tensor")}
        for number, flat in enumerate(engine.flats()):
            parts |= {f"{key} {number}": value for key, value in {"master": flat, **engine.state_of(flat)}.items()}
        assert len(parts) > 20
        known.update((name, weakref.ref(part)) for name, part in parts.items())
        return run

    with mock.patch.object(pretrain, "build", watched):
        train(config)
    return left


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", *rest(("bf16",))])
def test_nothing_of_the_first_engine_is_left_when_the_second_is_built(
    pools, inputs, tokenizer_path, tmp_path, stage, precision
):
    training = {"zero_stage": stage, "precision": precision}
    config = full_start(inputs, tokenizer_path, tmp_path / "run", 2, train=training, checkpoint={"every_steps": 0})
    assert pools(2)(left_at_each_build, config) == [[[], []]] * 2


def test_the_memory_of_both_phases_is_checked_at_the_start(inputs, tokenizer_path, tmp_path, monkeypatch):
    def state(config: Config) -> float:
        setup = Setup(config, config.train.zero_stage, 1, bf16=False)
        memory = state_memory(meta_model(LlamaConfig(**LLAMA), config.method), setup)
        return memory.weights + memory.masters + memory.optimizer + memory.host_base

    config = full_start(inputs, tokenizer_path, tmp_path / "run")
    full, adapters = (state(phase.config) for phase in phases_of(config))
    assert full > adapters
    monkeypatch.setattr(check, "memory_of_rank", lambda: (full + adapters) / 2)
    check.check(full_start(inputs, tokenizer_path, tmp_path / "run", method={"full_steps": 0}), 1)
    with pytest.raises(ConfigError, match="weights and optimizer state need"):
        check.check(config, 1)


def test_steps_that_follow_from_epochs_must_leave_some_for_the_adapters(inputs, tokenizer_path, tmp_path):
    tree = full_start(inputs, tokenizer_path, tmp_path / "run", method={"name": "lora"}).model_dump()
    tree["train"] |= {"steps": None, "epochs": 2.0}
    config = validate(tree, "the test")
    assert [phase.end for phase in phases_of(with_epochs(config, 4 * 8 * 32, 1))] == [FULL, 4]
    with pytest.raises(ConfigError, match="3 steps at full rank leave none for the adapters"):
        with_epochs(config, 3 * 8 * 32, 1)


def test_a_rollback_goes_back_to_the_start_of_the_adapters_and_not_further(pools, inputs, tokenizer_path, tmp_path):
    def settings(name: str, full_steps: int) -> Config:
        config = fault_settings(tmp_path / name, inputs, tokenizer_path)
        method = config.method.model_copy(update={"full_steps": full_steps, "merge_every": 5})
        return config.model_copy(update={"method": method})

    bad = {4: float("nan"), 5: float("nan")}
    assert pools(2)(faulty, settings("reference", 3), {}, drop=(4, 5)) == ["", ""]
    assert pools(2)(faulty, settings("rolled", 3), bad) == ["", ""]
    assert same_run(tmp_path / "rolled", tmp_path / "reference")
    assert logged_steps(tmp_path / "rolled", "train/adapters_began") == [3]
    # a kill after the rollback and before the next checkpoint
    pools(2)(faulty, settings("killed", 3), bad, stop_at=(1, 5))
    pools(2)(faulty, settings("killed", 3), {})
    assert same_run(tmp_path / "killed", tmp_path / "reference")
    messages = pools(2)(faulty, settings("late", 4), bad)  # the last step at full rank is a bad one
    assert all("no earlier checkpoint since the adapters began after step 4" in message for message in messages)


def test_a_checkpoint_at_full_rank_is_evaluated_and_exported_as_it_is(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    pools(1)(train, full_start(inputs, tokenizer_path, folder))
    checkpoint = checkpoint_at(folder, 2)
    export(checkpoint, tmp_path / "export")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    saved = whole(checkpoint)
    assert {name for _, name in saved} == {name for name, _ in lm.named_parameters()}
    assert all(torch.equal(p.detach().flatten(), saved["master", name]) for name, p in lm.named_parameters())
    for step in (2, 7):
        with pytest.raises(ValueError, match="its first 3 steps train the base weights of its adapter; export it with"):
            export(checkpoint_at(folder, step), tmp_path / "adapter", form="peft")


def test_a_resume_that_contradicts_the_checkpoint_is_refused(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    pools(1)(train, full_start(inputs, tokenizer_path, folder))

    def resumed(step: int, changes: str = "method.full_steps", **method: Any) -> Config:
        run_dir = tmp_path / f"{step}-{'-'.join(map(str, method.values()))}"
        training = {"resume": str(checkpoint_at(folder, step)), "allow_changes": changes.split()}
        return full_start(inputs, tokenizer_path, run_dir, method=method, train=training)

    for other in (1, 0):
        [early] = pools(1)(refusal_of, resumed(2, full_steps=other))
        assert f"method.full_steps: 3 in the checkpoint, {other} now; the checkpoint of step 2 has no adapters" in early
    for other in (2, 0):
        [late] = pools(1)(refusal_of, resumed(4, full_steps=other))
        assert f"method.full_steps: 3 in the checkpoint, {other} now; the adapters of the checkpoint began" in late
    [unasked] = pools(1)(refusal_of, resumed(2, "", full_steps=2))
    assert "to allow it: '--train.allow_changes=[method.full_steps]'" in unasked
    # before the adapters begin, they may change
    config = resumed(2, "method.full_steps method.rank method.name", full_steps=2, rank=2, name="relora")
    pools(1)(train, config)
    assert logged_steps(Path(config.train.run_dir), "train/adapters_began") == [2]
    assert checkpoint_at(Path(config.train.run_dir), 7).exists()
    # and so may a run at full rank go on with adapters
    config = full_start(inputs, tokenizer_path, tmp_path / "full", method={"name": "full", "full_steps": 0})
    pools(1)(train, config, stop_after=2)
    allowed = {"allow_changes": ["method.full_steps", "method.name"]}
    pools(1)(train, full_start(inputs, tokenizer_path, tmp_path / "full", train=allowed))
    assert logged_steps(tmp_path / "full", "train/adapters_began") == [FULL]


def lines_of(config: Config) -> list[str]:
    with log_lines("INFO") as lines:
        train(config)
    return lines


def test_a_user_sees_when_the_adapters_begin(pools, inputs, tokenizer_path, tmp_path):
    folder = tmp_path / "run"
    log = {"tensorboard": True, "peak_tflops": None}
    [lines] = pools(1)(lines_of, full_start(inputs, tokenizer_path, folder, log=log))
    assert [line for line in lines if "the adapters begin" in line] == ["step 3: the adapters begin"]
    assert len([line for line in lines if line.startswith("remora (full rank up to step 3) on 1 rank")]) == 1
    assert len([line for line in lines if "resumed from" in line or "run folder" in line]) == 1
    assert len([line for line in lines if line.startswith(("start: ", "peak of one device"))]) <= 2
    assert len([line for line in metrics(folder) if "startup/seconds" in line]) == 1
    assert [json.loads(line)["step"] for line in (folder / "starts.jsonl").read_text().splitlines()] == [0]
    [start] = read_json_lines(folder / "starts.jsonl")
    assert start["parameters"]["adapters"] == logged_values(folder, "train/adapters_began")[0]
    assert not list(folder.rglob("abandoned*"))
    assert len(tensors(checkpoint_at(folder, 7))) > 0
