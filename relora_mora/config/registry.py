"""All methods, operators and optimizers, one record each, and the names of the schedules.

Settings are checked against these records before anything slow is imported, so this module imports nothing from the
package. A record names its code as ``package.module:object``, which is imported when a model is built.
"""

import re
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["cosine", "linear", "wsd", "constant"]

ADAPTER_SETTINGS = (
    "method.form",
    "method.target_modules",
    "method.train_linears",
    "method.train_experts",
    "method.base",
    "method.base_products",
    "method.dropout",
)
MERGE_SETTINGS = (
    "method.merge_every",
    "method.merge_until_step",
    "method.reset",
    "method.reset_ratio",
    "optim.restart_warmup_steps",
    "optim.rewarm",
)
MUON_SETTINGS = ("optim.momentum", "optim.nesterov")
RULE_SETTINGS = ("optim.rule", "optim.rule_digest")


@dataclass(frozen=True)
class Adapter:
    """A kind of adapter, which trains next to a frozen weight.

    ``layer`` names a subclass of :class:`AdapterLinear`, which defines the arithmetic, the memory and the number of
    parameters. ``settings`` lists the settings that not every adapter uses. ``has_square``: the adapter is a square
    matrix between the operators of ``method.operators``.
    """

    layer: str
    settings: tuple[str, ...] = ()
    has_square: bool = False


_RANK_SETTINGS = ("method.rank", "method.rank_pattern")
LORA = Adapter("relora_mora.adapters.lora:LoRALinear", (*_RANK_SETTINGS, "method.lora_alpha"))
MORA = Adapter(
    "relora_mora.adapters.mora:MoRALinear",
    (*_RANK_SETTINGS, "method.square_size", "method.square_rounding", "method.square_multiple", "method.operators"),
    has_square=True,
)


@dataclass(frozen=True)
class Method:
    """A value of ``method.name``. Without an adapter, every weight trains.

    ``title`` is its name in papers. ``merges``: adapters are periodically merged into the weights.
    """

    name: str
    title: str
    adapter: Adapter | None = None
    merges: bool = False
    note: str = ""

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that this method uses and some other method does not."""
        adapter_settings = () if self.adapter is None else ADAPTER_SETTINGS + self.adapter.settings
        return adapter_settings + (MERGE_SETTINGS if self.merges else ())


METHODS = {
    method.name: method
    for method in (
        Method("full", "Full rank"),
        Method("lora", "LoRA", LORA),
        Method("mora", "MoRA", MORA),
        Method("relora", "ReLoRA", LORA, merges=True, note="LoRA with merges"),
        Method("remora", "ReMoRA", MORA, merges=True, note="MoRA with merges"),
    )
}


@dataclass(frozen=True)
class OperatorType:
    """A value of ``method.operators``: a pair of maps C and D (docs/method.md).

    ``code`` builds a :class:`relora_mora.operators.Operator` from (MoRA type, in, out, R, *groupings); ``groupings``
    names functions in ``relora_mora.kernels.grouping``, which ``method.reset: carry`` needs. ``even_size``: R must be
    even.
    """

    code: str
    groupings: tuple[str, ...] = ()
    even_size: bool = False


def _grouped(inputs: str, outputs: str) -> OperatorType:
    return OperatorType("relora_mora.operators:GroupingOperator", (inputs, outputs))


# the numbers are the released code's (kongds/MoRA)
OPERATORS = {
    1: _grouped("wrapped_interleaved", "interleaved"),
    2: _grouped("contiguous", "contiguous"),
    3: _grouped("contiguous", "interleaved"),
    4: _grouped("wrapped_interleaved", "contiguous"),
    6: OperatorType("relora_mora.operators:RotaryOperator", even_size=True),
}


@dataclass(frozen=True)
class MatrixOptimizer:
    """A value of ``optim.matrices``, the optimizer of the decoder's linears or their adapters.

    ``title`` is its name in papers. ``moments`` names its element-wise state tensors; a rule may also keep state per
    matrix. ``rule`` builds a :class:`relora_mora.optim.rules.MatrixRule` from the settings in ``optim``; None for
    AdamW. ``bytes_per_element``: what the element-wise passes of a step read and write, on a GPU.
    """

    name: str
    title: str
    moments: tuple[str, ...] = ()
    rule: str | None = None
    bytes_per_element: int = 44  # Muon's momentum, Nesterov's, decay and step, each in its own pass


MATRIX_OPTIMIZERS = {
    optimizer.name: optimizer
    for optimizer in (
        # reads master, both moments, gradient; writes master, both moments
        MatrixOptimizer("adamw", "AdamW", ("exp_avg", "exp_avg_sq"), bytes_per_element=28),
        MatrixOptimizer("muon", "Muon", ("momentum",), "relora_mora.optim.muon:Muon"),
        MatrixOptimizer("adamw8bit", "8-bit AdamW", (), "relora_mora.optim.quantized:AdamW8bit", bytes_per_element=228),
    )
}
OTHERS = ("adamw", "adamw8bit")  # values of optim.others, the optimizer of embeddings and head
_OWN_RULE = re.compile(r"(.+\.py|[A-Za-z_][\w.]*):([A-Za-z_]\w*)", re.ASCII | re.DOTALL)


def is_own(matrices: str) -> bool:
    """Whether ``optim.matrices`` names a rule of one's own: ``FILE.py:NAME`` or ``package.module:NAME``."""
    return _OWN_RULE.fullmatch(matrices) is not None


def split_rule(matrices: str) -> tuple[str, str]:
    """The file or module of a rule of one's own, and its name there."""
    place, _, name = matrices.rpartition(":")
    return place, name


def optimizer_named(name: str) -> MatrixOptimizer | None:
    """The record of an optimizer, or of a rule of one's own; None if there is no such optimizer."""
    if is_own(name):
        return MatrixOptimizer(name, split_rule(name)[1], rule=name)
    return MATRIX_OPTIMIZERS.get(name)


def optimizer_of(group: str, *, matrices: str, others: str) -> MatrixOptimizer:
    """The optimizer of a parameter group; AdamW always trains norms."""
    found = optimizer_named({"adapters": matrices, "linears": matrices, "embeddings": others}.get(group, "adamw"))
    assert found is not None
    return found


def settings_of_others(method: Method | None) -> set[str]:
    """The settings that some method uses, but not this one; empty for an unknown one."""
    used = {setting for other in METHODS.values() for setting in other.settings}
    return set() if method is None else used.difference(method.settings)
