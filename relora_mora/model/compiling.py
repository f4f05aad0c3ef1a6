"""torch.compile of the decoder layers, each as one program."""

import torch

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import ModelConfig
from relora_mora.system.logs import log
from relora_mora.system.process import missing_to_compile

RECOMPILE_LIMIT = 64  # programs of one layer: training, evaluation and each batch size have their own


def compiles(settings: ModelConfig, zero_stage: int, *, on_gpu: bool) -> bool:
    """Whether the decoder layers are compiled: as ``model.compile`` says; ``auto`` means on CUDA with ZeRO 0 to 2."""
    return on_gpu and zero_stage < 3 if settings.compile == "auto" else settings.compile


def compiles_here(settings: ModelConfig, zero_stage: int, *, on_gpu: bool) -> bool:
    """As :func:`compiles`, but false, with a warning, if ``auto`` finds no compiler or no Python headers.

    A CPU needs a C++ compiler, a GPU a C compiler (for Triton). Raises :class:`ConfigError` if ``model.compile`` is
    true and the compiler or the headers are missing.
    """
    if not compiles(settings, zero_stage, on_gpu=on_gpu):
        return False
    missing = missing_to_compile("C" if on_gpu else "C++")
    if missing is None:
        return True
    fault = f"model.compile: torch.compile does not work here: {missing}"
    if settings.compile == "auto":
        log.warning("%s; until then, the layers run uncompiled, which is slower", fault)
        return False
    raise ConfigError([f"{fault}, or leave it at auto"], "the settings")


def allow_programs(count: int) -> None:
    """Lets torch.compile create up to ``count`` programs of one layer; each operator of a run has its own."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, count)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, count)
