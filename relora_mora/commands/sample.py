"""Continues text with a trained model, on the terminal."""

from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Le

from relora_mora.cli.arguments import NonNegativeInt, PositiveInt, Precision
from relora_mora.system.process import many_imports


def main(
    model: str,
    text: str,
    *,
    max_new_tokens: PositiveInt = 100,
    temperature: Annotated[float, Ge(0)] = 0.8,
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0,
    seed: NonNegativeInt = 0,
    base: str | None = None,
    precision: Precision = "float32",
) -> None:
    """Continues a text with a trained model.

    Prints the text and its continuation while it is generated, up to the end of the document.

    Arguments:
        model: a checkpoint or run folder of this trainer, the folder of any Hugging Face causal language model, or the
            folder of an adapter
        text: the text to continue

    Sampling:
        max_new_tokens: the most tokens to add
        temperature: divides the logits; below 0.001: always the most probable token
        top_p: sample only from the most probable tokens that together have this probability
        seed: another seed gives another text

    Model:
        base: the model that an adapter was trained on; default: the folder that its config names
        precision: the precision of the weights

    Example:
        relora-mora sample runs/demo/run "The function returns" --temperature=0.7
    """
    with many_imports():
        import torch
        from transformers import TextStreamer

        from relora_mora.evaluation.score import ready_to_generate
        from relora_mora.model.config import positions_in
        from relora_mora.tokenizer.load import quiet_transformers
        from relora_mora.weights.load import find_model

    source = find_model(Path(model), None if base is None else Path(base))
    lm, tokenizer = ready_to_generate(source, getattr(torch, precision))
    prompt = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(lm.device)
    length = prompt.input_ids.shape[1]
    positions = positions_in(lm.config) or length + max_new_tokens
    if not 0 < length < positions:
        raise ValueError(f"TEXT: got {length:,} tokens, expected 1 to {positions - 1:,}, for which {model} has room")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with quiet_transformers():
        lm.generate(
            **prompt,
            **(sampling if temperature >= 0.001 else {"do_sample": False}),
            max_new_tokens=min(max_new_tokens, positions - length),
            pad_token_id=tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )
