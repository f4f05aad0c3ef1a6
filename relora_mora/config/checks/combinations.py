"""Combinations of settings that cannot work, each with its remedy. Pure functions of the settings."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from relora_mora.config.checks.data import DATA_RULES, missing_metric
from relora_mora.config.lengths import ALTERNATIVES
from relora_mora.config.registry import (
    METHODS,
    MUON_SETTINGS,
    OPERATORS,
    RULE_SETTINGS,
    is_own,
    optimizer_named,
    settings_of_others,
)
from relora_mora.config.schema import SETTINGS, Config, MethodConfig
from relora_mora.config.types import Fault, Rule, broken_rules

BESIDE_ADAPTERS = (
    *("method.train_linears", "method.train_experts"),
    *("method.train_embeddings", "method.train_norms", "method.train_head"),
)
SIZE_SETTINGS = ("method.rank", "method.rank_pattern", "method.square_rounding", "method.square_multiple")
TASK_SETTINGS = ("eval.tasks_every_steps", "eval.task_data", "eval.num_fewshot", "eval.limit")


def unused_by(config: Config) -> dict[str, str]:
    """The settings with a value other than their default that have no effect, each with what makes them unused."""
    settings = config.by_name
    unused = unused_settings(settings)
    return {
        name: unused[name]
        for name, setting in SETTINGS.items()
        if name in unused and settings[name] != setting.get_default()
    }


def unused_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that have no effect, given all others; each with what makes it unused.

    ``settings`` are all settings of a run, by dotted name. An unknown method or optimizer is assumed to use all.
    """
    matrices, method = settings["optim.matrices"], settings["method.name"]
    record = METHODS.get(method)
    unused: dict[str, str] = {}
    if settings["method.reset"] not in ("magnitude", "random"):
        unused["method.reset_ratio"] = f"method.reset={settings['method.reset']}"
    if settings["optim.restart_warmup_steps"] == 0:
        unused["optim.rewarm"] = "optim.restart_warmup_steps=0"
    if settings["optim.schedule"] == "constant":
        unused["optim.min_ratio"] = "optim.schedule=constant"
    if settings["optim.schedule"] != "wsd":
        unused["optim.decay_steps"] = f"optim.schedule={settings['optim.schedule']}"
    if not (settings["method.train_embeddings"] or settings["method.train_head"]):
        unused["optim.others"] = "a run that trains neither embeddings nor head"
    if not settings["eval.tasks"]:
        unused |= dict.fromkeys(TASK_SETTINGS, "a run without eval.tasks")
    if settings["method.base"] not in ("int8", "fp8"):
        unused["method.base_products"] = f"method.base={settings['method.base'] or 'null'}"
    if record is not None and record.adapter is not None:
        if not any(settings[name] for name in BESIDE_ADAPTERS):
            unused["optim.lr_other"] = "a run that trains only adapters"
        if record.adapter.has_square and settings["method.square_size"] is not None:
            unused |= dict.fromkeys(SIZE_SETTINGS, "method.square_size")
    if matrices != "muon" and optimizer_named(matrices) is not None:
        unused |= dict.fromkeys(MUON_SETTINGS, f"optim.matrices={matrices}")
    if not is_own(matrices):
        unused |= dict.fromkeys(RULE_SETTINGS, f"optim.matrices={matrices}")
    return unused | dict.fromkeys(settings_of_others(record), f"method {method}")


def faults(config: Config, world_size: int | None) -> Iterator[Fault]:
    """Every combination that cannot work: what was given, what was expected, the remedy. world_size None: unknown."""
    yield from _length_faults(config)
    yield from broken_rules((*RULES, *DATA_RULES), config)
    yield from own_faults(config.method)
    if world_size is not None:
        sizes = {"batch": config.train.batch_size, "micro": config.train.micro_batch_size, "lanes": config.lanes}
        yield from broken_rules(RANK_RULES, SimpleNamespace(**sizes, ranks=world_size))


def own_faults(method: MethodConfig) -> Iterator[Fault]:
    """Faults in the settings of a method that do not depend on the rest of the run."""
    return broken_rules(METHOD_RULES, method)


def remarks(config: Config) -> Iterator[str]:
    """Settings without effect, and what a run does about those that its length leaves no room for."""
    for name, cause in unused_by(config).items():
        yield f"{name}: {cause} does not use it"
    yield from map(str, broken_rules(REMARKS, config))


def _merges(config: Config) -> bool:
    """Whether a run is long enough for a merge."""
    last = min(config.method.merge_until_step or config.train.steps, config.train.steps - 1)
    return config.method.merges and config.method.merge_every <= last


def _merges_in_warmup(config: Config) -> int:
    """The steps of the warmup, if the first merge comes before its end."""
    warmup = config.optim.warmup_of(config.train.steps)
    return warmup if config.method.merge_every < warmup else 0


def _cut_short(config: Config) -> list[str]:
    """What the length of a run leaves no room for."""
    steps, optim, method = config.train.steps, config.optim, config.method
    found = []
    if optim.warmup_of(steps) < optim.warmup_steps:
        found.append(f"warms up in {optim.warmup_of(steps)} (optim.warmup_steps={optim.warmup_steps})")
    if optim.schedule == "wsd" and optim.decay_of(steps) < (optim.decay_steps or 0):
        found.append(f"decays in {optim.decay_of(steps)} (optim.decay_steps={optim.decay_steps})")
    if method.merges and not _merges(config):
        found.append(f"ends without a merge (method.merge_every={method.merge_every})")
    return found + [
        f"ends before the stage of step {each.from_step}" for each in config.data.stages if each.from_step > steps
    ]


def _length_faults(config: Config) -> Iterator[Fault]:
    """The length of the run, or of its warmup, given in several ways."""
    for section, names in ALTERNATIVES.items():
        values = getattr(config, section)
        given = [name for name in names if name in values.model_fields_set and getattr(values, name) is not None]
        if len(given) > 1:
            shown = " and ".join(f"{section}.{name}" for name in given)
            yield Fault((f"{section}.{given[-1]}",), f"{shown} are set, but only one may be; set the others to null")


def _without_best(config: Config) -> str | None:
    """Why a run does not have its metric for the best checkpoint, or has it only once."""
    metric, every_steps = config.checkpoint.keep_best, config.eval.every_steps
    if metric is None:
        return None
    if not metric.startswith("tasks/"):
        fault = missing_metric(config, metric)
    else:
        fault = None if config.eval.tasks else "no tasks are scored; name them in eval.tasks"
        every_steps = every_steps if config.eval.tasks_every_steps is None else config.eval.tasks_every_steps
    seldom = None if every_steps else "only the last checkpoint has a value; set eval.every_steps or tasks_every_steps"
    return fault or seldom


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
_NO_START = "must be given, unless model.init_from names a model to start from, whose own is then used"
RULES = (
    Rule("model.config model.init_from", lambda c: c.model.config is None and c.model.init_from is None, _NO_START),
    Rule("model.new_tokens model.init_from",
         lambda c: c.model.new_tokens is not None and c.model.init_from is None,
         "new tokens are added to a trained model; set model.init_from to it, or remove this"),
    Rule("tokenizer.path model.init_from", lambda c: c.tokenizer.path is None and c.model.init_from is None, _NO_START),
    Rule("data.lanes train.batch_size",
         lambda c: c.train.batch_size % c.lanes,
         "{c.lanes} does not divide train.batch_size {c.train.batch_size}; use a divisor"),
    Rule("train.micro_batch_size train.batch_size",
         lambda c: c.train.batch_size % c.train.micro_batch_size,
         "{c.train.micro_batch_size} does not divide train.batch_size {c.train.batch_size}; use a divisor"),
    Rule("model.attention data.document_mask data.packing data.records data.train",
         lambda c: c.model.attention == "flash_attention_2" and c.data.masks_documents,
         "flash_attention_2 does not support a mask between documents; use model.attention=sdpa"),
    Rule("model.attention train.precision",
         lambda c: c.model.attention == "flash_attention_2" and c.train.precision == "fp32",
         "flash_attention_2 computes only in bf16; use model.attention=sdpa or train.precision=bf16"),
    Rule("model.compile train.zero_stage",
         lambda c: c.model.compile is True and c.train.zero_stage == 3,
         "torch.compile cannot trace through ZeRO-3's hooks around each module; use train.zero_stage=2, "
         "or leave it at auto"),
    Rule("checkpoint.keep_best eval.every_steps eval.tasks_every_steps",
         _without_best,
         "{c.checkpoint.keep_best}: {found}"),
    Rule("train.allow_changes",
         lambda c: [name for name in c.train.allow_changes if name not in {*SETTINGS, "tokenizer", "data"}],
         "{found}: unknown setting; give names such as optim.lr, or tokenizer or data"),
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
# of a MethodConfig, independent of the rest of the run
METHOD_RULES = (
    Rule("method.dropout method.form method.name",
         lambda c: c.uses_adapters and c.dropout and c.form in ("merged", "resident"),
         "dropout acts only on the adapter's input, but the form {c.form} adds the adapter to the weight; "
         "use method.form=auto or method.dropout=0"),
    Rule("method.square_multiple method.square_size method.operators method.name",
         lambda c: (c.square_size or c.square_multiple) % 2 and _even_operators(c),
         "operator {found} needs an even R; give an even method.square_multiple, or an even method.square_size"),
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
# what harms nothing
REMARKS = (
    Rule("train.steps",
         lambda c: _cut_short(c),
         "the run of {c.train.steps} steps {found}"),
    Rule("method.merge_every",
         lambda c: _merges(c) and c.optim.restart_warmup_steps and _merges_in_warmup(c),
         "the first merge (step {c.method.merge_every}) comes before the warmup ends (step {found}): "
         "the warmup after it rises to the rate that the first warmup has then"),
    Rule("optim.restart_warmup_steps",
         lambda c: _merges(c) and c.optim.restart_warmup_steps > c.method.merge_every,
         "{c.optim.restart_warmup_steps} are more than the steps between merges: each warmup after a merge ends with "
         "the next one (method.merge_every={c.method.merge_every})"),
)
# of a Config and its number of ranks
RANK_RULES = (
    Rule("train.batch_size train.micro_batch_size",
         lambda c: not c.batch % c.micro and c.batch % (c.micro * c.ranks),
         "{c.batch} is not a multiple of train.micro_batch_size {c.micro} x {c.ranks} ranks; use a multiple"),
    Rule("data.lanes train.batch_size",
         lambda c: c.lanes % c.ranks,
         "{c.lanes} cannot be split evenly among {c.ranks} ranks; set a multiple of {c.ranks} that divides "
         "train.batch_size. A run can never change it, so allow for the largest number of ranks that it may move to"),
)
# fmt: on
