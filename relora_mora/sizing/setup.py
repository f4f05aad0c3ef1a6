"""The choices that decide a run's memory, network traffic and time."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

from transformers import PreTrainedModel

from relora_mora.config.schema import Config
from relora_mora.model.compiling import compiles

# DeepSpeed's defaults
MAX_LIVE_PARAMETERS = 1_000_000_000
MAX_REUSE_DISTANCE = 1_000_000_000
PERSISTENCE_THRESHOLD = 100_000


@dataclass(frozen=True)
class Setup:
    """A run's settings on ``world_size`` ranks, at a ZeRO stage that may differ from the one in ``config``."""

    config: Config
    stage: int
    world_size: int
    _: KW_ONLY
    bf16: bool
    on_gpu: bool = False
    compiled: bool | None = None  # whether decoder layers are compiled; None: as model.compile says

    @property
    def width(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4

    @property
    def sharers(self) -> int:
        """Ranks that share the masters and the optimizer's state."""
        return self.world_size if self.stage else 1

    @property
    def weight_sharers(self) -> int:
        return self.world_size if self.stage == 3 else 1

    @property
    def micro_batches(self) -> int:
        return self.config.accumulation_steps(self.world_size)

    @property
    def compiles(self) -> bool:
        return compiles(self.config.model, self.stage, on_gpu=self.on_gpu) if self.compiled is None else self.compiled

    def persistent(self, model: PreTrainedModel) -> int:
        """The elements of the small parameters that stage 3 keeps gathered."""
        threshold = self.zero("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
        return sum(p.numel() for p in model.parameters() if p.numel() <= threshold)

    def zero(self, name: str, default: int) -> int:
        """A number from ``zero_optimization`` in ``train.deepspeed``, or the default."""
        given: Any = self.config.train.deepspeed.get("zero_optimization", {})
        return int(given.get(name, default))
