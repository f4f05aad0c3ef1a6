"""Compares small models of many families with transformers: ``python -m tests.tools.models_page > docs/models.md``."""

from __future__ import annotations

import math
import sys

from relora_mora.adapters.inject import decoder_linears
from relora_mora.config.schema import MethodConfig
from relora_mora.model.causal import empty_model, head_scale
from relora_mora.model.guard import examine
from relora_mora.optim.groups import expert_parameters
from relora_mora.sizing.work import meta_model
from tests.tools.any_model import FAMILIES, FURTHER_FAMILIES, any_config

_HEAD = """\
# Models

<!-- Written by `python -m tests.tools.models_page > docs/models.md`; do not edit it. -->

To pretrain or fine-tune a causal language model of any family, give its config or its folder:

```bash
relora-mora pretrain tiny_remora --model.config=my_gemma2.json       # a config.json, trained from scratch
relora-mora finetune run.yaml --model.init_from=models/SmolLM3-3B    # a folder of the hub, with its weights
```

`model_type` in the config names the family, and any causal language model of the installed transformers can be
trained. Its layers, head, masks and initial values are transformers' own. Code in a model folder is never run.

- **A comparison at the start.** A start builds a narrow twin of the model with large weights and compares its loss
  with plain transformers, and, if documents are kept apart (`data.document_mask`, records), each document with the
  same document in a sequence of its own. A model that differs is refused with the numbers. Models with recurrent or
  convolutional layers, such as Mamba and Jamba, train without a document mask only. Llama, Mistral, Qwen2 and Qwen3
  without windows are compared by the tests instead.
- **Adapters** are on every linear of the decoder layers (`method.target_modules: null`), whatever its name is. Models
  without linears (GPT-2 has `Conv1D`) train with `method.name: full`.
- **Mixtures of experts.** Experts are tensors of three dimensions, which cannot have adapters. With a method of
  adapters, experts and routers are frozen unless `method.train_experts` is true. The log says which share of the
  matrices is under adapters.
- **Attention.** `model.attention: auto` takes what transformers takes for the family, since another implementation
  would change some models without a word. Windows and chunks of attention count inside of a document.
- **The head.** A head that only multiplies, with or without a scale, is fused with the loss, so that logits never
  exist as a whole. One with a soft cap or a bias computes the loss in chunks; any other needs memory for all logits.
- **Memory and time** of families other than LLaMA are estimates in `relora-mora plan`.

## Compared here

Each row is a model of two layers: the kinds of linears with adapters, the share of the matrices in layers that they
hold, attention and head as above, the difference of the loss from transformers in nats, and whether its layers pass
the boundaries of documents on, so that flash attention needs no mask on a GPU. In all of them, a document in
a packed sequence computes what it computes in one of its own. `tests/train/test_any_model_runs.py` trains, stops,
resumes and exports gemma2 (ZeRO-3 with activation checkpointing), phi3, mixtral (ZeRO-3), gpt2 and gpt_oss, and
compares their losses with plain torch. `tests/model/test_any_model.py` compares initial values, recomputed layers,
generation and exports of every row.

| `model_type` | linears | under adapters | attention | head | difference | boundaries |
|---|---|---|---|---|---|---|
"""


def models_page() -> str:
    """The page as Markdown."""
    return _HEAD + "".join(_row(kind) for kind in sorted({**FAMILIES, **FURTHER_FAMILIES}))


def _row(kind: str) -> str:
    config = any_config(kind)
    findings = examine(config, attention="auto", documents=True)
    bound = f"below 1e-{min(6, math.floor(-math.log10(max(findings.difference, 1e-9))))}"
    lm = empty_model(config)
    names = [name for name, _ in decoder_linears(lm)]
    linears = sum(layer.weight.numel() for _, layer in decoder_linears(lm))
    adapted = meta_model(config, MethodConfig(name="remora", rank=2))
    experts = sum(adapted.get_parameter(name).numel() for name in expert_parameters(adapted))
    in_chunks, scale = head_scale(lm)
    head = "all logits" if not in_chunks else "in chunks" if scale is None else "fused"
    cells = (
        f"`{kind}`",
        len({name.rpartition(".")[2] for name in names}),
        f"{linears / (linears + experts):.0%}",
        lm.config._attn_implementation,
        head,
        bound,
        "yes" if findings.passes_boundaries else "no",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


if __name__ == "__main__":
    sys.stdout.write(models_page())
