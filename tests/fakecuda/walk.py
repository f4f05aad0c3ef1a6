"""A whole optimizer step on CUDA as the first of two ranks, on fake tensors: nothing on the wrong device, and the host
waits for the device only as often as DeepSpeed makes it wait, once for the norm, and once for the loss.

Run by ``make test-fakecuda``. Communication is torch's fake process group; numbers read back are 0.
"""

import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from relora_mora.adapters.layers import adapter_layers, adapter_parameters
from relora_mora.checkpoint.writer import snapshot
from relora_mora.data.lanes import LaneStates
from relora_mora.data.stream.packing import Batch
from relora_mora.engine.engine import ZeroEngine
from relora_mora.engine.merging import FrozenMasters, Merger
from relora_mora.optim.groups import build_optimizer, make_schedule, parameter_groups
from relora_mora.train.loop.loop import micro_batches
from tests.fakecuda.layers import model_with
from tests.fakecuda.watch import Watch
from tests.tools.grids import STAGES
from tests.tools.tiny import Rig, tiny_config, whole_weights

# what torch.use_deterministic_algorithms refuses on CUDA, by its documentation (2.13), or does for some types only
REFUSED = re.compile(
    r".*pool.*|upsample.*|reflection_pad.*|nll_loss.*|_ctc_loss.*|_embedding_bag.*|put_|histc|bincount|(nan)?median"
    r"|kthvalue|grid_sampler.*|cumsum|scatter_reduce.*"
)
RANKS = 2
MICRO_BATCHES = 2
STEPS = 3
# DeepSpeed reads norms, at stage 0 for each parameter, too. It also waits at the end of each backward, for the stream
# that reduces, and at stage 3 after the step, for small parameters.
MOST_WAITS = {0: 8, 1: 4, 2: 9, 3: 6}


@pytest.fixture(scope="module", autouse=True)
def two_ranks() -> Iterator[None]:
    import deepspeed

    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    deepspeed.init_distributed(dist_backend="fake", verbose=False)
    torch.autograd.set_multithreading_enabled(False)  # backward in this thread, inside the modes
    yield
    distributed.destroy_process_group()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """A fake mode, without what looks into the device or at storage that fake tensors do not have."""
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)  # everything is there already
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    # stage 3 puts a function there that keeps inputs of frozen linears, too; other tests of the process count them
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)
    # ranks compare what they have traced, by value
    monkeypatch.setattr(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    return FakeTensorMode(allow_non_fake_inputs=True)


METHODS = [
    *((method, "adamw", "adamw") for method in ("full", "remora operator 1", "remora operator 1 resident", "relora")),
    ("remora operator 1", "muon", "adamw"),
    ("remora operator 1 int8", "muon", "adamw8bit"),
    ("remora operator 1 int8 resident", "muon", "adamw8bit"),
    ("relora int8 resident", "adamw", "adamw"),
]


@pytest.mark.parametrize(
    "stage,method,matrices,others",
    [(stage, *case) for stage in STAGES for case in METHODS if stage < 3 or not case[0].endswith("resident")],
)
def test_a_step_stays_on_the_device(stage: int, method: str, matrices: str, others: str, fake: FakeTensorMode) -> None:
    engine, watch = train_steps(stage, method, fake, matrices, others)
    trained = sum(parameter.requires_grad for parameter in engine.lm.parameters())
    assert len(watch.syncs) <= MOST_WAITS[stage] + (trained if stage == 0 else 0), watch.syncs
    tensors: dict[str, Tensor] = dict(engine.lm.named_parameters()) | dict(engine.lm.named_buffers())
    tensors |= {f"master of {fragment.name}": fragment.flat for fragment in engine.fragments}
    for flat in engine.flats():
        tensors |= {f"{key} of a master": value for key, value in engine.state_of(flat).items() if key != "step"}
    assert [name for name, tensor in tensors.items() if tensor.device.type != "cuda"] == []
    # train.deterministic would end with an error
    assert [name for name in watch.launches if REFUSED.fullmatch(name)] == []


@pytest.mark.parametrize(
    ("method", "reset"), [("remora operator 1", "full"), ("remora operator 1", "carry"), ("relora", "full")]
)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_and_a_merge_combine_tensors_of_the_device_and_the_host(
    stage: int, method: str, reset: str, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tools of the tests that tests/gpu runs. Numbers read back are 0, so counts over ranks are given."""
    monkeypatch.setattr(ZeroEngine, "all_reduce", _all_elements_counted)
    config = tiny_config(
        RANKS, method={"name": method.split()[0], "reset": reset}, train={"zero_stage": stage, "precision": "bf16"}
    )
    module = model_with("llama_tiny", method, 2, fake)
    names = [name for name, parameter in module.lm.named_parameters() if not parameter.requires_grad]
    with fake, Watch() as watch:
        groups = parameter_groups(module.lm, config.optim)
        optimizer = build_optimizer(module.lm, groups, config.optim)
        engine = ZeroEngine(module, module.lm, optimizer, config.train, clip=config.optim.clip, bf16=True)
        base = FrozenMasters(names, 0, RANKS)
        base.take(engine.parameters.__getitem__)
        merger = Merger(engine, base, config.method, seed=0)
        rig = Rig(config, engine, base, merger, groups, make_schedule(config.method, config.optim, 40), {})
        rig.step(1)
        before = len(watch.syncs)
        record = rig.merge(1)
        waits = watch.syncs[before:]
        launches = list(watch.launches)
        on_host = [rig.logits(), *map(rig.gather, engine.groups["adapters"]), *whole_weights(engine, names).values()]
    assert record.layers == 14
    assert {tensor.device.type for tensor in [*base.weights.values(), *on_host]} == {"cpu"}
    assert {parameter.device.type for parameter in engine.parameters.values()} == {"cuda"}
    assert [name for name in launches if REFUSED.fullmatch(name)] == []
    # are all adapters there; are they finite; effective ranks; what was merged; how much was reset
    assert len(waits) == 5, waits


class _Counted(NamedTuple):
    """What all_reduce returns, without a tensor: a single number is the count of the adapters' elements."""

    count: int
    shape: torch.Size

    def tolist(self) -> list[Any]:
        rows, *columns = self.shape
        return [[0.0] * columns[0]] * rows if columns else [0.0] * rows

    def __int__(self) -> int:
        return self.count

    def __float__(self) -> float:
        return float(self.count)


def _all_elements_counted(engine: ZeroEngine, values: Tensor, whole: Any = ZeroEngine.all_reduce) -> _Counted:
    elements = sum(engine.shapes[name].numel() for name in adapter_parameters(engine.lm))
    return _Counted(elements * engine.copies, whole(engine, values).shape)


def test_the_device_does_not_wait_for_a_batch(fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    boundaries = torch.zeros(3, dtype=torch.int32)  # it would look at the values of fake tensors
    monkeypatch.setattr("relora_mora.train.loop.loop.document_boundaries", lambda ids: boundaries)
    ids = torch.zeros(4, 16, dtype=torch.long)
    batch = Batch(ids, ids, ids.int(), LaneStates(), {}, [])
    with fake, Watch() as watch:
        pieces = list(micro_batches(batch, 2, torch.device("cuda")))
    assert [tensor.device.type for piece in pieces for tensor in piece if tensor is not None] == 6 * ["cuda"]
    assert len(pinned) == watch.launches.total() == 4  # boundaries for each micro-batch
    assert watch.syncs == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_waits_once_for_its_copies(stage: int, fake: FakeTensorMode) -> None:
    engine, _ = train_steps(stage, "remora operator 1", fake)
    with fake, Watch() as watch:
        tensors = snapshot(engine)
    assert len(watch.syncs) == 1, watch.syncs
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}


def train_steps(
    stage: int, method: str, fake: FakeTensorMode, matrices: str = "adamw", others: str = "adamw"
) -> tuple[ZeroEngine, Watch]:
    """The engine, and what it did in the last step: DeepSpeed's timer, if it were on, would wait from the third on."""
    train = {"zero_stage": stage, "precision": "bf16", "batch_size": 2 * RANKS * MICRO_BATCHES}
    config = tiny_config(RANKS, train=train, optim={"matrices": matrices, "others": others})
    module = model_with("llama_tiny", method, 2, fake)
    for _, layer in adapter_layers(module.lm):
        layer.drop_merged()  # the engine keeps them
    with fake, Watch() as watch:
        groups = parameter_groups(module.lm, config.optim)
        optimizer = build_optimizer(module.lm, groups, config.optim)
        engine = ZeroEngine(module, module.lm, optimizer, config.train, clip=config.optim.clip, bf16=True)
        ids = torch.zeros(2, 16, dtype=torch.long, device="cuda")
        boundaries = torch.zeros(5, dtype=torch.int32, device="cuda")
        engine.train()
        for _ in range(STEPS):
            watch.syncs.clear()
            losses = torch.zeros((), device="cuda")
            for index in range(MICRO_BATCHES):
                loss = engine(ids, ids, None if index else boundaries, 32.0)
                losses += loss.detach()
                engine.accumulate(loss, last=index == MICRO_BATCHES - 1)
            assert engine.step([1e-3] * len(groups), losses).applied
    return engine, watch
