"""Exports a checkpoint as a plain model for AutoModelForCausalLM and AutoTokenizer, or only its adapter for PEFT."""

import os
import shlex
from pathlib import Path
from typing import Any, Literal

from relora_mora.cli.arguments import PositiveInt, Precision
from relora_mora.system.bars import Bar
from relora_mora.system.process import many_imports

_OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # of GGUF


def main(
    checkpoint: str,
    out: str,
    *,
    dtype: Precision = "float32",
    format: Literal["merged", "peft", "peft-mora"] = "merged",
    shard_gb: PositiveInt = 5,
    push: str | None = None,
    private: bool = False,
) -> None:
    """Exports a checkpoint as a plain model, or only its adapter for PEFT, with a model card.

    Arguments:
        checkpoint: a checkpoint folder, RUN/best, or a run folder (its newest complete checkpoint)
        out: the folder to write; it must be new or empty

    Options:
        dtype: the precision of the weights
        format: merged: the whole model with merged adapters; peft: only the adapter, as LoRA; peft-mora: only the
            adapter, in the format of the released MoRA code
        shard_gb: a larger model is written in several files of at most this size
        push: also upload it to the Hugging Face hub as OWNER/NAME, with the login of `hf auth login` or HF_TOKEN
        private: nobody else sees the repository

    Example:
        relora-mora export runs/demo/run runs/demo_exported --dtype=bfloat16
    """
    if private and push is None:
        raise ValueError("--private: is about the repository of --push=OWNER/NAME; give both")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # for DeepSpeed, which accelerate imports to save a model
    with many_imports():
        import torch

        from relora_mora.weights.export import export
        from relora_mora.weights.push import open_repository, upload

    hub: Any = None

    def check_hub() -> None:
        nonlocal hub
        if push is not None:
            hub = open_repository(push, private=private)

    kind = getattr(torch, dtype)
    with Bar("exporting"):
        exported = export(
            Path(checkpoint), Path(out), kind, format, shard_gb=shard_gb, title=push, before_merge=check_hub
        )
    print(f"exported {exported} to {out} ({format}, {dtype})")
    if format == "merged":
        folder = shlex.quote(out)
        convert = f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf --outtype {_OUTTYPES[dtype]}"
        print(f"as GGUF, if llama.cpp has this family: {convert}")
    if push is not None:
        print(f"uploaded to {upload(hub, push, Path(out), f'Export {exported.name}')}")
