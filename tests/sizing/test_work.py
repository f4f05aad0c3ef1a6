"""The plan of optimizers of whole matrices: their state, their arithmetic, what is exchanged, and their scratch."""

from transformers import LlamaConfig

from relora_mora.config.optim import OptimConfig
from relora_mora.config.schema import Config
from relora_mora.optim.quantized import AdamW8bit
from relora_mora.sizing import work
from relora_mora.sizing.setup import Setup
from tests.sizing.tools import make_config
from tests.tools.each import each

VOCABULARY, HIDDEN = 4096, 128
ELEMENTS = VOCABULARY * HIDDEN
MODEL = LlamaConfig(hidden_size=HIDDEN, intermediate_size=352, num_hidden_layers=1, vocab_size=VOCABULARY)


def _config(others: str) -> Config:
    return make_config({"name": "remora"}).model_copy(update={"optim": OptimConfig(others=others)})


@each("ranks,stage,is_cut", [(1, 3, False), (2, 0, False), (2, 2, False), (4, 1, True), (2, 3, True)])
def test_a_matrix_that_is_cut_is_exchanged(ranks: int, stage: int, is_cut: bool) -> None:
    config = _config("adamw8bit")
    model = work.meta_model(MODEL, config.method)
    setup = Setup(config, stage, ranks, bf16=True)
    assert work.exchanged_bytes(model, setup) == is_cut * 8 * 2 * ELEMENTS / ranks
    workspace = AdamW8bit(config.optim).workspace_bytes(VOCABULARY, HIDDEN, on_gpu=False)
    pieces, whole = 2 * 4 * ELEMENTS / ranks, 4 * ELEMENTS
    assert work.scratch_bytes(model, setup) == (pieces + 2 * whole if is_cut else workspace)
