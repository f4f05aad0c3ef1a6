"""What the workers of all pools import, once: they are forked from a process that has imported this and does nothing
else.
"""

import gc
import os

from relora_mora.system.process import many_imports

with many_imports():
    import pytest  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import relora_mora.train.pretrain  # noqa: F401
    from relora_mora.checkpoint import writer

# tiny runs save at every step, and no test cuts the power
writer.POLL_SECONDS = 0.005
os.fsync = lambda handle: None  # type: ignore[assignment]

gc.freeze()  # a collection would write to memory that the workers share
