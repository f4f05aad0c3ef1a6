"""Rules for data: mixtures, held-out text, records and packing."""

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from relora_mora.config.data import CONVERSATIONS, DataConfig, TextSource, is_mixture, set_setting
from relora_mora.config.schema import Config
from relora_mora.config.types import Fault, Rule, broken_rules


def _shared_labels(data: DataConfig) -> list[str]:
    counts = Counter(source.label for source in data.train if is_mixture(data.train))
    return [label for label, count in counts.items() if label and count > 1]


def _has_one_text(config: Config) -> bool:
    return len(config.data.train) == 1 or not config.data.is_mixture


def _is_joined(data: DataConfig) -> bool:
    return data.concatenate and is_mixture(data.train)


def _differs_within(data: DataConfig) -> list[str]:
    """What the sources of one text have different values of."""
    contents = [data.records_of(source) for source in data.train if _is_joined(data)]
    long = {each.too_long if each else "cut" for each in contents if each is None or each.is_text}
    packing = {data.packing_of([each]) for each in contents}
    found: dict[str, set[Any]] = {"data.packing": packing, "records.too_long": long}
    return [name for name, values in found.items() if len(values) > 1]


SHARES = ("exact_match", "character_accuracy")  # of the generated answers; more is better
METRICS = ("loss", "perplexity", "bits_per_byte", *SHARES)  # of an evaluation


def misnamed_metric(metric: str) -> str | None:
    """What is wrong with the name of a metric of evaluations."""
    parts = metric.split("/")
    if parts[0] == "eval" and parts[-1] in METRICS and len(parts) in (2, 3):
        return None
    return f"expected eval/NAME or eval/SET/NAME with a name of {', '.join(METRICS)}"


def missing_metric(config: Config, metric: str) -> str | None:
    """Why a run with these settings will not have a metric of evaluations, as far as the settings show."""
    _, *set_name, name = metric.split("/")
    data = config.data
    named = {key: sources for key, sources in data.validation.items() if key}
    if set_name and set_name[0] not in named:
        return f"data.validation names {', '.join(named) or 'no sets'}"
    sources = named[set_name[0]] if set_name else data.sources("validation")
    records = [data.records_of(source) for source in sources]
    if name in SHARES and not (config.eval.generate and any(map(data.has_whole_answers, records))):
        return "no answers are generated; set eval.generate (docs/tasks.md)"
    if name == "bits_per_byte" and not all(each is None or each.is_text for each in records):
        return "only plain text has this metric, records do not; choose by a loss"
    return None


def _named_twice(source: TextSource) -> list[str]:
    """Of the configuration and the split that ``OWNER/NAME:CONFIG:SPLIT`` names, those that the record names, too."""
    is_set = "://" not in source.source and not source.source.startswith("hub:")
    parts = zip(("config", "split"), source.source.split(":")[1:], strict=False)
    return [key for key, named in parts if is_set and named and getattr(source, key) is not None]


def _unknown_columns(c: SimpleNamespace) -> list[str]:
    return [field for field in c.records.columns if field not in c.records.fields]


# fmt: off
DATA_RULES = (
    Rule("train.epochs data.train",
         lambda c: c.train.epochs is not None and not _has_one_text(c),
         "each source of a mixture has epochs of its own; set data.concatenate=true, or give train.steps"),
    Rule("data.train",
         lambda c: _shared_labels(c.data),
         "several sources are named {found}; give each a name of its own (name: ...)"),
    Rule("data.train",
         lambda c: c.data.is_mixture and not any(source.weight for source in c.data.train),
         "all weights are 0; give at least one source a positive weight"),
    Rule("data.concatenate data.packing data.records data.train",
         lambda c: _differs_within(c.data),
         "the sources of one text have different values of {found}; set the same one for all of them"),
    Rule("data.stages data.train",
         lambda c: c.data.stages and not c.data.is_mixture,
         "stages change the weights of a mixture, but data.train is not a mixture; give it as a list of records "
         "{{source: ..., weight: ..., name: ...}}, without data.concatenate"),
    Rule("data.document_mask data.packing",
         lambda c: c.data.document_mask and c.data.packing == "none",
         "with data.packing=none each sequence holds one row, so there is nothing to mask; leave it out"),
    Rule("eval.generate data.records data.packing data.validation",
         lambda c: c.eval.generate
         and not any(c.data.has_whole_answers(c.data.records_of(each)) for each in c.data.sources("validation")),
         "there are no answers to generate; use records with data.records.score=answers "
         "and data.packing=whole or none, or set it to 0"),
)
SOURCE_RULES = (
    Rule("{at} {section}",
         lambda c: _named_twice(c.source),
         "the source {c.source.source} names its {found}, too; give it only once"),
    Rule("{at}.name data.train",
         lambda c: c.of_train and is_mixture(c.run.data.train) and not c.source.label,
         "no name for metrics follows from {c.source.source}; set one, e.g. name: web"),
    Rule("{at}.name data.validation",
         lambda c: not c.of_train and c.source.name,
         "it is for a mixture, but held-out text is never mixed; give sets by name, as {{NAME: {{source: ...}}}}"),
    Rule("{at} {section} data.concatenate",
         lambda c: (not c.of_train or _is_joined(c.run.data)) and c.source.weight != 1,
         "weight is only for the sources of a mixture, but held-out text and what data.concatenate joins is not mixed; "
         "leave it out"),
)
STAGE_RULES = (
    Rule("{at}.from_step data.stages",
         lambda c: c.stage.from_step <= c.before,
         "{c.stage.from_step} is not after the previous stage ({c.before}); give stages in the order of steps"),
    Rule("{at}.weights data.stages data.train",
         lambda c: set(c.stage.weights) != set(c.sources) and list(c.stage.weights),
         "it names {found}; name each source of data.train {c.sources} once, with weight 0 to leave it out"),
    Rule("{at}.weights data.stages",
         lambda c: set(c.stage.weights) == set(c.sources) and not any(c.stage.weights.values()),
         "all weights are 0; give at least one a positive weight"),
)
RECORDS_RULES = (
    Rule("{at}.columns {section}",
         _unknown_columns,
         "{found}: not a field of {c.records.kind}, which has {c.records.fields}; name its fields"),
    Rule("{at}.template {section}",
         lambda c: c.records.template is not None and not c.records.is_conversation,
         f"a template is only for {' and '.join(CONVERSATIONS)}, but the kind is {{c.records.kind}}; leave it out"),
    Rule("{at}.too_long data.packing data.records {section}",
         lambda c: c.in_stream and c.records.too_long == "drop",
         "with data.packing=stream rows continue in the next sequence; leave it out, or set data.packing=whole"),
    Rule("data.document_mask data.packing data.records {section}",
         lambda c: c.in_stream and c.run.data.document_mask and c.records.is_conversation,
         "with data.packing=stream it finds documents by their end token, which conversations also contain inside; "
         "set data.packing=whole, which masks whole rows"),
)
# fmt: on


def data_faults(config: Config) -> Iterator[Fault]:
    data = config.data
    yield from broken_rules(DATA_RULES, config)
    sets = {"data.train": data.train}
    sets |= {set_setting(name): sources for name, sources in data.validation.items()}
    places = {f"{name}.{number}": source for name, sources in sets.items() for number, source in enumerate(sources)}
    for at, source in places.items():
        given = SimpleNamespace(source=source, of_train=at.startswith("data.train."), run=config)
        yield from broken_rules(SOURCE_RULES, given, at=at, section=_section(at))
    before = 0
    for number, stage in enumerate(data.stages if data.is_mixture else ()):
        given = SimpleNamespace(stage=stage, before=before, sources=[source.label for source in data.train])
        yield from broken_rules(STAGE_RULES, given, at=f"data.stages.{number}")
        before = stage.from_step
    own = {f"{at}.records": source.records for at, source in places.items()}
    for at, records in {"data.records": data.records, **own}.items():
        is_used = at in own or None in own.values()
        if records is not None:
            given = SimpleNamespace(
                records=records, in_stream=is_used and data.packing_of([records]) == "stream", run=config
            )
            yield from broken_rules(RECORDS_RULES, given, at=at, section=_section(at))


def _section(setting: str) -> str:
    """``data.train`` for ``data.train.0.records``."""
    return ".".join(setting.split(".")[:2])
