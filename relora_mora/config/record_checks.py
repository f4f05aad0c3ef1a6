"""Faults of records and of how rows are packed. Pure: nothing is read but the settings."""

from __future__ import annotations

from collections.abc import Iterator

from relora_mora.config.data import DataConfig
from relora_mora.config.fault import Fault
from relora_mora.config.records import CONVERSATIONS, FIELDS, OPTIONAL_FIELDS, RecordsConfig
from relora_mora.config.schema import Config
from relora_mora.config.sources import set_setting


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
            "with data.packing=none each sequence holds one row, and there is nothing to mask; leave it out",
        )


def generation_faults(config: Config) -> Iterator[Fault]:
    """``eval.generate`` where no held-out source has answers that stand whole in a sequence."""
    data = config.data
    records = [data.records_of(source) for source in data.sources("validation")]
    if config.eval.generate and not any(map(data.has_whole_answers, records)):
        yield Fault(
            ("eval.generate", "data.records", "data.packing", "data.validation"),
            "there are no answers to generate: that takes records with data.records.score=answers, "
            "and data.packing=whole or none; set it to 0",
        )


def _faults_of(setting: str, records: RecordsConfig) -> Iterator[Fault]:
    section = _section(setting)
    known = (*FIELDS[records.kind], *OPTIONAL_FIELDS.get(records.kind, ()))
    unknown = [field for field in records.columns if field not in known]
    if unknown:
        yield Fault(
            (f"{setting}.columns", section),
            f"{', '.join(unknown)}: no field of {records.kind}; its fields are {', '.join(known)}",
        )
    if records.template is not None and records.kind not in CONVERSATIONS:
        yield Fault(
            (f"{setting}.template", section),
            f"{records.kind} has a form of its own, and a template is for {' and '.join(CONVERSATIONS)}; leave it out",
        )


def _section(setting: str) -> str:
    return ".".join(setting.split(".")[:2])


def _stream_faults(data: DataConfig, setting: str, records: RecordsConfig) -> Iterator[Fault]:
    section = _section(setting)
    if records.too_long == "drop":
        yield Fault(
            (f"{setting}.too_long", "data.packing", "data.records", section),
            "with data.packing=stream a row goes on in the next sequence, and none is too long; "
            "leave it out, or set data.packing=whole",
        )
    if data.document_mask and records.kind in CONVERSATIONS:
        yield Fault(
            ("data.document_mask", "data.packing", "data.records", section),
            "with data.packing=stream it finds documents by their end, which stands inside of conversations too; "
            "set data.packing=whole, which masks rows whatever they hold",
        )
