"""DDP, FSDP2 and a DeepSpeed engine of the user train as one process does, and all ranks keep the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tools.grids import rest

pytestmark = pytest.mark.distributed

STEPS, MERGE_EVERY, BATCH = 10, 4, 8


def _tiny_lm() -> Any:
    from transformers import LlamaForCausalLM

    from tests.tools.tiny import tiny_llama

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama())


def _wrapped(kind: str, lm: Any, remora: Any, world: int) -> tuple[Any, Any, Any]:
    """The model to call, the optimizer, and what ``after_step`` gets."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = lm
    if kind == "ddp":
        model = DistributedDataParallel(lm)
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        for layer in lm.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(lm, mesh=mesh)
    # a large epsilon: with a small one, Adam turns a difference of one bit into a step of another sign
    optimizer = torch.optim.AdamW(remora.parameter_groups(lr=2e-2, lr_other=1e-2), eps=1e-3)
    if kind.startswith("zero"):
        import deepspeed

        zero = {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0}
        settings = {
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": BATCH // world,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        }
        model, _, _, _ = deepspeed.initialize(model=lm, optimizer=optimizer, config=settings)
        return model, optimizer, model
    return model, optimizer, optimizer


def trained(kind: str, reset: str, world: int) -> dict[str, Any]:
    """Ten steps with two merges."""
    import relora_mora as rm
    from tests.tools.tiny import LENGTH, VOCABULARY

    rank = torch.distributed.get_rank()

    lm = _tiny_lm()
    remora = rm.attach(lm, rm.ReMoRA(rank=3, merge_every=MERGE_EVERY, reset=reset), seed=1)
    model, optimizer, stepped = _wrapped(kind, lm, remora, world)
    schedule = remora.schedule(optimizer, total_steps=STEPS, warmup_steps=1, restart_warmup_steps=2)
    losses = []
    for step in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)[rank::world]
        loss = model(input_ids=ids, labels=ids).loss
        if stepped is model:
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        remora.after_step(stepped)
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / world)
    state = remora.merged_state_dict(stepped)
    return {"losses": losses, "merged": state, "merges": remora.merges_done, "operator": remora.operator}


@pytest.mark.parametrize(
    ("kind", "reset"),
    [
        ("ddp", "magnitude"),
        ("fsdp2", "carry"),
        ("zero3", "full"),
        *rest(("ddp", "full"), ("fsdp2", "full"), ("zero1", "full")),
    ],
)
def test_ranks_train_as_one_process(pools, kind, reset):
    [single] = pools(1)(trained, "plain", reset, 1)
    first, second = pools(2)(trained, kind, reset, 2)
    assert (first["merges"], first["operator"]) == (2, 1)
    assert first["losses"] == pytest.approx(single["losses"], rel=1e-6)
    for name, value in single["merged"].items():
        assert first["merged"][name].sub(value).abs().max() < 1e-6, name
    if kind in ("ddp", "zero1"):
        assert all(torch.equal(value, second["merged"][name]) for name, value in first["merged"].items())
    else:
        assert second["merged"] == {}


class TiedLM(torch.nn.Module):
    """Embeddings that are the output head, and two linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(8, 16)
        self.body = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 16))
        self.head = torch.nn.Linear(16, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)))


def tied(kind: str, *, of_part: bool = False) -> dict[str, Any]:
    """Trains three steps; the outputs before a merge, and those of the merged state in a plain model."""
    import relora_mora as rm

    lm, ids = TiedLM(), torch.arange(8)
    remora = rm.attach(lm.body if of_part else lm, rm.ReMoRA(2, merge_every=2), targets=None if of_part else ["0", "2"])
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(lm)
    groups = remora.parameter_groups(lr=0.05)
    if of_part:
        groups.append({"params": [lm.embed.weight], "lr": 0.05})
    optimizer: Any = torch.optim.AdamW(groups)
    model, stepped = lm, optimizer
    if kind != "fsdp2":
        import deepspeed

        settings = {
            "train_batch_size": 2,
            "zero_optimization": {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        }
        model, _, _, _ = deepspeed.initialize(model=lm, optimizer=optimizer, config=settings)
        stepped = model
    schedule = remora.schedule(
        optimizer, total_steps=9, warmup_steps=0, restart_warmup_steps=2, kind="constant", rewarm="adapters"
    )
    rates = []
    for _ in range(3):
        loss = model(ids).square().mean()
        if kind == "fsdp2":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            model.backward(loss)
            model.step()
        rates.append([round(group["lr"], 6) for group in optimizer.param_groups])
        schedule.step()
        remora.after_step(stepped)
    with torch.no_grad():
        outputs = model(ids)  # an evaluation, after which FSDP2 leaves parameters whole
    state = remora.merged_state_dict(stepped)
    if torch.distributed.get_rank() == 0:
        plain = TiedLM()
        (plain.body if of_part else plain).load_state_dict(state)
        if of_part:
            return {"merged": set(state), "rates": rates}
        with torch.no_grad():
            return {"difference": float((plain(ids) - outputs).abs().max()), "rates": rates}
    return {}


@pytest.mark.parametrize("kind", ["fsdp2", "zero1", "zero3"])
def test_a_model_with_tied_weights_is_merged_after_an_evaluation(pools, kind):
    first, _ = pools(2)(tied, kind)
    assert first["difference"] < 1e-5
    assert [rates[0] for rates in first["rates"]] == [0.05, 0.05, 0.025], "the adapters warm up after the merge"
    assert all(rate == 0.05 for rates in first["rates"] for rate in rates[1:])


def test_deepspeed_may_train_more_than_the_part_with_adapters(pools):
    first, _ = pools(2)(tied, "zero1", of_part=True)
    assert first["merged"] == {"0.weight", "0.bias", "2.weight", "2.bias"}


def fused(*_: Any) -> list[float]:
    """Two steps with the optimizer in which DeepSpeed wraps its FusedAdam at stage 0; the adapters' largest values."""
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

    import relora_mora as rm

    lm, ids = TiedLM(), torch.arange(8)
    remora = rm.attach(lm, rm.ReMoRA(2, merge_every=2), targets=["0", "2"])
    lm.to(torch.bfloat16)
    optimizer: Any = torch.optim.AdamW(remora.parameter_groups(lr=0.05))
    zero = FP16_Optimizer(optimizer, low_precision_dtype=torch.bfloat16)
    largest = []
    for _ in range(3):
        zero.backward(lm(ids).float().square().mean())
        zero.step()
        zero.zero_grad()
        remora.after_step(zero)
        largest.append(max(float(lm.get_parameter(name).detach().abs().max()) for name in remora.names))
    assert [int(state["step"]) for state in optimizer.state.values()] == [1, 4, 4], "it made one step when it was built"
    return largest


def test_the_wrapper_of_a_fused_optimizer_is_merged(pools):
    [(first, after_merge, last)] = pools(1)(fused)
    assert first > 0
    assert after_merge == 0
    assert last > 0
