"""Small models of many families in docs/models.md, compared with transformers."""

import math

from relora_mora.adapters.inject import decoder_linears
from relora_mora.config.schema import MethodConfig
from relora_mora.model.causal import empty_model, head_scale
from relora_mora.model.guard import examine
from relora_mora.optim.groups import adapted_share
from relora_mora.sizing.work import meta_model
from tests.tools.any_model import KINDS, any_config

_HEAD = """\
| `model_type` | linears | under adapters | attention | head | difference | boundaries |
|---|---|---|---|---|---|---|
"""


def generated() -> str:
    """A table with a row for each family."""
    return _HEAD + "".join(_row(kind) for kind in sorted(KINDS))


def _row(kind: str) -> str:
    config = any_config(kind)
    findings = examine(config, attention="auto", documents=True)
    bound = f"below 1e-{min(6, math.floor(-math.log10(max(findings.difference, 1e-9))))}"
    lm = empty_model(config)
    names = [name for name, _ in decoder_linears(lm)]
    in_chunks, scale = head_scale(lm)
    head = "all logits" if not in_chunks else "in chunks" if scale is None else "fused"
    cells = (
        f"`{kind}`",
        len({name.rpartition(".")[2] for name in names}),
        f"{adapted_share(meta_model(config, MethodConfig(name='remora', rank=2))):.0%}",
        lm.config._attn_implementation,
        head,
        bound,
        "yes" if findings.passes_boundaries else "no",
    )
    return f"| {' | '.join(map(str, cells))} |\n"
