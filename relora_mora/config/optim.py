"""The typed settings of the optimizer and of the learning rate."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from relora_mora.config.registry import MATRIX_OPTIMIZERS, OTHERS, MatrixOptimizer, ScheduleKind, optimizer_of
from relora_mora.config.types import Decay, Fraction, NotNegative, Positive, Rate, Strict

if TYPE_CHECKING:
    MatrixOptimizerName = str
    OtherOptimizerName = str
else:  # a type checker does not accept choices that are known only at run time
    MatrixOptimizerName = Literal[tuple(MATRIX_OPTIMIZERS)]
    OtherOptimizerName = Literal[OTHERS]


class OptimConfig(Strict):
    """One peak learning rate and optimizer for linears or their adapters, and one for embeddings and head.

    Norms have the rate of embeddings, and always AdamW.
    """

    lr: Rate = Field(5e-4, description="peak learning rate of the decoder's linears (full) or adapters (other methods)")
    lr_other: Rate | None = Field(
        None,
        description="peak learning rate of embeddings, norms and head, and of linears without an adapter (other "
        "methods); null: as lr",
    )
    matrices: MatrixOptimizerName = Field(
        "adamw", description="optimizer of the decoder's linears (full) or adapters (other methods): see docs/method.md"
    )
    others: OtherOptimizerName = Field(
        "adamw", description="optimizer of embeddings and head: adamw8bit and apollo_mini keep less state"
    )
    momentum: Decay = Field(0.95, description="Muon and its variants, SUMO: momentum")
    nesterov: bool = Field(True, description="Muon and its variants: use Nesterov momentum")
    projection_rank: Positive = Field(
        128,
        description="GaLore, Fira, APOLLO, SUMO: rank r of a gradient's projection, at most the gradient's shorter "
        "side",
    )
    projection_every: Positive = Field(
        200, description="GaLore, Fira, APOLLO, APOLLO-Mini, SUMO: steps between new projections"
    )
    projection_scale: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = Field(
        None,
        description="GaLore, Fira: factor of the projected step, null: 0.25; SUMO: the same, null: 0.2; APOLLO: the "
        "step is multiplied by its square root, null: 1",
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.95),
        strict=False,
        description="betas of AdamW, and of Adam on a projection; the second one is also NorMuon's",
    )
    eps: Annotated[float, Field(ge=1e-20, lt=10, allow_inf_nan=False)] = Field(
        1e-8, description="epsilon of AdamW, of Adam on a projection, and of NorMuon"
    )
    weight_decay: Decay = Field(0.0, description="decoupled weight decay of everything except norms and biases")
    cautious_decay: bool = Field(
        False,
        description="weight decay only of the elements that their step also brings closer to zero; applies to matrices "
        "whose optimizer is not AdamW (optim.matrices, optim.others)",
    )
    clip: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        1.0, description="clip the global gradient norm to this; 0: off"
    )
    schedule: ScheduleKind = Field("cosine", description="shape of the learning rate after warmup; merges restart it")
    warmup_steps: NotNegative = Field(1000, description="steps of linear warmup at the start")
    warmup_fraction: Decay | None = Field(
        None, description="linear warmup as a fraction of the run's steps, instead of warmup_steps; 0.03 is 3 %"
    )
    restart_warmup_steps: NotNegative = Field(50, description="steps of linear warmup after a merge; 0: no restarts")
    decay_steps: Positive | None = Field(None, description="wsd: steps of the final decay; null: a tenth of the run")
    min_ratio: Fraction = Field(0.1, description="the learning rate ends at this fraction of its peak")
    rewarm: Literal["all", "adapters"] = Field(
        "all", description="which parameter groups restart their learning rate after a merge"
    )

    def decay_of(self, steps: int) -> int:
        """Steps of the final decay of ``wsd`` in a run of ``steps``."""
        return self.decay_steps or max(1, steps // 10)

    def of_group(self, group: str) -> MatrixOptimizer:
        """The optimizer of a parameter group."""
        return optimizer_of(group, matrices=self.matrices, others=self.others)
