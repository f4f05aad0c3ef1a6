"""Any trained model, to score text with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from relora_mora.checkpoint import read_manifest, tokenizer_of
from relora_mora.checkpoint.find import find_checkpoint
from relora_mora.config import SCORING, ConfigError, DataConfig, TextSource, read_data, stored_config
from relora_mora.config.records import CHATML, RecordsConfig
from relora_mora.config.sources import map_records
from relora_mora.data.hub_sources import hub_repo
from relora_mora.pretrained.foreign import check_headers, is_foreign, load_foreign, positions_of
from relora_mora.pretrained.merged import merged_model

HF_LENGTH = 2048  # longest sequence that a foreign model is scored with by default


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM to score text with.

    ``tokenizer`` is a context manager that gives the tokenizer's folder; ``data`` says how the training text was read.
    ``checkpoint`` is that of this trainer which the weights are from, and its step. ``of_run``: so are they, or those
    that an adapter was put on; then the model's config may name other special tokens than the tokenizer.
    """

    model: PreTrainedModel
    tokenizer: AbstractContextManager[Path]
    data: DataConfig
    description: str
    checkpoint: tuple[Path, int] | None = None
    of_run: bool = False

    def data_settings(self, validation: Any, overrides: Mapping[str, str], *, own_tokenizer: bool = True) -> DataConfig:
        """Settings for reading held-out text: those of training, and over them what a command line gives.

        ``validation`` is as the setting of that name, or None for the run's own. Of a run, the revisions hold for its
        own sources alone, its commits for all. With its ``own_tokenizer`` a run's conversations have the chat template
        that this took along. Raises :class:`ConfigError`.
        """
        trained = _by_own_template(self.data) if own_tokenizer else self.data
        given = trained.model_dump(include={*SCORING, "validation", "commits"}) | {"train": "none"}
        if any(name.startswith("data.records") for name in overrides):
            del given["packing"]
        kind = overrides.get("data.records.kind")
        if kind is not None and trained.records is not None and trained.records.kind != kind:
            given["records"] = None  # columns and template of one kind are none of another
        if overrides.get("data.packing") == "none":
            del given["document_mask"]
        if validation is None:
            return read_data(given, overrides, SCORING)
        del given["revision"]
        data = read_data({**given, "validation": validation}, overrides, SCORING)
        own = [] if "data.revision" in overrides else filter(hub_repo, self.data.sources("validation"))
        known = {source.source: source.revision or self.data.revision for source in own}

        def pinned(source: TextSource) -> TextSource:
            return source.model_copy(update={"revision": source.revision or known.get(source.source)})

        sets = {name: [pinned(source) for source in sources] for name, sources in data.validation_sets.items()}
        return data.model_copy(update={"validation": sets})


def _by_own_template(data: DataConfig) -> DataConfig:
    """With null in place of the file of the chat template that the run's tokenizer has from its training."""
    trained = map(data.records_of, data.train_sources)
    file = next((each.template for each in trained if each is not None and each.is_conversation), None)
    if file in (None, CHATML):
        return data

    def own(records: RecordsConfig | None) -> RecordsConfig | None:
        if records is None or records.template != file:
            return records
        return records.model_copy(update={"template": None})

    validation = map_records(data.validation, lambda one: one.model_copy(update={"records": own(one.records)}))
    return data.model_copy(update={"records": own(data.records), "validation": validation})


def load_any_model(path: Path, dtype: torch.dtype) -> LoadedModel:
    """The model of a checkpoint, run folder or Hugging Face folder. Nothing is downloaded and no code of it is run.

    Raises :class:`CheckpointError` for anything else.
    """
    if is_foreign(path):
        with suppress(ConfigError):  # of another family: only transformers knows its sizes
            check_headers(path)
        model = load_foreign(path, dtype)
        plain = DataConfig(
            train="none", validation="none", sequence_length=min(HF_LENGTH, positions_of(model) or HF_LENGTH)
        )
        return LoadedModel(model, nullcontext(path), plain, f"{path} ({type(model).__name__})")
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    data = stored_config(manifest.config, str(checkpoint)).data
    return LoadedModel(
        merged_model(checkpoint, dtype),
        tokenizer_of(checkpoint),
        data,
        f"{checkpoint} (step {manifest.step})",
        (checkpoint, manifest.step),
        of_run=True,
    )
