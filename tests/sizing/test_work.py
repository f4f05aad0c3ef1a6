"""The plan of optimizers of whole matrices: their state, their arithmetic, what is exchanged, and their scratch."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from relora_mora.config.optim import OptimConfig
from relora_mora.config.schema import Config
from relora_mora.optim.lora_muon import LoRAMuon
from relora_mora.sizing import work
from relora_mora.sizing.setup import Setup
from tests.sizing.tools import make_config

VOCABULARY, HIDDEN = 4096, 128
ELEMENTS = VOCABULARY * HIDDEN
MODEL = LlamaConfig(hidden_size=HIDDEN, intermediate_size=352, num_hidden_layers=1, vocab_size=VOCABULARY)
# bytes for one of the two matrices; a row is one block
KEPT = {"apollo_mini": 4 * (2 * VOCABULARY + 2), "adamw8bit": 2 * ELEMENTS + 8 * VOCABULARY + 4}


def _config(others: str) -> Config:
    return make_config({"name": "remora"}).model_copy(update={"optim": OptimConfig(others=others)})


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("others", KEPT)
def test_each_matrix_has_one_owner(others: str, ranks: int) -> None:
    """So more than two ranks do not share the state evenly."""
    before, config = _config("adamw"), _config(others)
    model = work.meta_model(MODEL, config.method)
    saved = work.state_bytes(model, before.optim, ranks) - work.state_bytes(model, config.optim, ranks)
    assert saved == 2 * 8 * ELEMENTS / ranks - max(2 / ranks, 1) * KEPT[others]
    assert work.product_flops(model, before.optim) == 0
    assert work.product_flops(model, config.optim) == (2 * 2 * ELEMENTS if others == "apollo_mini" else 0)


@pytest.mark.parametrize(
    "ranks,stage,is_cut", [(1, 3, False), (2, 0, False), (2, 2, False), (4, 1, True), (2, 3, True)]
)
def test_a_matrix_that_is_cut_is_exchanged(ranks: int, stage: int, is_cut: bool) -> None:
    config = _config("apollo_mini")
    model = work.meta_model(MODEL, config.method)
    setup = Setup(config, stage, ranks, bf16=True)
    assert work.exchanged_bytes(model, setup) == is_cut * 8 * 2 * ELEMENTS / ranks
    workspace = 4 * 3 * VOCABULARY  # the projected gradient, and Adam's step on it
    pieces, whole = 2 * 4 * ELEMENTS / ranks, 4 * ELEMENTS
    assert work.scratch_bytes(model, setup) == (pieces + 2 * whole if is_cut else workspace)


@pytest.mark.parametrize("ranks,stage", [(1, 3), (2, 2), (2, 3)])
def test_a_pair_is_exchanged_with_its_values(ranks: int, stage: int) -> None:
    config = make_config({"name": "lora", "rank": 16})
    config = config.model_copy(update={"optim": OptimConfig(matrices="lora_muon")})
    model = work.meta_model(MODEL, config.method)
    setup = Setup(config, stage, ranks, bf16=True)
    shapes = [(128, 128)] * 4 + [(128, 352)] * 2 + [(352, 128)]
    elements = sum(16 * (into + out) for into, out in shapes)
    assert work.product_flops(model, config.optim) == sum(LoRAMuon.flops(16, *shape) for shape in shapes)
    is_cut = ranks > 1 and stage == 3
    assert work.exchanged_bytes(model, setup) == is_cut * 12 * elements / ranks
    of_muon = OptimConfig(matrices="muon")
    assert work.state_bytes(model, config.optim, ranks) == work.state_bytes(model, of_muon, ranks)
    assert work.passes_bytes(model, config.optim) == work.passes_bytes(model, of_muon)
    workspace = max(LoRAMuon.workspace_bytes(16, *shape, on_gpu=False) for shape in shapes)
    sent = whole = 4 * elements / ranks
    assert work.scratch_bytes(model, setup) == (2 * whole + max(sent + whole, workspace) if is_cut else workspace)


@pytest.mark.parametrize("ranks,stage,elements", [(1, 0, ELEMENTS), (1, 2, 2 * ELEMENTS), (4, 2, ELEMENTS / 2)])
def test_cautious_decay_needs_memory_and_passes(ranks: int, stage: int, elements: float) -> None:
    """It needs more memory than the rule itself, unless matrices are exchanged."""
    plain = _config("adamw8bit")
    scratch, passes = [], []
    for decay, cautious in ((0.1, False), (0.0, True), (0.1, True)):
        settings = {"weight_decay": decay, "cautious_decay": cautious}
        config = plain.model_copy(update={"optim": plain.optim.model_copy(update=settings)})
        model = work.meta_model(MODEL, config.method)
        scratch.append(work.scratch_bytes(model, Setup(config, stage, ranks, bf16=True)))
        passes.append(work.passes_bytes(model, config.optim))
    assert scratch[0] == scratch[1]
    assert scratch[2] == max(scratch[0], 5 * elements)
    assert scratch[2] > scratch[0] or ranks == 4
    assert [each - passes[0] for each in passes] == [0, 0, 2 * ELEMENTS * work.CAUTIOUS_BYTES]
