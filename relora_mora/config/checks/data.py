"""Rules for data: mixtures, held-out text, records and packing; and the metrics that evaluations of it have."""

from collections import Counter
from itertools import pairwise
from typing import Any

from relora_mora.config.data import RecordsConfig, is_mixture
from relora_mora.config.schema import Config
from relora_mora.config.types import Rule

SHARES = ("exact_match", "character_accuracy")  # of the generated answers; more is better


def missing_metric(config: Config, metric: str) -> str | None:
    """What is wrong with a metric of evaluations that a run with these settings will not have."""
    data = config.data
    sets = {f"eval/{name}" if name else "eval": sources for name, sources in data.validation.items()}
    known = []
    for at, sources in {"eval": data.sources("validation"), **sets}.items():
        rows = [data.records_of(source) for source in sources]
        of_text = ["bits_per_byte"] if all(each is None or each.is_text for each in rows) else []
        of_answers = SHARES if config.eval.generate and any(map(data.has_whole_answers, rows)) else ()
        known += [f"{at}/{name}" for name in ("loss", "perplexity", *of_text, *of_answers)]
    if metric in known:
        return None
    return f"not a metric of this run, which has {', '.join(known)}; eval.generate adds those of answers"


def _without_name(c: Config) -> list[str]:
    labels = Counter(source.label for source in c.data.train)
    return [source.source for source in c.data.train if not source.label or labels[source.label] > 1]


def _joined(c: Config) -> bool:
    return c.data.concatenate and is_mixture(c.data.train)


def _differs_within(c: Config) -> list[str]:
    """What the sources of one text have different values of."""
    contents = [c.data.records_of(source) for source in c.data.train]
    found: dict[str, set[Any]] = {
        "data.packing": {c.data.packing_of([each]) for each in contents},
        "records.too_long": {each.too_long if each else "cut" for each in contents if each is None or each.is_text},
    }
    return [name for name, values in found.items() if len(values) > 1]


def _wrong_stages(c: Config) -> list[int]:
    """The steps of stages whose weights are not those of the sources, or all 0."""
    labels = {source.label for source in c.data.train}
    return [each.from_step for each in c.data.stages if set(each.weights) != labels or not any(each.weights.values())]


def _streamed(c: Config) -> list[RecordsConfig]:
    """The contents of rows that follow each other and are cut at the end of a sequence."""
    rows = {c.data.records_of(source) for split in ("train", "validation") for source in c.data.sources(split)}
    return [each for each in rows if each is not None and c.data.packing_of([each]) == "stream"]


_ROWS = "data.packing data.records data.train data.validation"
# fmt: off
DATA_RULES = (
    Rule("train.epochs data.train",
         lambda c: c.train.epochs is not None and c.data.is_mixture and len(c.data.train) > 1,
         "each source of a mixture has epochs of its own; set data.concatenate=true, or give train.steps"),
    Rule("data.train",
         lambda c: is_mixture(c.data.train) and _without_name(c),
         "{found}: no name for metrics, or the name of another source; give each a name of its own, e.g. name: web"),
    Rule("data.train",
         lambda c: c.data.is_mixture and not any(source.weight for source in c.data.train),
         "all weights are 0; give at least one source a positive weight"),
    Rule("data.concatenate data.packing data.records data.train",
         lambda c: _joined(c) and _differs_within(c),
         "the sources of one text have different values of {found}; set the same one for all of them"),
    Rule("data.concatenate data.train",
         lambda c: _joined(c) and [source.source for source in c.data.train if source.weight != 1],
         "one text has no weights; leave out that of {found}"),
    Rule("data.validation",
         lambda c: [each.source for each in c.data.sources("validation") if each.name or each.weight != 1],
         "{found}: name and weight are for mixtures, but held-out text is never mixed; leave them out, and give sets "
         "by name, as {{NAME: {{source: ...}}}}"),
    Rule("data.stages data.train",
         lambda c: c.data.stages and not c.data.is_mixture,
         "stages change the weights of a mixture, but data.train is not a mixture; give it as a list of records "
         "{{source: ..., weight: ..., name: ...}}, without data.concatenate"),
    Rule("data.stages",
         lambda c: [then.from_step for now, then in pairwise(c.data.stages) if then.from_step <= now.from_step],
         "the stage of step {found} does not follow the one before it; give stages in the order of steps"),
    Rule("data.stages data.train",
         lambda c: c.data.is_mixture and _wrong_stages(c),
         "the stage of step {found}: name each source of data.train once, with weight 0 to leave it out, but not all"),
    Rule("data.document_mask data.packing",
         lambda c: c.data.document_mask and c.data.packing == "none",
         "with data.packing=none each sequence holds one row, so there is nothing to mask; leave it out"),
    Rule(_ROWS,
         lambda c: any(each.too_long == "drop" for each in _streamed(c)),
         "stream continues rows in the next sequence, so none is too long; leave records.too_long out, or set whole"),
    Rule(f"data.document_mask {_ROWS}",
         lambda c: c.data.document_mask and any(each.is_conversation for each in _streamed(c)),
         "with data.packing=stream it finds documents by their end token, which conversations also contain inside; "
         "set data.packing=whole, which masks whole rows"),
    Rule("eval.generate data.records data.packing data.validation",
         lambda c: c.eval.generate
         and not any(c.data.has_whole_answers(c.data.records_of(each)) for each in c.data.sources("validation")),
         "there are no answers to generate; use records with data.records.score=answers "
         "and data.packing=whole or none, or set it to 0"),
)
# fmt: on
