"""Trains causal language models with MoRA and ReMoRA, and brings both to training loops of one's own.

The names below are the library (docs/library.md). Each is imported when it is used: importing the package alone imports
neither torch nor DeepSpeed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relora_mora.engine.merging import MergeError, MergeRecord
    from relora_mora.library.attached import AttachedAdapters, attach
    from relora_mora.library.huggingface import ReMoRACallback
    from relora_mora.library.methods import LoRA, MoRA, ReLoRA, ReMoRA

__version__ = "0.3.0"
__all__ = [
    "AttachedAdapters",
    "LoRA",
    "MergeError",
    "MergeRecord",
    "MoRA",
    "ReLoRA",
    "ReMoRA",
    "ReMoRACallback",
    "attach",
]
_MODULES = {
    "AttachedAdapters": "library.attached",
    "attach": "library.attached",
    "LoRA": "library.methods",
    "MergeError": "engine.merging",
    "MergeRecord": "engine.merging",
    "MoRA": "library.methods",
    "ReLoRA": "library.methods",
    "ReMoRA": "library.methods",
    "ReMoRACallback": "library.huggingface",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
