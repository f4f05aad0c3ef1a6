"""DeepSpeed's start, and its settings on GPUs and on CPUs."""

import os
import subprocess
import sys
from typing import Any

from tests.tools.each import each
from tests.tools.tiny import tiny_config

TRAINABLE = 200_000_000
# torch's compiler takes seconds to import
ENGINE = """
import sys
from tests.tools.tiny import build_rig, tiny_config
from relora_mora.engine.start import init_distributed
init_distributed()
build_rig(tiny_config(1, train={"zero_stage": 1}), bf16=True)
assert "torch._inductor.compile_fx" not in sys.modules
"""


def test_an_engine_starts_on_a_cpu_without_a_warning_and_without_torchs_compiler():
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", ENGINE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def settings(stage: int, *, on_gpu: bool, world_size: int = 2, **own: Any) -> dict[str, Any]:
    from relora_mora.engine.start import deepspeed_settings

    train = tiny_config(world_size, train={"zero_stage": stage, "deepspeed": {"zero_optimization": own}}).train
    result = deepspeed_settings(train, world_size, clip=1.0, bf16=True, trainable=TRAINABLE, on_gpu=on_gpu)
    # of several micro-batches; at stage 0, DeepSpeed refuses the setting
    assert result.get("data_types") == ({"grad_accum_dtype": "fp32"} if stage else None)
    zero: dict[str, Any] = result["zero_optimization"]
    return zero


@each("stage", [0, 1, 2, 3])
def test_gradients_add_up_in_float32_in_one_bucket_on_a_cpu_and_in_small_ones_on_gpus(stage):
    assert settings(stage, on_gpu=False) == {"stage": stage, "reduce_bucket_size": TRAINABLE}
    small = {"stage": stage, "reduce_bucket_size": 50_000_000}
    assert settings(stage, on_gpu=True) == (small | {"overlap_comm": True} if stage == 2 else small)
    assert settings(stage, on_gpu=True, world_size=1) == small
    given = {"overlap_comm": False, "reduce_bucket_size": 1000}
    assert settings(stage, on_gpu=True, **given) == {"stage": stage, **given}
