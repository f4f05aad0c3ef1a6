"""Settings for a model of any size from one number, its depth. Learning rates are tuned at depth 4 and scaled.

``configs/README.md`` derives the rules of the rates, and says what was checked.
"""

import math
from typing import Any, NamedTuple

from relora_mora.config.registry import MATRIX_OPTIMIZERS, METHODS
from relora_mora.config.schema import Config
from relora_mora.tokenizer.files import MOST_PIECES

Settings = dict[str, dict[str, Any]]

# optim.lr by (method.name, optim.matrices), and optim.lr_other: the best of those that docs/experiments.md tried in
# runs of TOKENS, with WIDTH features, LAYERS and TOKENS_PER_STEP; configs/README.md has the number of rates
TUNED = {
    ("full", "adamw"): 2e-3,
    ("full", "muon"): 4e-3,
    ("lora", "adamw"): 1e-3,
    ("lora", "muon"): 4e-3,
    ("remora", "muon"): 3e-3,
}
TUNED_OTHER = 3.2e-2
WIDTH = 256
LAYERS = 4
TOKENS_PER_STEP = 2048
TOKENS = 1000 * TOKENS_PER_STEP

# a rate changes with these powers of width, layers, tokens of a step, and tokens of the run
WIDTH_POWERS = {"adamw": -1.0, "muon": -0.5}
OTHER_WIDTH_POWER = -0.5  # embeddings, norms and head
LAYERS_POWER = -0.5  # only of optim.lr
BATCH_POWER = 0.5
TOKENS_POWER = -0.25

DEEPEST = 64
FEWEST_STEPS = 100
SMALLEST_VOCABULARY = 256
DEMO_VOCABULARY = 8192
SIMILAR = 3  # rates within this factor are not worth a note
CHECKED_WIDTHS = (256, 512)
CHECKED_FACTORS = (2, 4)  # between the tokens of a step and those of the tuned run, and the same for the whole run


class Rate(NamedTuple):
    """A tuned rate, and the factors that scale it to another model and another run."""

    tuned: float
    for_model: float
    for_run: float

    @property
    def value(self) -> float:
        return float(f"{math.prod(self):.2g}")

    def __str__(self) -> str:
        factors = f"{self.tuned:g} x {self.for_model:.3g} for the model x {self.for_run:.3g} for batch and tokens"
        return f"{self.value:g} = {factors}"


def scaled_rates(
    method: str, matrices: str, *, width: int, layers: int, tokens_per_step: int, tokens: float
) -> dict[str, Rate]:
    """The scaled ``optim.lr`` and ``optim.lr_other`` by name; empty if none was tuned with this method and optimizer.

    ``width``: the hidden size. A model below the tuned one has its rates, because higher ones have not been tried.
    """
    if (method, matrices) not in TUNED:
        return {}
    wider = max(1, width / WIDTH)
    for_matrices = wider ** WIDTH_POWERS[matrices] * max(1, layers / LAYERS) ** LAYERS_POWER
    for_run = (tokens_per_step / TOKENS_PER_STEP) ** BATCH_POWER * (tokens / TOKENS) ** TOKENS_POWER
    return {
        "optim.lr": Rate(TUNED[method, matrices], for_matrices, for_run),
        "optim.lr_other": Rate(TUNED_OTHER, wider**OTHER_WIDTH_POWER, for_run),
    }


def rate_notes(config: Config, *, width: int, layers: int) -> list[str]:
    """A note if a run from scratch has a rate that is far from the scaled one; else none.

    There is none about runs whose size, batch or length is far from those for which the rule was checked.
    """
    optim = config.optim
    tokens_per_step = config.tokens_per_step
    tokens = tokens_per_step * config.train.steps
    factors = (tokens_per_step / TOKENS_PER_STEP, tokens / TOKENS)
    checked = all(1 / most <= factor <= most for factor, most in zip(factors, CHECKED_FACTORS, strict=True))
    if not CHECKED_WIDTHS[0] <= width <= CHECKED_WIDTHS[1] or not checked:
        return []
    if config.model.init_from is not None or optim.others != "adamw" or config.method.full_steps:
        return []
    scaled = scaled_rates(
        config.method.name,
        optim.matrices,
        width=width,
        layers=layers,
        tokens_per_step=tokens_per_step,
        tokens=tokens,
    )
    own = {"optim.lr": optim.lr, "optim.lr_other": optim.lr if optim.lr_other is None else optim.lr_other}
    far = {name: rate for name, rate in scaled.items() if not 1 / SIMILAR <= own[name] / rate.value <= SIMILAR}
    if not far:
        return []
    here = " and ".join(f"{name} {own[name]:g}" for name in far)
    there = " and ".join(f"{rate.value:g}" for rate in far.values())
    return [f"learning rates: {here}; tuned at 7M and scaled to this run: {there} (configs/README.md)"]


def model_of(depth: int, vocab_size: int) -> dict[str, int]:
    """The shape of the LLaMA of this depth: depth 4 is ``llama_tiny``, depth 12 is ``llama_130m``."""
    width = 64 * depth
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 16 * math.ceil(width / 6),  # 8/3 of the width, rounded up to a multiple of 16
        "num_hidden_layers": depth,
        "num_attention_heads": depth,
        "num_key_value_heads": depth,
    }


def parameters_of(model: dict[str, int]) -> int:
    """All parameters of a LLaMA with untied embeddings."""
    width, layers = model["hidden_size"], model["num_hidden_layers"]
    layer = 4 * width * width + 3 * width * model["intermediate_size"] + 2 * width
    return 2 * model["vocab_size"] * width + layers * layer + width


def train_of(tokens: float, sequence_length: int) -> dict[str, int]:
    """Steps and sequences of a run of about ``tokens``, with a batch that grows as their square root.

    The batch is rounded to a multiple of 64 sequences, so that up to eight ranks can share it; a small one to a
    multiple of 8, or to 1, 2 or 4. Raises ValueError if there are too few tokens.
    """
    sequences = TOKENS_PER_STEP * math.sqrt(tokens / TOKENS) / sequence_length
    unit = next((unit for unit in (64, 8, 4, 2) if sequences >= unit), 1)
    batch_size = unit * max(1, round(sequences / unit))
    steps = math.ceil(tokens / (batch_size * sequence_length))
    if steps < FEWEST_STEPS:
        raise ValueError(
            f"{tokens:,.0f} tokens are too few for {FEWEST_STEPS} steps of {batch_size} x {sequence_length} tokens; "
            f"give at least --tokens={FEWEST_STEPS * batch_size * sequence_length}"
        )
    return {"steps": steps, "batch_size": batch_size, "micro_batch_size": min(batch_size, 8)}


def settings_of(
    *,
    depth: int,
    method: str = "remora",
    matrices: str = "muon",
    tokens: float | None = None,
    tokens_per_parameter: float = 20,
    sequence_length: int = 256,
    vocab_size: int = DEMO_VOCABULARY,
) -> tuple[list[str], Settings]:
    """Comments and settings of a run: model, method, rates, batch and steps, with everything that follows from them.

    Raises ValueError for a depth or a vocabulary out of range, for a method and optimizer without a tuned rate, and
    for too few tokens.
    """
    if not 1 <= depth <= DEEPEST:
        raise ValueError(f"--depth: got {depth}, expected 1 to {DEEPEST}")
    if not SMALLEST_VOCABULARY <= vocab_size <= MOST_PIECES:
        raise ValueError(f"--vocab_size: got {vocab_size}, expected {SMALLEST_VOCABULARY} to {MOST_PIECES}")
    model = model_of(depth, vocab_size)
    parameters = parameters_of(model)
    if tokens is None:
        tokens = tokens_per_parameter * parameters
    train = train_of(tokens, sequence_length)
    steps = train["steps"]
    tokens_per_step = train["batch_size"] * sequence_length
    tokens = steps * tokens_per_step
    width = model["hidden_size"]
    rates = scaled_rates(method, matrices, width=width, layers=depth, tokens_per_step=tokens_per_step, tokens=tokens)
    if not rates:
        known = ", ".join(f"{name} with {optimizer}" for name, optimizer in TUNED)
        raise ValueError(f"--method={method} --matrices={matrices}: no rate was tuned for it; expected {known}")
    record = METHODS[method]
    own: dict[str, Any] = {"name": method} | ({"rank": 8 * depth} if record.adapter else {})
    if record.merges:
        own |= {"operators": [1, 2], "merge_every": 10, "merge_until_step": steps // 4, "reset": "carry"}
    optim: dict[str, Any] = {name.removeprefix("optim."): rate.value for name, rate in rates.items()}
    optim |= {"matrices": matrices, "betas": [0.9, 0.95], "weight_decay": 0.0, "clip": 1.0}
    optim |= {"schedule": "cosine", "min_ratio": 0.1, "warmup_steps": steps // 10}
    optim |= {"momentum": 0.9} if matrices == "muon" else {}
    optim |= {"restart_warmup_steps": 0} if record.merges else {}
    every = {"every_steps": steps // 5}
    settings: Settings = {
        "model": {"config": "llama_tiny", "overrides": model | {"max_position_embeddings": sequence_length}},
        "tokenizer": {"path": "runs/demo/tokenizer"},
        "data": {
            "train": "runs/demo/data/train/*.json.gz",
            "validation": "runs/demo/data/validation/*.json.gz",
            "sequence_length": sequence_length,
        },
        "method": own,
        "optim": optim,
        "train": {"run_dir": f"runs/depth_{depth}_{method}_{matrices}_{tokens}_tokens", **train},
        "eval": every | {"max_tokens": 262_144},
        "checkpoint": every,
    }
    title = f"{record.title} with {MATRIX_OPTIMIZERS[matrices].title} at depth {depth}"
    demo = "text and tokenizer come from `make demo`"
    return [
        f"{title}: {parameters:,} parameters, {tokens:,} tokens",
        "the rates were tuned at depth 4 and scaled, with a rule of which little was checked; see configs/README.md:",
        *(f"  {name} {rate}" for name, rate in rates.items()),
        demo if vocab_size == DEMO_VOCABULARY else f"set tokenizer.path to one with {vocab_size:,} pieces, and data",
        f"on more ranks, lower train.micro_batch_size if {train['batch_size']} is not a multiple of it times the ranks",
    ], settings
