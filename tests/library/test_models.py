"""attach(), merges and merged() with every method, operator and reset. Examples have further kinds of models."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import relora_mora as rm
from relora_mora.adapters.layers import AdapterLinear
from relora_mora.config.schema import MethodConfig
from tests.tools.each import each
from tests.tools.small import mlp

MERGE_EVERY = 3  # steps
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
METHODS = {
    "lora": rm.LoRA(2),
    "relora": rm.ReLoRA(2, merge_every=MERGE_EVERY),
    "mora": rm.MoRA(2),
    "remora": rm.ReMoRA(2, operators=(1, 2), merge_every=MERGE_EVERY),
}
State = dict[str, dict[str, Tensor]]  # of an optimizer, by parameter


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def has_delta(remora: rm.AttachedAdapters) -> bool:
    layers = remora.layers.values()
    return any(layer.delta_of(*map(layer.get_parameter, layer.adapter_names)).any() for layer in layers)


def train(
    remora: rm.AttachedAdapters, compute: Callable[[], Tensor], steps: int
) -> list[tuple[rm.MergeRecord, State, State]]:
    """Trains with AdamW. Returns each merge with the adapters' optimizer state before and after it.

    A merge leaves the output as it is, and starts the adapters again.
    """
    optimizer = torch.optim.AdamW(remora.parameter_groups(lr=1e-2))

    def state() -> State:
        return {name: copy.deepcopy(optimizer.state[remora.model.get_parameter(name)]) for name in remora.names}

    merges = []
    for _ in range(steps):
        compute().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert has_delta(remora)
        with torch.no_grad():
            expected, before = compute(), state()
            record = remora.after_step(optimizer)
            if record is None:
                continue
            assert_close(compute(), expected)
            assert not has_delta(remora)
            merges.append((record, before, state()))
    return merges


@pytest.mark.more
@pytest.mark.parametrize("name", METHODS)
def test_a_model_of_another_family_trains_merges_and_becomes_plain(name: str) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    model, ids = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, vocab_size=32)).eval(), torch.randint(32, (2, 6))
    keys, before = list(model.state_dict()), model(ids).logits
    remora = rm.attach(model, METHODS[name])
    assert_close(model(ids).logits, before)
    merges = train(remora, lambda: model(ids).logits, 2 * MERGE_EVERY + 1)
    switches = {"relora": [(None, None)] * 2, "remora": [(1, 2), (2, 1)]}
    operators = [(record.operator_before, record.operator_after) for record, _, _ in merges]
    assert operators == switches.get(name, [])
    assert all(record.layers == len(remora.layers) for record, _, _ in merges)

    plain = remora.merged()
    assert list(plain.state_dict()) == keys
    assert not any(isinstance(module, AdapterLinear) for module in plain.modules())
    trained = plain(ids).logits
    assert_close(trained, model(ids).logits)
    assert (trained - before).abs().max() > 1e-3


MOMENTS = ("exp_avg", "exp_avg_sq")
REMORA_RESETS = [(rm.ReMoRA, reset) for reset in ("full", "magnitude", "random", "none", "carry")]
RELORA_RESETS = [(rm.ReLoRA, reset) for reset in ("full", "magnitude", "random", "none")]


@each(("method", "reset"), REMORA_RESETS + RELORA_RESETS)
def test_every_reset(method: Callable[..., MethodConfig], reset: str) -> None:
    """All moments of an element go together: with exp_avg and without exp_avg_sq, it would step by exp_avg / eps."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    remora = rm.attach(mlp(), method(2, merge_every=MERGE_EVERY, reset=reset, reset_ratio=0.75))
    merges = train(remora, lambda: remora.model(x), 2 * MERGE_EVERY)
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
