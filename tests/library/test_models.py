"""attach(), merges and merged() on models of several kinds, with every method, operator and reset."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relora_mora as rm
from relora_mora.adapters.layers import AdapterLinear
from relora_mora.config.schema import MethodConfig
from tests.tools.each import each

MERGE_EVERY = 3  # steps
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
METHODS = {
    "lora": rm.LoRA(2),
    "relora": rm.ReLoRA(2, merge_every=MERGE_EVERY),
    "mora": rm.MoRA(2),
    "remora": rm.ReMoRA(2, operators=(1, 2), merge_every=MERGE_EVERY),
}
Case = tuple[nn.Module, dict[str, Any]]  # a model and the arguments of a call


def mlp() -> Case:
    layers = (nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 12, bias=False), nn.LayerNorm(12), nn.Linear(12, 8))
    return nn.Sequential(*layers), {"input": torch.randn(5, 16)}


def gpt_neox() -> Case:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, vocab_size=32))
    return model, {"input_ids": torch.randint(32, (2, 6))}


def unet() -> Case:
    """A U-Net with cross attention."""
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (8,), "cross_attention_dim": 8, "attention_head_dim": 4, "norm_num_groups": 4}
    model = diffusers.UNet2DConditionModel(sample_size=8, layers_per_block=1, **blocks, **sizes)
    return model, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 7]),
        "encoder_hidden_states": torch.randn(2, 3, 8),
    }


def output(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    result = model(**arguments)
    return result if isinstance(result, Tensor) else result[0]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def deltas(remora: rm.AttachedAdapters) -> list[Tensor]:
    values = ([layer.get_parameter(key).detach() for key in layer.adapter_names] for layer in remora.layers.values())
    return [layer.delta_of(*each) for layer, each in zip(remora.layers.values(), values, strict=True)]


def state_of(optimizer: torch.optim.Optimizer, remora: rm.AttachedAdapters) -> dict[str, dict[str, Tensor]]:
    """A copy of the optimizer's state of the adapters."""
    return {name: copy.deepcopy(optimizer.state[remora.model.get_parameter(name)]) for name in remora.names}


Merge = tuple[rm.MergeRecord, dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]


def train(remora: rm.AttachedAdapters, arguments: dict[str, Any], steps: int) -> list[Merge]:
    """Trains with AdamW. Returns each merge with the adapters' optimizer state before and after it.

    A merge leaves the output as it is, and starts the adapters again.
    """
    optimizer = torch.optim.AdamW(remora.parameter_groups(lr=1e-2))
    merges = []
    for _ in range(steps):
        output(remora.model, arguments).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert any(delta.any() for delta in deltas(remora))
        with torch.no_grad():
            expected = output(remora.model, arguments)
            state = state_of(optimizer, remora)
            record = remora.after_step(optimizer)
            if record is None:
                continue
            assert_close(output(remora.model, arguments), expected)
            assert not any(delta.any() for delta in deltas(remora))
            merges.append((record, state, state_of(optimizer, remora)))
    return merges


@pytest.mark.more
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", [mlp, gpt_neox, unet])
def test_a_model_trains_merges_and_becomes_plain(make: Callable[[], Case], name: str) -> None:
    torch.manual_seed(0)
    model, arguments = make()
    keys = list(model.state_dict())
    before = output(model.eval(), arguments)
    remora = rm.attach(model, METHODS[name])
    assert_close(output(model, arguments), before)
    merges = train(remora, arguments, 2 * MERGE_EVERY + 1)
    switches = {"relora": [(None, None)] * 2, "remora": [(1, 2), (2, 1)]}
    operators = [(record.operator_before, record.operator_after) for record, _, _ in merges]
    assert operators == switches.get(name, [])
    assert all(record.layers == len(remora.layers) for record, _, _ in merges)

    plain = remora.merged()
    assert list(plain.state_dict()) == keys
    assert not any(isinstance(module, AdapterLinear) for module in plain.modules())
    trained = output(plain, arguments)
    assert_close(trained, output(model, arguments))
    assert (trained - before).abs().max() > 1e-3


MOMENTS = ("exp_avg", "exp_avg_sq")
REMORA_RESETS = [(rm.ReMoRA, reset) for reset in ("full", "magnitude", "random", "none", "carry")]
RELORA_RESETS = [(rm.ReLoRA, reset) for reset in ("full", "magnitude", "random", "none")]


@each(("method", "reset"), REMORA_RESETS + RELORA_RESETS)
def test_every_reset(method: Callable[..., MethodConfig], reset: str) -> None:
    torch.manual_seed(0)
    model, arguments = mlp()
    remora = rm.attach(model.eval(), method(2, merge_every=MERGE_EVERY, reset=reset, reset_ratio=0.75))
    merges = train(remora, arguments, 2 * MERGE_EVERY)
    assert len(merges) == 2
    for _, before, after in merges:
        for name, old in before.items():
            new = after[name]
            assert new["step"] == (0 if reset == "full" else old["step"])
            kept = [new[key] != 0 for key in MOMENTS]
            if reset == "full":
                assert not any(map(torch.any, kept))
            elif reset == "none":
                assert all(torch.equal(new[key], old[key]) for key in MOMENTS)
            elif reset == "carry":
                assert all(new[key].any() and not torch.equal(new[key], old[key]) for key in MOMENTS)
            else:
                assert torch.equal(*kept)
                assert all(torch.equal(new[key], old[key] * kept[0]) for key in MOMENTS)
                # some may have been zero before
                assert 0 < kept[0].sum() <= kept[0].numel() - round(0.75 * kept[0].numel())
            if reset == "magnitude":
                assert old["exp_avg"][kept[0]].abs().min() >= old["exp_avg"][~kept[0]].abs().max()
