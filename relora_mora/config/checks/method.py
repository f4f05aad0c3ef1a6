"""Rules for methods: adapters with their sizes and forms, and merges."""

from collections.abc import Iterator

from relora_mora.config.registry import OPERATORS
from relora_mora.config.schema import MethodConfig
from relora_mora.config.types import Fault, Rule, broken_rules


def _even_operators(method: MethodConfig) -> list[int]:
    """The operators that need an even R."""
    return [operator for operator in method.cycle if OPERATORS[operator].even_size]


def _cannot_carry(method: MethodConfig) -> list[int] | list[str]:
    """What has no groupings, on which ``carry`` rests: operators, or a method without squares."""
    if not method.uses_squares:
        return [method.name]
    return sorted({operator for operator in method.cycle if not OPERATORS[operator].groupings})


def _repeats(method: MethodConfig) -> bool:
    """Whether an operator follows itself, also from the end of the cycle to its begin."""
    cycle = method.cycle
    return any(one == following for one, following in zip(cycle, cycle[1:] + cycle[:1], strict=True))


# fmt: off
# of a MethodConfig, independent of the rest of the run
OWN_RULES = (
    Rule("method.dropout method.form method.name",
         lambda c: c.uses_adapters and c.dropout and c.form in ("merged", "resident"),
         "dropout acts only on the adapter's input, but the form {c.form} adds the adapter to the weight; "
         "use method.form=auto or method.dropout=0"),
    Rule("method.square_multiple method.operators method.name method.square_size",
         lambda c: c.square_size is None and c.square_multiple % 2 and _even_operators(c),
         "operator {found} needs an even R, but a multiple of {c.square_multiple} may be odd; use an even multiple"),
    Rule("method.square_size method.operators method.name",
         lambda c: c.square_size and c.square_size % 2 and _even_operators(c),
         "operator {found} needs an even size, got {c.square_size}; use an even one"),
    Rule("method.form method.base method.base_products method.name",
         lambda c: c.eight_bits and (c.form, c.base_products) in (("merged", True), ("resident", False)),
         "{c.form} with base_products={c.base_products} and a base in {c.base} is slower or larger than without such a "
         "base; use method.form=auto, or method.base_products=auto"),
    Rule("method.operators method.name",
         lambda c: c.merges and _repeats(c),
         "the cycle {c.operators} repeats an operator across a merge, which cannot raise the rank; "
         "alternate two or more"),
    Rule("method.reset method.operators method.name",
         lambda c: c.merges and c.reset == "carry" and _cannot_carry(c),
         "carry needs operators that are pairs of groupings, unlike {found}; set method.operators, or use "
         "method.reset=full"),
)
# of a Config
METHOD_RULES = (
    Rule("method.rank_pattern method.target_modules method.name",
         lambda c: c.method.uses_adapters and c.method.target_modules
         and sorted(c.method.rank_pattern.keys() - c.method.target_modules),
         "{found} is not in method.target_modules {c.method.target_modules}; add it there or remove it here"),
    Rule("method.train_embeddings model.new_tokens",
         lambda c: c.method.train_embeddings == "new" and c.model.new_tokens is None,
         "new trains only the rows of new tokens, and there are none; set model.new_tokens, or give the first id whose "
         "row trains"),
    Rule("method.train_embeddings method.train_head",
         lambda c: c.method.trains_rows and c.method.train_head,
         "{c.method.train_embeddings} trains only some rows, in the head, too; set method.train_head=false"),
    Rule("method.form train.zero_stage method.name",
         lambda c: c.method.uses_adapters and c.method.form == "resident" and c.train.zero_stage == 3,
         "resident keeps W + delta of whole weights, which no rank has at ZeRO-3; "
         "use method.form=auto, or train.zero_stage=2"),
    Rule("model.adapter model.init_from method.name",
         lambda c: c.model.adapter is not None and (c.model.init_from is None or not c.method.uses_adapters),
         "an adapter continues on the model that it was trained on, with a method that has adapters; "
         "set model.init_from and such a method, or remove it"),
    Rule("method.reset optim.matrices method.name",
         lambda c: c.method.merges and c.method.reset in ("magnitude", "random", "carry")
         and not c.optim.of_group("adapters").moments,
         "{c.method.reset} changes element-wise moments, but {c.optim.matrices} has none; "
         "use method.reset=full or none"),
)
# fmt: on


def own_faults(method: MethodConfig) -> Iterator[Fault]:
    """Faults in the settings of a method that do not depend on the rest of the run."""
    return broken_rules(OWN_RULES, method)
