"""The callback for Hugging Face's Trainer: it merges, resumes exactly, and leaves checkpoints loadable."""

import copy
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import relora_mora as rm
from tests.tools.fsdp_on_cpus import fsdp_on_cpus
from tests.tools.grids import rest
from tests.tools.tiny import tiny_llama

STEPS, MERGE_EVERY = 10, 4
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}


def trained(
    folder: Path,
    kind: str = "plain",
    *,
    resume: bool = False,
    dtype: str = "float32",
    targets: Any = None,
    callbacks: int = 1,
    **settings: Any,
) -> Any:
    """Trains a tiny LLaMA with merges after steps 4 and 8; returns losses and rates by step, adapters, trainer."""
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    from tests.tools.tiny import LENGTH, VOCABULARY

    torch.manual_seed(0)
    lm = LlamaForCausalLM(tiny_llama()).to(getattr(torch, dtype))
    remora = rm.attach(lm, rm.ReMoRA(rank=3, merge_every=MERGE_EVERY), seed=0, targets=targets)
    rows = torch.randint(0, VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(1))
    extra: dict[str, Any] = {}
    if kind == "fsdp2":
        settings["fsdp"] = True
        settings["fsdp_config"] = {
            "fsdp_version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "reshard_after_forward": True,
            "state_dict_type": "SHARDED_STATE_DICT",
        }
    if kind.startswith("zero"):
        settings["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0},  # cuts all
            "zero_allow_untested_optimizer": True,
        }
        extra["optimizer_cls_and_kwargs"] = (torch.optim.AdamW, {"params": remora.parameter_groups(lr=1e-2)})
    args = TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 1,
            "save_steps": 2,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": not kind.startswith("zero"),  # accelerate has no DeepSpeed with it
            "disable_tqdm": True,
            **settings,
        },
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    extra["eval_dataset"] = data[:8]
    made = [rm.ReMoRACallback(remora, restart_warmup_steps=2) for _ in range(callbacks)]
    trainer = Trainer(lm, args, train_dataset=data, callbacks=made, **extra)
    trainer.train(resume_from_checkpoint=resume or None)
    steps = {
        line["step"]: (line["loss"], line["learning_rate"]) for line in trainer.state.log_history if "loss" in line
    }
    return steps, remora, trainer


def keep(folder: Path, to: Path, step: int) -> None:
    """Copies the checkpoint of a step, as if the run had stopped there."""
    shutil.copytree(folder / f"checkpoint-{step}", to / f"checkpoint-{step}")


@pytest.mark.parametrize("dtype", ["bfloat16", *rest(("float32",))])
def test_a_resume_is_bit_equal_before_and_after_a_merge(tmp_path, dtype):
    whole, remora, trainer = trained(tmp_path / "whole", dtype=dtype)
    trainer.save_model(str(tmp_path / "end"))
    merged = remora.merged_state_dict()
    saved = load_file(tmp_path / "end" / "model.safetensors")
    assert saved.keys() == merged.keys()
    assert all(torch.equal(value, merged[name]) for name, value in saved.items())
    assert (remora.step, remora.merges_done, remora.operator) == (STEPS, 2, 1)
    rates = [rate for _, rate in whole.values()]
    assert rates == pytest.approx([0, 0.01, 0.01, 0.01, 0.005, 0.01, 0.01, 0.01, 0.005, 0.01])
    end = load_file(tmp_path / "whole" / f"checkpoint-{STEPS}" / "model.safetensors")
    for step in (2, 4, 6):
        folder = tmp_path / f"from {step}"
        keep(tmp_path / "whole", folder, step)
        resumed, _, _ = trained(folder, resume=True, dtype=dtype)
        assert resumed == whole, step
        again = load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors")
        assert all(torch.equal(value, again[name]) for name, value in end.items()), step


@pytest.mark.more
def test_the_best_checkpoint_comes_back_with_its_operator(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "greater_is_better": True}
    _, remora, trainer = trained(tmp_path, max_steps=6, load_best_model_at_end=True, **best)
    step = trainer.state.best_global_step  # the highest loss: an early one
    assert step == remora.step < MERGE_EVERY
    assert remora.operator == 1
    saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    assert all(torch.equal(value, remora.model.state_dict()[name]) for name, value in saved.items())


def test_a_model_with_adapters_saves_itself_as_other_models_do(tmp_path: Path) -> None:
    """With the names of the arguments of transformers, and into a folder of any name."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny_llama())
    remora = rm.attach(model, rm.MoRA(2))
    for name in remora.names:
        torch.nn.init.normal_(model.get_parameter(name), std=0.1)
    ids = torch.arange(16)[None]
    folder = tmp_path / "checkpoint-500"
    for save in (
        lambda: model.save_pretrained(folder),
        lambda: model.save_pretrained(save_directory=folder, max_shard_size="4KB"),
        lambda: model.save_pretrained(folder, True, None),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        save()
        again = LlamaForCausalLM.from_pretrained(folder)
        assert torch.equal(again(ids).logits, remora.merged()(ids).logits)


def test_a_model_whose_adapters_have_a_process_group_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # another test may have joined ranks
    group = threading.Lock()  # cannot be copied either, and one process asks nothing of its group
    ids = torch.arange(16)[None]
    for form in ("merged", "decoupled"):
        model = LlamaForCausalLM(tiny_llama()).bfloat16()
        remora = rm.attach(model, rm.ReMoRA(2, merge_every=1, form=form), process_group=group)
        model(ids, labels=ids).loss.backward()
        remora.after_step(torch.optim.AdamW(remora.parameter_groups(lr=0.01)))
        for other in (copy.deepcopy(model), remora.merged(), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids).logits, model(ids).logits)


def test_skipped_steps_count_neither_for_merges_nor_for_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with float16: the scaler leaves out steps 2 and 3, so the fourth merge interval ends two steps later."""
    from accelerate.optimizer import AcceleratedOptimizer

    made = AcceleratedOptimizer.step
    count = [0]

    def step(self: Any, closure: Any = None) -> None:
        count[0] += 1
        self._is_overflow = count[0] in (2, 3)
        if not self._is_overflow:
            made(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    whole, remora, _ = trained(tmp_path / "whole")
    assert (remora.step, remora.skipped, remora.merges_done) == (STEPS - 2, 2, 2)
    rates = [rate for _, rate in whole.values()]
    assert rates == pytest.approx([0, 0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.01, 0.01, 0.01])
    keep(tmp_path / "whole", tmp_path / "cut", 6)
    count[0] = 6
    resumed, _, _ = trained(tmp_path / "cut", resume=True)
    assert resumed == whole


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"have made 2 steps and the Trainer 1, .* one ReMoRACallback"):
        trained(tmp_path, max_steps=2, callbacks=2)


def on_ranks(folder: Path, kind: str) -> Any:
    """Runs on every rank: a run, and one that resumes at step 6."""
    results = []
    for name, resume in (("whole", False), ("cut", True)):
        with fsdp_on_cpus():
            steps, _, trainer = trained(folder / name, kind, resume=resume, save_steps=6)
        torch.distributed.barrier()
        if not resume and torch.distributed.get_rank() == 0:
            keep(folder / "whole", folder / "cut", 6)
        torch.distributed.barrier()
        results.append((steps, type(trainer.model_wrapped).__name__))
    return results


@pytest.mark.more
def test_a_longer_run_continues_a_finished_one_exactly(tmp_path: Path) -> None:
    """The last of 8 steps does not merge, so the run that continues it does."""
    whole, _, _ = trained(tmp_path / "whole")
    trained(tmp_path / "longer", max_steps=8)
    longer, remora, _ = trained(tmp_path / "longer", resume=True)
    assert remora.merges_done == 2
    assert longer == whole


@pytest.mark.more
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["fsdp2", "zero3", *rest(("ddp",), ("zero2",))])
def test_ranks_of_a_trainer_resume_exactly(pools, tmp_path, kind):
    ((whole, wrapper), (resumed, _)), _ = pools(2)(on_ranks, tmp_path, kind)
    assert wrapper == WRAPPERS.get(kind, "DeepSpeedEngine")
    assert list(whole) == list(range(1, STEPS + 1))
    assert resumed == whole
