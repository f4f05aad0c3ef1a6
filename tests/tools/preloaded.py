"""What the workers of all pools import, once: they are forked from a process that has imported this and does nothing
else.
"""

import gc

gc.disable()

import pytest  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402

import relora_mora.train  # noqa: E402, F401
from relora_mora.zero.start import import_muon  # noqa: E402

import_muon()
gc.freeze()
gc.enable()
