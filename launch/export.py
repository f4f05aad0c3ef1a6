"""Writes the plain LLaMA of a checkpoint, adapters merged, for AutoModelForCausalLM and AutoTokenizer."""

from __future__ import annotations

from pathlib import Path

try:
    from relora_mora.cli import run
    from relora_mora.system.imports import many_imports
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: activate the environment (source .venv/bin/activate), or make one (make env)") from None


def main(checkpoint: str, out: str, *, dtype: str = "float32") -> None:
    """Exports a checkpoint.

    Args:
        checkpoint: a checkpoint folder, or a run folder (its newest whole checkpoint)
        out: the folder to write; it must be new or empty
        dtype: float32, bfloat16 or float16
    """
    with many_imports():
        from relora_mora.export import export
        from relora_mora.pretrained import DTYPES

    if dtype not in DTYPES:
        raise ValueError(f"--dtype: got {dtype}, expected one of {', '.join(DTYPES)}")
    exported = export(Path(checkpoint), Path(out), DTYPES[dtype])
    print(f"exported {exported} to {out} ({dtype})")


if __name__ == "__main__":
    run(main)
