"""Prepares a loaded model to score text or to continue it, and scores sets of text."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from relora_mora.data.held_out import EvalSet
from relora_mora.evaluation.loss import EvalResult, evaluate, is_causal
from relora_mora.model.causal import LossModel
from relora_mora.system.bars import Bar
from relora_mora.system.hardware import ran_out_of_memory, uses_cuda
from relora_mora.system.process import say
from relora_mora.tokenizer.identity import check_vocabulary, gives_same_tokens
from relora_mora.tokenizer.load import load_tokenizer
from relora_mora.weights.generation import generation_config
from relora_mora.weights.load import ModelSource


def on_device(source: ModelSource, dtype: torch.dtype) -> Any:
    """The model on this machine's device. Raises ValueError for one that sees the tokens that it is to predict."""
    with Bar("loading the model"):
        lm: Any = source.read(dtype)  # torch's types do not know that a model accepts a device
        lm = lm.to(torch.device("cuda" if uses_cuda() else "cpu")).eval()
    if not is_causal(lm, lm.device):
        raise ValueError(
            f"{source.description}: {type(lm).__name__} predicts a token from the token itself and later ones; give a "
            "causal language model"
        )
    return lm


def ready_to_generate(
    source: ModelSource, dtype: torch.dtype, tokenizer: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model on this machine's device, which ends its answers as its export does, and its tokenizer."""
    own = load_tokenizer(tokenizer_of(source, tokenizer))
    lm = on_device(source, dtype)
    if source.run is not None:
        lm.generation_config = generation_config(own, lm.config, source.run)
    return lm, own


def tokenizer_of(source: ModelSource, other: str | None) -> Path:
    """The folder of the model's own tokenizer, or ``other`` instead; checks that its ids fit the model."""
    path = source.tokenizer if other is None else Path(other)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, source.config.get_text_config().vocab_size)
    with contextlib.suppress(ValueError):  # the model may have no tokenizer
        if other is not None and not gives_same_tokens(other, source.tokenizer, tokenizer):
            say(
                f"{other} gives other tokens than the model's own tokenizer: the numbers below are meaningful only "
                "if the model was trained with it"
            )
    return path


def score_sets(lm: Any, sets: Mapping[str, EvalSet], micro_batch_size: int) -> dict[str, EvalResult]:
    """Raises ValueError if the memory does not suffice."""
    rows = min(micro_batch_size, max(each.blocks for each in sets.values()))
    mean_loss = LossModel(lm)
    try:
        with Bar("evaluation", "token") as bar:
            return evaluate(mean_loss, sets, micro_batch_size=rows, device=lm.device, progress=bar.update)
    except (MemoryError, RuntimeError) as error:
        if ran_out_of_memory(error):
            [length] = {each.scored.shape[1] for each in sets.values()}
            raise ValueError(
                f"--micro_batch_size: {rows} x {length} tokens need more memory than available; lower it"
            ) from error
        raise


def table_of_sets(results: Mapping[str, EvalResult]) -> str:
    width = max(map(len, results))
    rows = [
        f"{name:<{width}} {result.tokens:>15,} {result.loss:>10.4f} {result.perplexity:>12.2f} "
        f"{'' if result.bits_per_byte is None else f'{result.bits_per_byte:.4f}':>15}"
        for name, result in results.items()
    ]
    return "\n".join([f"{'':<{width}} {'tokens':>15} {'loss':>10} {'perplexity':>12} {'bits per byte':>15}", *rows])
