"""Held-out loss of a checkpoint, an export or any Hugging Face causal LM; the output ends with a line of JSON."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path

try:
    from relora_mora.cli import run
    from relora_mora.system.imports import many_imports
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None


def main(
    model: str,
    *,
    data: str,
    tokenizer: str | None = None,
    sequence_length: int | None = None,
    max_tokens: int | None = None,
    micro_batch_size: int = 8,
    precision: str = "float32",
    document_mask: bool | None = None,
    text_column: str | None = None,
) -> None:
    """Scores text with a model.

    Args:
        model: a checkpoint or run folder of this trainer, or the folder of any Hugging Face causal language model
        data: source of the text, as data.validation takes it: a path, a glob, a url, allenai/c4
        tokenizer: folder or .model file; default: the model's own
        sequence_length: tokens the model sees at once; default: as trained, or the model's maximum up to 2048
        max_tokens: predicted tokens to score, in whole documents; default: all
        micro_batch_size: sequences per forward
        precision: float32, bfloat16 or float16
        document_mask: score each document alone, as data.document_mask trains; default: as trained, else false
        text_column: the key or column that holds the text; default: as trained, else text
    """
    for name, value, least in (
        ("micro_batch_size", micro_batch_size, 1),
        ("sequence_length", sequence_length, 2),
        ("max_tokens", max_tokens, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"--{name}: got {value}, expected at least {least}")
    with many_imports():  # takes seconds: numbers are checked before
        import torch

        from relora_mora.data import load_eval_set
        from relora_mora.evaluate import causal_lm_loss, evaluate, is_causal
        from relora_mora.pretrained import DTYPES, load_any_model, positions_of
        from relora_mora.system.hardware import ran_out_of_memory
        from relora_mora.system.logs import progress_bar
        from relora_mora.tokenizer import check_vocabulary, load_tokenizer

    if precision not in DTYPES:
        raise ValueError(f"--precision: got {precision}, expected one of {', '.join(DTYPES)}")
    loaded = load_any_model(Path(model), DTYPES[precision])
    settings = loaded.data_settings(data, sequence_length, document_mask, text_column)
    length = settings.sequence_length
    positions = positions_of(loaded.model)
    if positions is not None and length > positions:
        raise ValueError(
            f"--sequence_length: got {length}, but {model} has {positions} positions; give at most {positions}"
        )
    with contextlib.nullcontext(Path(tokenizer)) if tokenizer else loaded.tokenizer as tokenizer_path:
        check_vocabulary(load_tokenizer(tokenizer_path), loaded.model.config.vocab_size)
        eval_set = load_eval_set(
            data,
            config=settings,
            tokenizer_path=str(tokenizer_path),
            sequence_length=length,
            max_tokens=max_tokens,
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = loaded.model.to(device).eval()
    if not is_causal(lm, device):
        raise ValueError(
            f"{model}: {type(lm).__name__} predicts a token from that token and later ones; "
            "give a causal language model"
        )
    alone = ", each document alone" if settings.document_mask else ""
    print(
        f"{loaded.description}: {eval_set.predicted:,} tokens of {eval_set.documents:,} documents "
        f"in sequences of {length}{alone}",
        file=sys.stderr,
    )
    rows = min(micro_batch_size, -(-eval_set.predicted // length))
    try:
        with progress_bar("evaluation", "token") as progress:
            result = evaluate(causal_lm_loss(lm), eval_set, micro_batch_size=rows, device=device, progress=progress)
    except (MemoryError, RuntimeError) as error:
        if ran_out_of_memory(error):
            raise ValueError(
                f"--micro_batch_size: {rows} sequences of {length} tokens need more memory than there is; lower it"
            ) from error
        raise
    assert result is not None, "nobody stops it"
    if not math.isfinite(result.loss):
        raise ValueError(
            f"{model}: its loss in {precision} is {result.loss}; choose another --precision, or whole weights"
        )
    print(json.dumps(result.as_dict()))


if __name__ == "__main__":
    run(main)
