"""Exports a checkpoint as a plain LLaMA for AutoModelForCausalLM and AutoTokenizer, or only its adapter for PEFT."""

from pathlib import Path

from relora_mora.system.process import many_imports


def main(checkpoint: str, out: str, *, dtype: str = "float32", format: str = "merged") -> None:
    """Exports a checkpoint as a plain LLaMA, or only its adapter for PEFT.

    Arguments:
        checkpoint: a checkpoint folder, or a run folder (its newest complete checkpoint)
        out: the folder to write; it must be new or empty

    Options:
        dtype: float32, bfloat16 or float16
        format: merged: the whole model with merged adapters; peft: only the adapter, as LoRA; peft-mora: only the
            adapter, in the format of the released MoRA code

    Example:
        relora-mora export runs/demo/run runs/demo_exported --dtype=bfloat16
    """
    with many_imports():
        from relora_mora.weights.export import DTYPES, FORMATS, export

    if dtype not in DTYPES:
        raise ValueError(f"--dtype: got {dtype}, expected one of {', '.join(DTYPES)}")
    if format not in FORMATS:
        raise ValueError(f"--format: got {format}, expected one of {', '.join(FORMATS)}")
    exported = export(Path(checkpoint), Path(out), DTYPES[dtype], format)
    print(f"exported {exported} to {out} ({format}, {dtype})")
