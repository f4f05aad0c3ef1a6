"""Faults in the settings of methods: adapters with their sizes and forms, and merges."""

import math
from collections.abc import Iterator

from relora_mora.config.lengths import restart_warmup
from relora_mora.config.registry import OPERATORS
from relora_mora.config.schema import DECODER_LINEARS, Config, MethodConfig
from relora_mora.config.types import Fault
from relora_mora.system.logs import counted


def method_faults(config: Config) -> Iterator[Fault]:
    yield from _target_faults(config)
    yield from _pattern_faults(config)
    yield from own_faults(config.method)
    yield from _form_faults(config)
    yield from _adapter_faults(config)
    yield from _merge_faults(config)


def own_faults(method: MethodConfig) -> Iterator[Fault]:
    """Faults in the settings of a method that do not depend on the rest of the run."""
    yield from _layer_faults(method)
    yield from _base_faults(method)
    if method.merges:
        yield from _cycle_faults(method)
        yield from _carry_faults(method)


def _target_faults(config: Config) -> Iterator[Fault]:
    names = config.method.target_modules
    unknown = [name for name in names if name not in DECODER_LINEARS]
    if unknown and config.method.uses_adapters:
        yield Fault(
            ("method.target_modules", "method.name"),
            f"{', '.join(unknown)} is not a linear of the decoder; use some of {', '.join(DECODER_LINEARS)}",
        )
    if len(set(names)) < len(names):
        yield Fault(("method.target_modules",), "duplicate name; list each name once")


def _pattern_faults(config: Config) -> Iterator[Fault]:
    method = config.method
    if not method.rank_pattern or not method.uses_adapters:
        return
    unknown = [name for name in method.rank_pattern if name not in method.target_modules]
    if unknown:
        yield Fault(
            ("method.rank_pattern", "method.target_modules", "method.name"),
            f"{', '.join(unknown)} is not in method.target_modules ({', '.join(method.target_modules)}); "
            "add it there or remove it here",
        )
    if method.uses_squares and method.square_size is not None:
        yield Fault(
            ("method.rank_pattern", "method.square_size", "method.name"),
            f"method.square_size={method.square_size} is R of every layer, so ranks have no effect; remove one of them",
        )


def _form_faults(config: Config) -> Iterator[Fault]:
    if config.method.form == "resident" and config.train.zero_stage == 3 and config.method.uses_adapters:
        yield Fault(
            ("method.form", "train.zero_stage", "method.name"),
            "resident keeps W + delta of whole weights, which no rank has at ZeRO-3; use method.form=auto, or "
            "train.zero_stage=2",
        )


def _base_faults(method: MethodConfig) -> Iterator[Fault]:
    base = method.eight_bits
    if base is None:
        return
    if method.form == "merged" and method.base_products is True:
        yield Fault(
            ("method.form", "method.base", "method.base_products", "method.name"),
            f"merged rounds W + delta to {base} for each use, which takes longer than its products save; use "
            "method.form=auto, or method.base_products=auto",
        )
    if method.form == "resident" and method.base_products is False:
        yield Fault(
            ("method.form", "method.base", "method.base_products", "method.name"),
            f"resident keeps W + delta in the compute type next to the weights in {base}, which takes more memory than "
            "method.base=null; use method.form=auto or method.base_products=auto",
        )


def _layer_faults(method: MethodConfig) -> Iterator[Fault]:
    size = method.square_size
    multiple = method.square_multiple
    if method.dropout and method.form in ("merged", "resident") and method.uses_adapters:
        yield Fault(
            ("method.dropout", "method.form", "method.name"),
            f"dropout acts only on the adapter's input, but the form {method.form} adds the adapter to the weight; "
            "use method.form=auto or method.dropout=0",
        )
    if not method.uses_squares:
        return
    even = [operator for operator in method.cycle if OPERATORS[operator].even_size]
    if size is None:
        if even and multiple % 2:
            yield Fault(
                ("method.square_multiple", "method.operators", "method.name", "method.square_size"),
                f"operator {even[0]} needs an even R, but a multiple of {multiple} may be odd; "
                f"set method.square_multiple={2 * multiple}",
            )
        return
    if size % multiple:
        yield Fault(
            ("method.square_size", "method.square_multiple", "method.name"),
            f"{size} is not a multiple of method.square_multiple {multiple}; "
            f"set method.square_multiple={math.gcd(size, multiple)}",
        )
    if even and size % 2:
        yield Fault(
            ("method.square_size", "method.operators", "method.name"),
            f"operator {even[0]} needs an even size, got {size}; use {size - 1 or 2}",
        )


def _adapter_faults(config: Config) -> Iterator[Fault]:
    if config.model.adapter is None:
        return
    if not config.method.uses_adapters:
        yield Fault(
            ("model.adapter", "method.name"),
            f"the method {config.method.name} has no adapters to initialize; remove it, or set method.name to another",
        )
    if config.model.init_from is None:
        yield Fault(
            ("model.adapter", "model.init_from"), "an adapter belongs to a trained model; set model.init_from to it"
        )


def _cycle_faults(method: MethodConfig) -> Iterator[Fault]:
    cycle = method.cycle
    if any(a == b for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)):
        yield Fault(
            ("method.operators", "method.name"),
            f"the cycle {list(cycle)} repeats an operator across a merge, which cannot raise the rank; "
            "alternate two or more",
        )
    if method.reset in ("magnitude", "random") and method.reset_ratio == 0:
        yield Fault(
            ("method.reset_ratio", "method.reset", "method.name"),
            f"0 with method.reset={method.reset} resets nothing; use method.reset=none",
        )


def _merge_faults(config: Config) -> Iterator[Fault]:
    method = config.method
    optim = config.optim
    if not method.merges:
        return
    if method.reset not in ("full", "none") and not optim.of_group("adapters").moments:
        yield Fault(
            ("method.reset", "optim.matrices", "method.name"),
            f"{method.reset} changes element-wise moments, but {optim.matrices} has none; "
            "use method.reset=full or none",
        )
    if method.merge_until_step is not None and method.merge_until_step < method.merge_every:
        yield Fault(
            ("method.merge_until_step", "method.merge_every", "method.name"),
            f"{method.merge_until_step} comes before the first merge (step {method.merge_every}); raise it, or use "
            f"method.name={method.record.without_merges}",
        )


def merge_remarks(config: Config) -> Iterator[str]:
    """What a run does about merges that its length leaves no room for."""
    method = config.method
    optim = config.optim
    every = method.merge_every
    if not method.merges:
        return
    if every >= config.train.steps:
        yield (
            f"method.merge_every: the run of {counted(config.train.steps, 'step')} ends before its first merge, which "
            f"would follow step {every}: it trains as {method.record.without_merges} does"
        )
        return
    if not optim.restart_warmup_steps:
        return
    if every < optim.warmup_steps:
        yield (
            f"method.merge_every: the first merge (step {every}) comes before the warmup ends (step "
            f"{optim.warmup_steps}): the warmup after it rises to the rate that the first warmup has then"
        )
    restart = restart_warmup(method, optim)
    if restart < optim.restart_warmup_steps:
        yield (
            f"optim.restart_warmup_steps: {optim.restart_warmup_steps} are more than the steps between merges: each "
            f"warmup after a merge has {counted(restart, 'step')}"
        )


def _carry_faults(method: MethodConfig) -> Iterator[Fault]:
    if method.reset != "carry":
        return
    if not method.cycle:
        yield Fault(
            ("method.reset", "method.name"),
            f"carry transfers the state of square matrices to the next operator, but {method.name} has no square "
            "matrices; use method.reset=full",
        )
    for operator in sorted(set(method.cycle)):
        if not OPERATORS[operator].groupings:
            yield Fault(
                ("method.reset", "method.operators", "method.name"),
                f"carry needs operators that are pairs of groupings, and {operator} is not; use method.reset=full",
            )
