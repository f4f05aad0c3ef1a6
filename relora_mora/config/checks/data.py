"""Faults in the settings of data: mixtures, records, packing, and the length of a run."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from relora_mora.config.data import CONVERSATIONS, DataConfig, RecordsConfig, TextSource, is_mixture, set_setting
from relora_mora.config.lengths import ALTERNATIVES
from relora_mora.config.schema import Config
from relora_mora.config.types import Fault

_MIXTURE_KEYS = ("weight", "max_epochs", "at_max_epochs")
_LENGTHS = {"train": "the length of a run", "optim": "the warmup"}


def length_faults(config: Config) -> Iterator[Fault]:
    for section, names in ALTERNATIVES.items():
        values = getattr(config, section)
        given = [
            f"{section}.{name}"
            for name in names
            if name in values.model_fields_set and getattr(values, name) is not None
        ]
        if len(given) > 1:
            yield Fault(
                (given[-1],),
                f"{' and '.join(given)} are set, but {_LENGTHS[section]} is given only once; set all but one to null",
            )
    if config.train.epochs is not None and len(config.data.train_sources) > 1 and config.data.is_mixture:
        yield Fault(
            ("train.epochs", "data.train"),
            "each source of a mixture has epochs of its own; set data.concatenate=true to read each source once per "
            "epoch, or give train.tokens or train.steps, and max_epochs to limit how often a source is read",
        )
    elif config.train.epochs is not None:
        for number, source in enumerate(config.data.train_sources):
            if source.max_epochs is not None and source.at_max_epochs == "stop":
                setting = f"data.train.{number}.max_epochs"
                yield Fault(
                    (setting, "train.epochs"), f"{source.max_epochs:g} may end the run before its last step; remove it"
                )


def data_faults(config: Config) -> Iterator[Fault]:
    data = config.data
    if is_mixture(data.train):
        yield from _name_faults(data.train_sources)
    if data.is_mixture and not any(source.weight for source in data.train_sources):
        yield Fault(("data.train",), "all weights are 0; give at least one source a positive weight")
    if data.concatenate:
        yield from _concatenation_faults(data)
    yield from _stage_faults(config)
    sets = data.validation_sets
    for name, sources in [("data.train", data.train_sources), *((set_setting(name), s) for name, s in sets.items())]:
        for number, source in enumerate(sources):
            yield from _source_faults(f"{name}.{number}", name.split(".")[1], source)
            if name != "data.train":
                yield from _held_out_faults(f"{name}.{number}", source)


def _source_faults(setting: str, field: str, source: TextSource) -> Iterator[Fault]:
    is_set = "://" not in source.source and not source.source.startswith("hub:")
    named_in_source = source.source.split(":")[1:3] if is_set else []
    for key, value in zip(("config", "split"), named_in_source, strict=False):
        if value and getattr(source, key) is not None:
            yield Fault(
                (f"{setting}.{key}", f"data.{field}"),
                f"it is {getattr(source, key)}, but the source {source.source} names {value}; give only one of them",
            )


def _held_out_faults(setting: str, source: TextSource) -> Iterator[Fault]:
    """Settings of mixtures, which held-out text would silently ignore."""
    for key, value in _changed(source, ("name", *_MIXTURE_KEYS)):
        remedy = f"give sets by name, as {{{value}: {{source: ...}}}}" if key == "name" else "leave it out"
        yield Fault(
            (f"{setting}.{key}", "data.validation"),
            f"{value} is for the sources of a mixture, but held-out text is never mixed; {remedy}",
        )


def _changed(source: TextSource, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Those of the keys whose value is not the default, with their values."""
    for key in keys:
        value = getattr(source, key)
        if value != TextSource.model_fields[key].default:
            yield key, value


def _concatenation_faults(data: DataConfig) -> Iterator[Fault]:
    if not is_mixture(data.train):
        yield Fault(
            ("data.concatenate", "data.train"),
            "it is for a list of records {source: ..., records: ...}; other sources are one text anyway; leave it out",
        )
        return
    for number, source in enumerate(data.train_sources):
        for key, value in _changed(source, _MIXTURE_KEYS):
            yield Fault(
                (f"data.train.{number}.{key}", "data.concatenate", "data.train"),
                f"{value} is for the sources of a mixture, but data.concatenate joins them into one text; "
                "leave one of the two out",
            )
    contents = [data.records_of(source) for source in data.train_sources]
    if len({data.packing_of([records]) for records in contents}) > 1:
        yield Fault(
            ("data.packing", "data.concatenate", "data.train"),
            "sources of text and of records are packed differently by default; set data.packing for all of them",
        )
    if len({records.too_long if records else "cut" for records in contents if records is None or records.is_text}) > 1:
        yield Fault(
            ("data.concatenate", "data.train"),
            "sources of plain text have different values of records.too_long; give all of them the same one",
        )


def _name_faults(sources: Sequence[TextSource]) -> Iterator[Fault]:
    labels = [source.label for source in sources]
    for number, label in enumerate(labels):
        if not label:
            yield Fault(
                (f"data.train.{number}.name", "data.train"),
                f"no name for metrics follows from {sources[number].source}; set one, e.g. name: web",
            )
    for label, count in Counter(labels).items():
        if count > 1 and label:
            yield Fault(("data.train",), f"{count} sources are named {label}; give each a name of its own (name: ...)")


def _stage_faults(config: Config) -> Iterator[Fault]:
    data = config.data
    stages = data.stages
    if stages and not data.is_mixture:
        yield Fault(
            ("data.stages", "data.train"),
            "stages change the weights of a mixture, but data.train is not a mixture; give it as a list of records "
            "{source: ..., weight: ..., name: ...}, without data.concatenate",
        )
        return
    labels = [source.label for source in data.train_sources]
    before = 0
    for number, stage in enumerate(stages):
        setting = f"data.stages.{number}"
        if stage.from_step <= before:
            yield Fault(
                (f"{setting}.from_step", "data.stages"),
                f"{stage.from_step} is not after the previous stage ({before}); give stages in the order of steps",
            )
        before = stage.from_step
        if set(stage.weights) != set(labels):
            yield Fault(
                (f"{setting}.weights", "data.stages", "data.train"),
                f"it names {', '.join(stage.weights)}; name each source of data.train ({', '.join(labels)}) once, "
                "with weight 0 to leave it out",
            )
        elif not any(stage.weights.values()):
            yield Fault((f"{setting}.weights", "data.stages"), "all weights are 0; give at least one a positive weight")


def record_faults(data: DataConfig) -> Iterator[Fault]:
    sets = {"data.train": data.train_sources}
    sets |= {set_setting(name): sources for name, sources in data.validation_sets.items()}
    own = {
        f"{setting}.{number}.records": source.records
        for setting, sources in sets.items()
        for number, source in enumerate(sources)
    }
    for setting, records in {"data.records": data.records, **own}.items():
        if records is not None:
            yield from _faults_of(setting, records)
    if None in own.values():
        own["data.records"] = data.records
    for setting, records in own.items():
        if records is not None and data.packing_of([records]) == "stream":
            yield from _stream_faults(data, setting, records)
    if data.document_mask and data.packing == "none":
        yield Fault(
            ("data.document_mask", "data.packing"),
            "with data.packing=none each sequence holds one row, so there is nothing to mask; leave it out",
        )


def generation_faults(config: Config) -> Iterator[Fault]:
    """``eval.generate`` without a held-out source whose answers are whole within a sequence."""
    data = config.data
    records = [data.records_of(source) for source in data.sources("validation")]
    if config.eval.generate and not any(map(data.has_whole_answers, records)):
        yield Fault(
            ("eval.generate", "data.records", "data.packing", "data.validation"),
            "there are no answers to generate; use records with data.records.score=answers "
            "and data.packing=whole or none, or set it to 0",
        )


def _faults_of(setting: str, records: RecordsConfig) -> Iterator[Fault]:
    section = ".".join(setting.split(".")[:2])
    known = (*records.required, *records.optional)
    unknown = [field for field in records.columns if field not in known]
    if unknown:
        yield Fault(
            (f"{setting}.columns", section),
            f"{', '.join(unknown)}: not a field of {records.kind}; its fields are {', '.join(known)}",
        )
    if records.template is not None and not records.is_conversation:
        yield Fault(
            (f"{setting}.template", section),
            f"a template is only for {' and '.join(CONVERSATIONS)}, but the kind is {records.kind}; leave it out",
        )


def _stream_faults(data: DataConfig, setting: str, records: RecordsConfig) -> Iterator[Fault]:
    section = ".".join(setting.split(".")[:2])
    if records.too_long == "drop":
        yield Fault(
            (f"{setting}.too_long", "data.packing", "data.records", section),
            "with data.packing=stream a row continues in the next sequence, so no row is too long; "
            "leave it out, or set data.packing=whole",
        )
    if data.document_mask and records.is_conversation:
        yield Fault(
            ("data.document_mask", "data.packing", "data.records", section),
            "with data.packing=stream it finds documents by their end token, which conversations also contain inside; "
            "set data.packing=whole, which masks whole rows",
        )
