"""The typed settings of the optimizer and of the learning rate."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from relora_mora.config.registry import (
    MATRIX_OPTIMIZERS,
    OTHERS,
    MatrixOptimizer,
    ScheduleKind,
    is_own,
    optimizer_of,
    split_rule,
)
from relora_mora.config.types import Decay, Fixed, Fraction, NotNegative, Positive, Rate, Strict, Text, find_path

if TYPE_CHECKING:
    MatrixOptimizerName = str
    OtherOptimizerName = str
else:  # a type checker does not accept choices that are known only at run time
    MatrixOptimizerName = Literal[tuple(MATRIX_OPTIMIZERS)]
    OtherOptimizerName = Literal[OTHERS]


def _own_rule(text: str, info: ValidationInfo) -> str:
    if not is_own(text):
        raise PydanticCustomError("rule", "a rule of your own, as FILE.py:NAME or package.module:NAME")
    place, name = split_rule(text)
    return f"{find_path(place, info)}:{name}" if place.endswith(".py") else text


OwnRule = Annotated[Text, AfterValidator(_own_rule)]


class OptimConfig(Strict):
    """One peak learning rate and optimizer for linears or their adapters, and one for embeddings and head.

    Norms have the rate of embeddings, and always AdamW.
    """

    lr: Rate = 5e-4
    """peak learning rate of the decoder's linears (full) or adapters (other methods)"""
    lr_other: Rate | None = None
    """peak learning rate of embeddings, norms and head, and of linears without an adapter (other methods); null: as
    lr"""
    matrices: Fixed[MatrixOptimizerName | OwnRule] = "adamw"
    """optimizer of the decoder's linears (full) or adapters (other methods), or a rule of your own, FILE.py:NAME or
    package.module:NAME: see docs/method.md"""
    others: Fixed[OtherOptimizerName] = "adamw"
    """optimizer of embeddings and head: adamw8bit keeps less state"""
    rule: dict[str, Any] = Field({})
    """settings of a rule of your own, e.g. {rank: 64}"""
    rule_digest: Text | None = None
    """xxh3-128 of the file of a rule of your own, which must be that; null: any, and a run records it"""
    momentum: Decay = 0.95
    """Muon: momentum"""
    nesterov: bool = True
    """Muon: use Nesterov momentum"""
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), strict=False)
    """betas of AdamW"""
    eps: Annotated[float, Field(ge=1e-20, lt=10, allow_inf_nan=False)] = 1e-8
    """epsilon of AdamW"""
    weight_decay: Decay = 0.0
    """decoupled weight decay of everything except norms and biases"""
    clip: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """clip the global gradient norm to this; 0: off"""
    schedule: ScheduleKind = "cosine"
    """shape of the learning rate after warmup; merges restart it"""
    warmup_steps: NotNegative = 1000
    """steps of linear warmup at the start; half of the run if it has no more steps than this"""
    warmup_fraction: Decay | None = None
    """linear warmup as a fraction of the run's steps, instead of warmup_steps; 0.03 is 3 %"""
    restart_warmup_steps: NotNegative = 50
    """steps of linear warmup after a merge; 0: no restarts"""
    decay_steps: Positive | None = None
    """wsd: steps of the final decay; null: a tenth of the run"""
    min_ratio: Fraction = 0.1
    """the learning rate ends at this fraction of its peak"""
    rewarm: Literal["all", "adapters"] = "all"
    """which parameter groups restart their learning rate after a merge"""

    def warmup_of(self, steps: int) -> int:
        """Steps of linear warmup in a run of ``steps``: half of them if it ends before ``warmup_steps`` are over."""
        return self.warmup_steps if self.warmup_steps < steps else (steps + 1) // 2

    def decay_of(self, steps: int) -> int:
        """Steps of the final decay of ``wsd`` in a run of ``steps``: at most those after the warmup."""
        return min(self.decay_steps or max(1, steps // 10), steps - self.warmup_of(steps))

    def of_group(self, group: str) -> MatrixOptimizer:
        """The optimizer of a parameter group."""
        return optimizer_of(group, matrices=self.matrices, others=self.others)
