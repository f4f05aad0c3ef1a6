"""What a run needs, before it is started: parameters, memory, arithmetic, tokens, time.

python launch/plan.py CONFIG.yaml [--section.key=value ...] [--world_size=8] [--device=cuda] [--tokens_per_second=51000] [--json]
"""

from __future__ import annotations

import json as json_module
import math

from relora_mora.cli import run

STAND_IN = "A100"  # for plans of CUDA runs made on a machine without CUDA


def main(
    config: str,
    world_size: int = 1,
    device: str | None = None,
    tokens_per_second: float | None = None,
    utilisation: float | None = None,
    json: bool = False,
    **overrides: str,
) -> None:
    """Prints what a run needs.

    Args:
        config: YAML file of the run.
        world_size: number of devices.
        device: cuda or cpu; default: what this machine has.
        tokens_per_second: a measured rate over all devices, from which the time follows.
        utilisation: fraction of the devices' peak that is reached, where no rate was measured.
        json: print one JSON object with everything, sizes in bytes.
        overrides: --section.key=value, as for training.
    """
    from relora_mora.config import load_config

    if world_size < 1:
        raise ValueError(f"--world_size: got {world_size}, expected at least 1")
    if tokens_per_second is not None and not math.isfinite(tokens_per_second):
        raise ValueError(f"--tokens_per_second: got {tokens_per_second}, expected a finite rate")
    import torch  # takes seconds: arguments are checked before

    from relora_mora.hardware import KNOWN_PEAKS, fast_bf16, peak_flops
    from relora_mora.model import check_length, read_model_config
    from relora_mora.plan import make_plan, render

    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = device or here
    if device not in ("cuda", "cpu"):
        raise ValueError(f"--device: got {device!r}, expected cuda or cpu")
    settings = load_config(config, overrides, world_size=world_size)
    model_config = read_model_config(settings.model)
    check_length(model_config, settings)
    auto = device == "cuda" if device != here else fast_bf16()
    bf16 = auto if settings.train.precision == "auto" else settings.train.precision == "bf16"
    peak = peak_flops(bf16=bf16) if device == here else (KNOWN_PEAKS[STAND_IN] * 1e12, f"an {STAND_IN}'s in bf16")
    plan = make_plan(
        model_config,
        settings,
        world_size=world_size,
        bf16=bf16,
        on_cpu=device == "cpu",
        peak=peak,
        tokens_per_second=tokens_per_second,
        utilisation=utilisation,
    )
    print(json_module.dumps(plan.as_dict()) if json else render(plan))


if __name__ == "__main__":
    run(main)
