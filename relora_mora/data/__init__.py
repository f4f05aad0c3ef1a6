"""Text to token blocks: exact, elastic, streaming. See docs/data.md."""

from relora_mora.data.answers import Answer
from relora_mora.data.batch import UNSCORED, Batch, document_boundaries, document_ids
from relora_mora.data.chat import template_in_use
from relora_mora.data.checked_rows import check_columns, check_lanes, check_records
from relora_mora.data.content import at_versions, local_content, remote_content, remote_versions
from relora_mora.data.counting import count_epochs
from relora_mora.data.dataset_sources import find_datasets, remember_datasets
from relora_mora.data.errors import SourceError, WorkerError
from relora_mora.data.evalset import EvalSet, load_eval_set
from relora_mora.data.file_rows import iter_texts
from relora_mora.data.fingerprint import fingerprints
from relora_mora.data.hub_sources import with_commits
from relora_mora.data.lane_states import counts_of, merge_states, start_states
from relora_mora.data.mixture import in_saved_order, mixture_names
from relora_mora.data.positions import describe_position
from relora_mora.data.show import show_records
from relora_mora.data.skipped import SKIP_REASONS
from relora_mora.data.sources import Shard, configured_shards, resolve_shards
from relora_mora.data.stream import TrainStream
from relora_mora.data.token_checks import check_tokens, epoch_tokens
from relora_mora.data.token_folder import make_tokens

__all__ = [
    "SKIP_REASONS",
    "UNSCORED",
    "Answer",
    "Batch",
    "EvalSet",
    "Shard",
    "SourceError",
    "TrainStream",
    "WorkerError",
    "at_versions",
    "check_columns",
    "check_lanes",
    "check_records",
    "check_tokens",
    "configured_shards",
    "count_epochs",
    "counts_of",
    "describe_position",
    "document_boundaries",
    "document_ids",
    "epoch_tokens",
    "find_datasets",
    "fingerprints",
    "in_saved_order",
    "iter_texts",
    "load_eval_set",
    "local_content",
    "make_tokens",
    "merge_states",
    "mixture_names",
    "remember_datasets",
    "remote_content",
    "remote_versions",
    "resolve_shards",
    "show_records",
    "start_states",
    "template_in_use",
    "with_commits",
]
