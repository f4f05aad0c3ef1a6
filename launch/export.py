"""Exports a checkpoint as a plain LLaMA for AutoModelForCausalLM and AutoTokenizer, or only its adapter for PEFT."""

from __future__ import annotations

from pathlib import Path

try:
    from relora_mora.cli.command import run
    from relora_mora.system.process import many_imports
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None


def main(checkpoint: str, out: str, *, dtype: str = "float32", format: str = "merged") -> None:
    """Exports a checkpoint.

    Args:
        checkpoint: a checkpoint folder, or a run folder (its newest complete checkpoint)
        out: the folder to write; it must be new or empty
        dtype: float32, bfloat16 or float16
        format: merged: the whole model with merged adapters; peft: only the adapter, as LoRA; peft-mora: only the
            adapter, in the format of the released MoRA code
    """
    with many_imports():
        from relora_mora.weights.export import DTYPES, FORMATS, export

    if dtype not in DTYPES:
        raise ValueError(f"--dtype: got {dtype}, expected one of {', '.join(DTYPES)}")
    if format not in FORMATS:
        raise ValueError(f"--format: got {format}, expected one of {', '.join(FORMATS)}")
    exported = export(Path(checkpoint), Path(out), DTYPES[dtype], format)
    print(f"exported {exported} to {out} ({format}, {dtype})")


if __name__ == "__main__":
    run(main)
