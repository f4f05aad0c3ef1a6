"""A loop of one's own trains bit for bit as the trainer does on the same batches, through merges and a resume."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from relora_mora.checkpoint.layout import step_folder
from tests.tools.runs import LLAMA, metrics, run_config, tensors, train

pytestmark = pytest.mark.distributed
STEPS = 10  # with merges after steps 4 and 8


def train_and_record(config: Any) -> list[tuple[Any, ...]]:
    """Runs the trainer; returns the inputs of its micro-batches."""
    from relora_mora.engine.engine import ZeroEngine

    inputs: list[tuple[Any, ...]] = []
    forward = ZeroEngine.__call__

    def recorded(engine: Any, *given: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            inputs.append(given)
        return forward(engine, *given)

    with mock.patch.object(ZeroEngine, "__call__", recorded):
        train(config)
    return inputs


def train_in_a_loop(config: Any, inputs: list[tuple[Any, ...]], folder: Path, resume_at: int) -> dict[str, Any]:
    """The same steps with the library. At a step, everything is saved and loaded into new objects."""
    from transformers import LlamaConfig

    import relora_mora as rm
    from relora_mora.model.causal import LossModel, build_model

    method, optim = config.method, config.optim
    settings = {"rank": method.rank, "merge_every": method.merge_every}
    build = {"remora": rm.ReMoRA, "relora": rm.ReLoRA}[method.name]
    losses: list[float] = []

    def parts() -> tuple[Any, ...]:
        lm = build_model(LlamaConfig(**LLAMA), seed=config.train.seed)
        remora = rm.attach(lm, build(**settings), seed=config.train.seed)
        groups = remora.parameter_groups(optim.lr, optim.lr_other, weight_decay=optim.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)
        schedule = remora.schedule(
            optimizer,
            total_steps=STEPS,
            warmup_steps=optim.warmup_steps,
            restart_warmup_steps=optim.restart_warmup_steps,
        )
        return LossModel(lm), lm, remora, optimizer, schedule

    loss_of, lm, remora, optimizer, schedule = parts()
    micro = len(inputs) // STEPS
    for step in range(STEPS):
        if step == resume_at:
            saved = [part.state_dict() for part in (lm, optimizer, schedule, remora)]
            torch.save(saved, folder / "saved.pt")
            loss_of, lm, remora, optimizer, schedule = parts()
            for part, state in zip((lm, optimizer, schedule, remora), torch.load(folder / "saved.pt"), strict=True):
                part.load_state_dict(state)
        total = 0.0
        for given in inputs[step * micro : (step + 1) * micro]:
            loss = loss_of(*given) / micro
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        remora.after_step(optimizer)
    states = {name: optimizer.state[parameter] for name, parameter in lm.named_parameters() if parameter.requires_grad}
    return {
        "losses": losses,
        "weights": {name: parameter.detach() for name, parameter in lm.named_parameters()},
        "moments": {
            name: {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]} for name, state in states.items()
        },
        "merges": remora.merges_done,
    }


@pytest.mark.parametrize("method", ["remora", "relora"])
def test_a_loop_trains_bit_for_bit_as_pretrain(pools, inputs, tokenizer_path, tmp_path, method):
    config = run_config(
        inputs,
        tokenizer_path,
        tmp_path / "run",
        method={"name": method},
        optim={"clip": 0.0},
        train={"zero_stage": 0},
    )
    pool = pools(1)
    [batches] = pool(train_and_record, config)
    [loop] = pool(train_in_a_loop, config, batches, tmp_path, 6)
    lines = [line["train/loss"] for line in metrics(tmp_path / "run") if "train/loss" in line]
    assert loop["losses"] == pytest.approx(lines, abs=1e-6)  # each is a sum that is rounded for the log
    assert loop["merges"] == 2
    saved = tensors(tmp_path / "run" / "checkpoints" / step_folder(STEPS))
    trained = [key.split("|")[1] for key in saved if key.startswith("master|")]
    assert len(trained) > 14
    for name in trained:
        assert torch.equal(saved[f"master|{name}|0"], loop["weights"][name].flatten()), name
        for key, moment in loop["moments"][name].items():
            assert torch.equal(saved[f"{key}|{name}|0"], moment.flatten()), (name, key)
    frozen = set(loop["weights"]) - set(trained)
    assert len(frozen) == 14
    for name in frozen:
        assert torch.equal(saved[f"base|{name}|0"].view_as(loop["weights"][name]), loop["weights"][name]), name
