"""All methods, operators and optimizers, one record each, and the names of the schedules.

Settings are checked against these records before anything slow is imported, so this module imports nothing from the
package. A record names its code as ``package.module:object``, which is imported when a model is built.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["cosine", "linear", "wsd", "constant"]

ADAPTER_SETTINGS = (
    "method.form",
    "method.target_modules",
    "method.train_linears",
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
PROJECTION_SETTINGS = ("optim.projection_rank", "optim.projection_every", "optim.projection_scale")


@dataclass(frozen=True)
class Adapter:
    """A kind of adapter, which trains next to a frozen weight.

    ``layer`` names a subclass of :class:`AdapterLinear`, which defines the arithmetic, the memory and the number of
    parameters. ``settings`` lists the settings that not every adapter uses. ``has_square``: the adapter is a square
    matrix between the operators of ``method.operators``. ``has_pair``: it consists of LoRA's A and B.
    """

    layer: str
    settings: tuple[str, ...] = ()
    has_square: bool = False
    has_pair: bool = False


_RANK_SETTINGS = ("method.rank", "method.rank_pattern")
LORA = Adapter("relora_mora.adapters.lora:LoRALinear", (*_RANK_SETTINGS, "method.lora_alpha"), has_pair=True)
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

    @property
    def without_merges(self) -> str:
        """The name of the method with the same adapter that never merges; "full" if there is none."""
        names = (other.name for other in METHODS.values() if other.adapter is self.adapter and not other.merges)
        return next(names, "full")


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


# numbers up to 6 are the released code's (kongds/MoRA)
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
    AdamW. ``settings`` lists those that not every optimizer uses. ``is_slow``: the watchdog allows minutes for a step.
    ``of_single``: the optimizer is a :class:`relora_mora.optim.rules.PairRule`, and this one trains linears without an
    adapter; both have the same moments.
    ``bytes_per_element``: what the element-wise passes of a step read and write, on a GPU.
    """

    name: str
    title: str
    moments: tuple[str, ...] = ()
    rule: str | None = None
    settings: tuple[str, ...] = ()
    is_slow: bool = False
    of_single: str | None = None
    bytes_per_element: int = 44  # Muon's momentum, Nesterov's, decay and step, each in its own pass

    def suits(self, method: Method) -> bool:
        """Whether the method trains what this optimizer steps; ``full`` does not, if that is pairs."""
        return self.of_single is None or (method.adapter is not None and method.adapter.has_pair)


MATRIX_OPTIMIZERS = {
    optimizer.name: optimizer
    for optimizer in (
        # reads master, both moments, gradient; writes master, both moments
        MatrixOptimizer("adamw", "AdamW", ("exp_avg", "exp_avg_sq"), bytes_per_element=28),
        MatrixOptimizer("muon", "Muon", ("momentum",), "relora_mora.optim.muon:Muon", MUON_SETTINGS),
        MatrixOptimizer(
            "polar_muon", "Muon with Polar Express", ("momentum",), "relora_mora.optim.muon:PolarMuon", MUON_SETTINGS
        ),
        MatrixOptimizer("normuon", "NorMuon", ("momentum",), "relora_mora.optim.muon:NorMuon", MUON_SETTINGS),
        MatrixOptimizer(
            "lora_muon",
            "LoRA-Muon",
            ("momentum",),
            "relora_mora.optim.lora_muon:LoRAMuon",
            MUON_SETTINGS,
            of_single="muon",
        ),
        # a new projection takes the singular vectors of every matrix
        MatrixOptimizer(
            "galore", "GaLore", (), "relora_mora.optim.projected:GaLore", PROJECTION_SETTINGS, is_slow=True
        ),
        MatrixOptimizer("fira", "Fira", (), "relora_mora.optim.projected:Fira", PROJECTION_SETTINGS, is_slow=True),
        MatrixOptimizer("apollo", "APOLLO", (), "relora_mora.optim.projected:Apollo", PROJECTION_SETTINGS),
        MatrixOptimizer(
            "apollo_mini", "APOLLO-Mini", (), "relora_mora.optim.projected:ApolloMini", ("optim.projection_every",)
        ),
        MatrixOptimizer(
            "sumo",
            "SUMO",
            (),
            "relora_mora.optim.projected:Sumo",
            ("optim.momentum", *PROJECTION_SETTINGS),
            is_slow=True,  # it takes the singular vectors of every momentum in each step
        ),
        MatrixOptimizer("adamw8bit", "8-bit AdamW", (), "relora_mora.optim.quantized:AdamW8bit", bytes_per_element=228),
    )
}
OTHERS = ("adamw", "adamw8bit", "apollo_mini")  # values of optim.others, the optimizer of embeddings and head


def optimizer_of(group: str, *, matrices: str, others: str) -> MatrixOptimizer:
    """The optimizer of a parameter group; AdamW always trains norms."""
    single = MATRIX_OPTIMIZERS[matrices].of_single or matrices
    name = {"adapters": matrices, "linears": single, "embeddings": others}.get(group, "adamw")
    return MATRIX_OPTIMIZERS[name]


def settings_of_others(
    records: Mapping[str, Method] | Mapping[str, MatrixOptimizer], *own: Method | MatrixOptimizer | None
) -> set[str]:
    """The settings that some of the records use, but none of ``own``; empty if one of these is None."""
    used = {setting for record in records.values() for setting in record.settings}
    known = [record for record in own if record is not None]
    return set() if len(known) < len(own) else used.difference(*(record.settings for record in known))
