"""A whole optimizer step on CUDA as the first of two ranks, on fake tensors: nothing on the wrong device, no more waits
than are known.

Run by ``make test-fakecuda``. Communication is torch's fake process group; numbers read back are 0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from relora_mora.merging import FrozenMasters, Merger
from relora_mora.optim import build_optimizer, make_schedule, parameter_groups
from relora_mora.zero import ZeroEngine
from tests.fakecuda.layers import model_with
from tests.fakecuda.watch import Watch
from tests.tools.tiny import Rig, tiny_config, whole_weights

# what torch.use_deterministic_algorithms refuses on CUDA, by its documentation (2.13), or does for some types only
REFUSED = re.compile(
    r".*pool.*|upsample.*|reflection_pad.*|nll_loss.*|_ctc_loss.*|_embedding_bag.*|put_|histc|bincount|(nan)?median"
    r"|kthvalue|grid_sampler.*|cumsum|scatter_reduce.*"
)
RANKS = 2
MICRO_BATCHES = 2


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
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("method", ["full", "remora operator 1", "relora"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_stays_on_the_device(stage: int, method: str, fake: FakeTensorMode) -> None:
    train = {"zero_stage": stage, "precision": "bf16", "batch_size": 2 * RANKS * MICRO_BATCHES}
    config = tiny_config(RANKS, train=train)
    module = model_with("llama_tiny", method, 2, fake)
    with fake, Watch() as watch:
        groups = parameter_groups(module.lm, config.optim)
        optimizer = build_optimizer(module.lm, groups, config.optim)
        engine = ZeroEngine(module, module.lm, optimizer, config.train, clip=config.optim.clip, bf16=True)
        watch.syncs.clear()  # those of its start
        ids = torch.zeros(2, 16, dtype=torch.long, device="cuda")
        engine.train()
        for index in range(MICRO_BATCHES):
            documents = None if index else ids.int()
            engine.accumulate(engine(ids, ids, documents, 32.0), last=index == MICRO_BATCHES - 1)
        assert watch.syncs == []
        _, applied = engine.step([1e-3] * len(groups))
    assert applied
    tensors: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    tensors |= {f"master of {fragment.name}": fragment.flat for fragment in engine.fragments}
    for flat in engine.flats():
        tensors |= {f"{key} of a master": value for key, value in engine.state_of(flat).items() if key != "step"}
    assert [name for name, tensor in tensors.items() if tensor.device.type != "cuda"] == []
    trained = sum(map(len, engine.members))
    # DeepSpeed looks for overflow: at stage 0 in each parameter, at stage 2 in each group; we read the norm
    known = {0: trained + 2 * len(groups) + 1, 1: 3, 2: len(groups) + 3}
    assert len(watch.syncs) <= known[stage], watch.syncs
    # train.deterministic would end with an error
    assert [name for name in watch.launches if REFUSED.fullmatch(name)] == []


@pytest.mark.parametrize("method", ["remora operator 1", "relora"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_and_a_merge_join_what_the_device_and_the_host_have(
    stage: int, method: str, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tools of the tests that tests/gpu runs. Numbers read back are 0, so counts over ranks are told."""
    monkeypatch.setattr(Merger, "_over_ranks", lambda merger, _: merger.elements)
    config = tiny_config(RANKS, method={"name": method.split()[0]}, train={"zero_stage": stage, "precision": "bf16"})
    module = model_with("llama_tiny", method, 2, fake)
    names = [name for name, parameter in module.lm.named_parameters() if not parameter.requires_grad]
    with fake, Watch() as watch:
        groups = parameter_groups(module.lm, config.optim)
        optimizer = build_optimizer(module.lm, groups, config.optim)
        engine = ZeroEngine(module, module.lm, optimizer, config.train, clip=config.optim.clip, bf16=True)
        base = FrozenMasters(names, 0, RANKS)
        base.take(engine.parameters)
        merger = Merger(engine, base, config.method, seed=0)
        rig = Rig(config, engine, base, merger, groups, make_schedule(config.method, config.optim, 40), {})
        rig.step(1)
        record = rig.merge(1)
        launches = list(watch.launches)
        on_host = [rig.logits(), *map(rig.gather, engine.members[0]), *whole_weights(engine, names).values()]
    assert record.layers == 14
    assert {tensor.device.type for tensor in [*base.weights.values(), *on_host]} == {"cpu"}
    assert {parameter.device.type for parameter in engine.parameters.values()} == {"cuda"}
    assert [name for name in launches if REFUSED.fullmatch(name)] == []
