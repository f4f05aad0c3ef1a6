"""The only room that imports DeepSpeed: it starts DeepSpeed, gives access to its state, and merges adapters."""

import os

from relora_mora.system.hardware import uses_cuda

if not uses_cuda():  # DeepSpeed looks for an accelerator when it is imported, and warns if it finds none
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
