"""DDP, FSDP2 and a DeepSpeed engine of the user train as one process does, and all ranks keep the same bits."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import relora_mora as rm
from tests.tools.grids import rest
from tests.tools.tiny import LENGTH, VOCABULARY, tiny_llama

pytestmark = pytest.mark.distributed

STEPS, MERGE_EVERY, BATCH = 10, 4, 8


class Loop:
    """A model and its optimizer as one process, DDP, FSDP2 or DeepSpeed trains them."""

    def __init__(
        self, kind: str, lm: nn.Module, groups: Callable[[], list[dict[str, Any]]], parts: Sequence[nn.Module] = ()
    ) -> None:
        from torch.distributed.fsdp import fully_shard
        from torch.nn.parallel import DistributedDataParallel

        for part in (*parts, lm) if kind == "fsdp2" else ():
            fully_shard(part)
        # a large epsilon: with a small one, Adam turns a difference of one bit into a step of another sign
        self.optimizer = torch.optim.AdamW(groups(), eps=1e-3)
        self.model: Any = DistributedDataParallel(lm) if kind == "ddp" else lm
        self.engine: Any = None
        if kind.startswith("zero"):
            import deepspeed

            settings = {
                "train_batch_size": BATCH,
                "zero_optimization": {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
            }
            self.engine, *_ = deepspeed.initialize(model=lm, optimizer=self.optimizer, config=settings)
            self.model = self.engine
        self.stepped = self.engine or self.optimizer  # what after_step() gets

    def step(self, loss: torch.Tensor) -> None:
        if self.engine:
            self.engine.backward(loss)
            self.engine.step()
        else:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def trained(kind: str, reset: Any, world: int) -> dict[str, Any]:
    """Ten steps with two merges."""
    from transformers import LlamaForCausalLM

    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    lm: Any = LlamaForCausalLM(tiny_llama())
    remora = rm.attach(lm, rm.ReMoRA(rank=3, merge_every=MERGE_EVERY, reset=reset), seed=1)
    loop = Loop(kind, lm, lambda: remora.parameter_groups(lr=2e-2, lr_other=1e-2), lm.model.layers)
    schedule = remora.schedule(loop.optimizer, total_steps=STEPS, warmup_steps=1, restart_warmup_steps=2)
    losses = []
    for step in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)[rank::world]
        loss = loop.model(input_ids=ids, labels=ids).loss
        loop.step(loss)
        schedule.step()
        remora.after_step(loop.stepped)
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / world)
    state = remora.merged_state_dict(loop.stepped)
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


class TiedLM(nn.Module):
    """Embeddings that are the output head, and two linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 16)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)))


def tied(kind: str) -> dict[str, Any]:
    """Trains three steps; the outputs before a merge, and those of the merged state in a plain model."""
    lm, ids = TiedLM(), torch.arange(8)
    remora = rm.attach(lm, rm.ReMoRA(2, merge_every=2), targets=["0", "2"])
    loop = Loop(kind, lm, lambda: remora.parameter_groups(lr=0.05))
    schedule = remora.schedule(
        loop.optimizer, total_steps=9, warmup_steps=0, restart_warmup_steps=2, kind="constant", rewarm="adapters"
    )
    rates = []
    for _ in range(3):
        loop.step(loop.model(ids).square().mean())
        rates.append([round(group["lr"], 6) for group in loop.optimizer.param_groups])
        schedule.step()
        remora.after_step(loop.stepped)
    with torch.no_grad():
        outputs = loop.model(ids)  # an evaluation, after which FSDP2 leaves parameters whole
    state = remora.merged_state_dict(loop.stepped)
    difference = None
    if torch.distributed.get_rank() == 0:
        plain = TiedLM()
        plain.load_state_dict(state)
        difference = float((plain(ids) - outputs).abs().max())
    return {"difference": difference, "rates": rates}


@pytest.mark.parametrize("kind", ["fsdp2", "zero1", "zero3"])
def test_a_model_with_tied_weights_is_merged_after_an_evaluation(pools, kind):
    first, _ = pools(2)(tied, kind)
    assert first["difference"] < 1e-5
    assert [rates[0] for rates in first["rates"]] == [0.05, 0.05, 0.025], "the adapters warm up after the merge"
    assert all(rate == 0.05 for rates in first["rates"] for rate in rates[1:])


def fused(*_: Any) -> list[float]:
    """Two steps with the optimizer in which DeepSpeed wraps its FusedAdam at stage 0; the adapters' largest values."""
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

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
