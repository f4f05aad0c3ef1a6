"""The time that a GPU takes to compute a micro-batch, calculated from counts. It has not been measured on any GPU.

The decoder layers compute their matrix products at ``PRODUCTS_RATE`` of the peak, then read and write ``moved`` bytes
at the memory's bandwidth. Meanwhile the host launches their kernels one by one; a device that is faster than its host
waits. The counts come from tests/fakecuda, for micro-batches of 8,192 tokens, without head, loss and optimizer.
"""

from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedConfig

from relora_mora.config.registry import LORA, MORA, Adapter
from relora_mora.sizing.setup import Setup
from relora_mora.system.devices import Device

PRODUCTS_RATE = 0.6  # share of the data sheet's peak, assumed
# Python, torch and autograd for one operation, measured with tiny tensors on a Zen 4 core (docs/performance.md)
LAUNCH_SECONDS = 13e-6
FORWARD = 1 / 3  # share of a layer's launches and bytes that activation checkpointing repeats, assumed


class LayerWork(NamedTuple):
    """The work of one decoder layer in bf16, forward and backward."""

    launches: float
    moved: float  # bytes per token and hidden feature


# by (adapter, method.base if products are in 8 bits, whether W + delta is resident); other adapters count as LoRA, and
# fp8 that is not resident as int8
Work = dict[tuple[Adapter | None, str | None, bool], LayerWork]
EAGER: Work = {
    (None, None, False): LayerWork(109, 645),
    (LORA, None, False): LayerWork(158, 705),
    (LORA, None, True): LayerWork(144, 688),
    (LORA, "int8", False): LayerWork(200, 1134),
    (LORA, "int8", True): LayerWork(172, 884),
    (LORA, "fp8", True): LayerWork(172, 728),
    (MORA, None, False): LayerWork(141, 681),
    (MORA, None, True): LayerWork(127, 663),
    (MORA, "int8", False): LayerWork(165, 914),
    (MORA, "int8", True): LayerWork(155, 859),
    (MORA, "fp8", True): LayerWork(155, 703),
}
COMPILED: Work = {
    (None, None, False): LayerWork(35, 277),
    (LORA, None, False): LayerWork(77, 331),
    (LORA, None, True): LayerWork(70, 322),
    (LORA, "int8", False): LayerWork(78, 529),
    (LORA, "int8", True): LayerWork(79, 445),
    (LORA, "fp8", True): LayerWork(90, 328),
    (MORA, None, False): LayerWork(67, 315),
    (MORA, None, True): LayerWork(53, 297),
    (MORA, "int8", False): LayerWork(76, 494),
    (MORA, "int8", True): LayerWork(62, 420),
    (MORA, "fp8", True): LayerWork(73, 315),
}
FASTER_IN_8_BITS = 2  # peak of int8 and fp8 products over that of bf16, in the data sheets of all cards that have them


@dataclass(frozen=True)
class ComputeTime:
    """Seconds of one micro-batch."""

    products: float
    passes: float
    host: float

    @property
    def total(self) -> float:
        return max(self.products + self.passes, self.host)

    def __str__(self) -> str:
        device = f"products {self.products * 1e3:.3g} ms, passes over memory {self.passes * 1e3:.3g} ms"
        return f"a micro-batch: {device}, launching it all {self.host * 1e3:.3g} ms"


def compute_time(
    model_config: PreTrainedConfig,
    setup: Setup,
    device: Device,
    *,
    peak: float,
    flops_per_token: float,
    resident: bool,
    in_8_bits: float = 0.0,
) -> ComputeTime:
    """The time of one micro-batch on a device with ``peak`` FLOP/s, whose ``memory_gbytes_per_s`` must be known.

    ``in_8_bits``: those of the ``flops_per_token`` that are products in 8 bits.
    ``resident``: the adapter layers build ``W + delta`` once for all micro-batches of a step, so each micro-batch gets
    its share of that time.
    """
    config = setup.config
    adapter = config.method.record.adapter
    if (adapter, None, False) not in EAGER:
        adapter = LORA
    base = config.method.eight_bits if config.method.base_products is True else None
    table = COMPILED if setup.compiles else EAGER
    work = table[adapter, base if base is None or resident else "int8", resident]
    if resident:  # layers that are not resident build W + delta twice in each micro-batch
        twice, never = EAGER[adapter, None, False], EAGER[adapter, None, True]
        launches = (twice.launches - never.launches) / 2 / setup.micro_batches
        moved_to_build = (twice.moved - never.moved) / 2 / setup.micro_batches
        work = LayerWork(work.launches + launches, work.moved + moved_to_build)
    layers = model_config.num_hidden_layers * (1 + FORWARD * config.model.activation_checkpointing)
    tokens = config.tokens_per_micro_batch
    moved = layers * work.moved * (1 if setup.bf16 else 2) * model_config.hidden_size * tokens
    return ComputeTime(
        products=(flops_per_token - in_8_bits * (1 - 1 / FASTER_IN_8_BITS)) * tokens / (peak * PRODUCTS_RATE),
        passes=moved / (device.memory_gbytes_per_s * 1e9),
        host=layers * work.launches * LAUNCH_SECONDS,
    )
