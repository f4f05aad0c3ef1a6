"""Initial values: those of transformers for any family, and the same ones on any rank."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from relora_mora.adapters.inject import inject
from relora_mora.config.schema import MethodConfig
from relora_mora.model.causal import build_model, empty_model, initial_values, put_values
from tests.tools.any_model import any_config, some
from tests.tools.each import each
from tests.tools.tiny import tiny_llama


@pytest.mark.parametrize("kind", some("apertus", "gpt_oss", "gpt2", "llama"))
def test_initial_values_have_the_distributions_of_transformers_on_any_rank(kind: str) -> None:
    config = any_config(kind, wide=True)
    lm = empty_model(config)
    names = [name for name, _ in lm.named_parameters()]
    values = initial_values(lm, names, seed=1)
    parts = initial_values(lm, names[1::2], seed=1) | initial_values(lm, names[::2], seed=1)
    assert all(torch.equal(parts[name], value) for name, value in values.items())
    other = initial_values(lm, names, seed=4)
    assert any(not torch.equal(other[name], value) for name, value in values.items())
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config).float()
    wrong = []
    for name, parameter in theirs.state_dict().items():
        if name not in values:
            continue  # a buffer, or the other name of a tied weight
        ours = values[name]
        spread = float(parameter.std(correction=0))
        if spread < 1e-7:
            same = torch.allclose(ours, parameter)
        elif parameter.numel() < 200:  # too few numbers to compare their spread
            same = float(ours.abs().max()) < 10 * spread
        else:
            same = abs(float(ours.std()) / spread - 1) < 0.2 and abs(float(ours.mean() - parameter.mean())) < spread
        if not same:
            wrong.append(name)
    assert wrong == []


def test_a_weight_depends_on_nothing_but_seed_name_and_shape():
    generator = torch.random.get_rng_state()
    small, large = (
        dict(build_model(tiny_llama(num_hidden_layers=layers), seed=7).named_parameters()) for layers in (1, 3)
    )
    assert all(torch.equal(value, large[name]) for name, value in small.items())
    drawn = [value for value in large.values() if value.ndim == 2]
    firsts = {value.flatten()[0].item() for value in drawn}
    assert len(firsts) == len(drawn)  # no two weights start with the same number
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert not torch.equal(large["lm_head.weight"], build_model(tiny_llama(), seed=8).lm_head.weight)


@each("tied", [False, True])
def test_values_are_filled_in_next_to_adapters(tied):
    model_config = tiny_llama(tie_word_embeddings=tied)
    lm = empty_model(model_config)
    inject(lm, MethodConfig(name="remora", rank=3), seed=0)
    empty = [name for name, p in lm.named_parameters() if p.is_meta]
    put_values(lm, initial_values(empty_model(lm.config), empty, 5))
    assert not any(tensor.is_meta for tensor in [*lm.parameters(), *lm.buffers()])
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied
    plain = dict(build_model(model_config, seed=5).named_parameters())
    assert set(empty) == set(plain)
    for name, value in plain.items():
        assert torch.equal(lm.get_parameter(name), value)
        # what inject() froze stays frozen
        assert lm.get_parameter(name).requires_grad == (".layers." not in name or "norm" in name)
