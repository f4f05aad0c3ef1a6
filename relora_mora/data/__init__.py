"""Text to token blocks: exact, elastic, streaming. See docs/data.md."""

from relora_mora.data.content import local_content, remote_content
from relora_mora.data.errors import SourceError, WorkerError
from relora_mora.data.evalset import UNSCORED, EvalSet, load_eval_set
from relora_mora.data.fingerprint import fingerprint, order_fingerprint
from relora_mora.data.lanes import start_states
from relora_mora.data.positions import describe_position
from relora_mora.data.sources import Shard, hub_commits, pin_revision, remember_commits, resolve_shards
from relora_mora.data.stream import Batch, TrainStream, counts_of, document_ids, merge_states
from relora_mora.data.texts import KINDS, iter_texts

__all__ = [
    "KINDS",
    "UNSCORED",
    "Batch",
    "EvalSet",
    "Shard",
    "SourceError",
    "TrainStream",
    "WorkerError",
    "counts_of",
    "describe_position",
    "document_ids",
    "fingerprint",
    "hub_commits",
    "iter_texts",
    "load_eval_set",
    "local_content",
    "merge_states",
    "order_fingerprint",
    "pin_revision",
    "remember_commits",
    "remote_content",
    "resolve_shards",
    "start_states",
]
