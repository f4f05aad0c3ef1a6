"""Takes a run up where a checkpoint left it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from relora_mora.checkpoint import (
    CheckpointError,
    CheckpointReader,
    Manifest,
    changed_settings,
    damaged_tokenizer,
    list_checkpoints,
    newest_whole,
)
from relora_mora.checkpoint.find import find_checkpoint
from relora_mora.checkpoint.places import list_new, step_of
from relora_mora.config import Config
from relora_mora.data import start_states
from relora_mora.distributed.collectives import from_first_rank
from relora_mora.model import FUNCTION, TRAINING, keys_with
from relora_mora.system.files import write_synced
from relora_mora.system.logs import log
from relora_mora.system.run_folder import RunFolder
from relora_mora.train.build import Run
from relora_mora.train.rollbacks import dump_rollbacks, read_rollbacks

# settings that change how a run is done and not what comes out of it: they may differ at a resume
FREE_SETTINGS = {
    "model.config",  # the model's own settings are compared instead
    "model.overrides",
    "model.init_from",
    "model.activation_checkpointing",
    "model.compile",
    "tokenizer.path",  # compared by fingerprint
    "data.train",  # compared by fingerprint
    "data.validation",
    "data.max_bad_fraction",  # it decides whether the run goes on, not what it reads
    "data.workers",
    "data.prefetch_batches",
    "data.timeout_seconds",
    "train.run_dir",
    "train.micro_batch_size",
    "train.zero_stage",
    "train.resume",
    "train.allow_changes",
    "train.max_bad_steps",
    "train.max_rollbacks",
    "train.peer_timeout_seconds",
    "train.deepspeed",
}


FREE_SECTIONS = {"eval", "checkpoint", "log"}


def finds_checkpoint(config: Config) -> bool:
    """Whether :func:`resume` will put a checkpoint in place of initial values, or end the run."""
    folder = RunFolder(Path(config.train.run_dir)).checkpoints
    if config.train.resume == "auto":
        return bool(list_checkpoints(folder) or list_new(folder))
    return config.train.resume != "never"


def resume(run: Run) -> None:
    folder = RunFolder(Path(run.config.train.run_dir)).checkpoints
    wanted = run.config.train.resume
    if wanted == "never":
        if list_checkpoints(folder):
            raise CheckpointError(
                f"{folder}: holds checkpoints, and train.resume=never; use another train.run_dir, or train.resume=auto"
            )
        return
    if wanted == "auto":
        chosen, skipped = newest_whole(folder, run.engine)
        for reason in skipped if run.engine.rank == 0 else ():  # all ranks know the same
            log.warning("passed over %s", reason)
        if chosen is None:
            if skipped:
                raise CheckpointError(
                    f"{folder}: none of {len(skipped)} checkpoints is whole; move them away to start anew"
                )
            return
    else:
        chosen = from_first_rank(lambda: find_checkpoint(Path(wanted)))
    reader = CheckpointReader(chosen)
    _check_same_run(run, reader)
    problem = damaged_tokenizer(chosen, reader.manifest) if run.engine.rank == 0 else None
    if problem is not None:
        log.warning("%s: %s; its tensors are whole, and the run goes on with tokenizer.path", chosen, problem)
    restore(run, reader, forget_rollbacks=wanted != "auto")
    log.info("resumed from %s at step %d", chosen, run.step)
    if reader.manifest.data_order != run.checked.data_order:
        run.data_state = start_states(run.config.lanes)
        if run.engine.rank == 0:
            log.warning("the training data is not what it was (train.allow_changes): it is read from its beginning")
    _catch_up(run, reader)


def restore(run: Run, reader: CheckpointReader, *, forget_rollbacks: bool = False) -> None:
    """Puts a run where a checkpoint of it stands; a collective.

    Where the run was rolled back to there before, its data goes on where that left it, unless that shall be forgotten.
    """
    manifest, folder = reader.manifest, Path(run.config.train.run_dir)
    reader.restore(run.engine, run.base)
    run.step, run.data_state, run.counters, run.resumed_from = (
        manifest.step,
        manifest.data_state,
        dict(manifest.counters),
        reader,
    )
    run.merger.set_operator(manifest.operator)
    if run.engine.rank == 0:
        _abandon_later(RunFolder(folder).checkpoints, run.step)
    if reader.folder.parent.resolve() != RunFolder(folder).checkpoints.resolve():
        return
    count = run.counters.get("rollbacks", 0)
    rollbacks = from_first_rank(lambda: read_rollbacks(folder))
    if forget_rollbacks:
        if len(rollbacks) > count:
            from_first_rank(lambda: write_synced(RunFolder(folder).rollbacks, dump_rollbacks(rollbacks[:count])))
        return
    for number, rollback in enumerate(rollbacks[count:], count + 1):
        if rollback.step == run.step:  # the last one to here is how the run went on
            run.data_state, run.counters["rollbacks"] = rollback.data_state, number


def _abandon_later(folder: Path, step: int) -> None:
    """After going back, checkpoints of later steps belong to another history: the next resume must not take them."""
    for later in [*list_checkpoints(folder), *list_new(folder)]:
        if (step_of(later.with_suffix("")) or 0) > step:
            target = later.with_name(f"abandoned-{later.with_suffix('').name}")
            shutil.rmtree(target, ignore_errors=True)
            later.rename(target)
            log.warning("%s is later than the step resumed from: renamed to %s", later.name, target.name)


def _catch_up(run: Run, reader: CheckpointReader) -> None:
    """The last step of a run does not merge; a longer run makes up for it here. Raises where merges and settings disagree."""
    manifest = reader.manifest
    due, operator = run.schedule.merges_done(run.step), run.schedule.operator(run.step)
    if due == manifest.merges_done + 1 and run.schedule.merge_after(run.step):
        run.merger.merge(run.step, due, operator)
        log.info("step %d: merged, which the shorter run had left to its export", run.step)
    elif due != manifest.merges_done:
        raise CheckpointError(
            f"{reader.folder}: has merged {manifest.merges_done} times, with these settings a run at step {run.step} has merged {due} times; "
            "resume with the method.merge_every it was made with"
        )
    elif operator != manifest.operator:
        raise CheckpointError(
            f"{reader.folder}: was made with operator {manifest.operator}, the settings say {operator} after step {run.step}; "
            "resume with the method.operators it was made with"
        )


def _check_same_run(run: Run, reader: CheckpointReader) -> None:
    """Raises :class:`CheckpointError` with all differences that would change the result and are not allowed."""
    manifest, config = reader.manifest, run.config
    now = config.model_dump(mode="json")
    allowed = FREE_SETTINGS | set(config.train.allow_changes)
    changed = [
        name
        for name in changed_settings(manifest.config, now)
        if name.split(".")[0] not in FREE_SECTIONS and name not in allowed
    ]
    faults = [
        f"{name}: {_value(manifest.config, name)!r} in the checkpoint, {_value(now, name)!r} now; to allow it: --train.allow_changes=[{name}]"
        for name in changed
    ]
    saved = keys_with(LlamaConfig(**manifest.model_config), FUNCTION, TRAINING)
    model = keys_with(run.checked.model_config, FUNCTION, TRAINING)
    different = [key for key in model if saved[key] != model[key]]
    faults += [f"model: {key} is {saved[key]!r} in the checkpoint, {model[key]!r} now" for key in different]
    other_tokenizer = manifest.tokenizer_fingerprint != run.checked.tokenizer_fingerprint
    if other_tokenizer and "tokenizer" not in allowed:
        faults.append(
            f"tokenizer: {config.tokenizer.path} gives other tokens; to allow it: --train.allow_changes=[tokenizer]"
        )
    eos = run.checked.tokenizer.eos_token_id
    if manifest.eos_token_id not in (None, eos) and "tokenizer" not in allowed:
        faults.append(
            f"tokenizer: a document ended with token {manifest.eos_token_id}, that of {config.tokenizer.path} ends with {eos}; "
            "to allow it: --train.allow_changes=[tokenizer]"
        )
    other_data = manifest.data_content not in (None, run.checked.data_content)
    if not other_tokenizer and not _data_settings_differ(manifest, now):  # the data's fingerprint contains both
        other_data |= manifest.data_fingerprint != run.checked.data_fingerprint
    if other_data and "data" not in allowed:
        faults.append("data: other sources, or files that have changed; to allow it: --train.allow_changes=[data]")
    if manifest.bf16 != run.checked.bf16 and "train.precision" not in allowed and "train.precision" not in changed:
        faults.append(
            "train.precision: auto means another precision on this machine; to allow it: --train.allow_changes=[train.precision]"
        )
    if manifest.step > 0 and not manifest.data_state:
        faults.append("data: the checkpoint does not say where in the data it stands")
    if manifest.step > config.train.steps:
        faults.append(f"train.steps: the checkpoint is at step {manifest.step} already")
    if faults:
        raise CheckpointError(
            "\n".join([f"{reader.folder}: made with other settings:", *(f"  - {fault}" for fault in faults)])
        )


def _data_settings_differ(manifest: Manifest, now: dict[str, Any]) -> bool:
    """Whether a setting explains another fingerprint of the data: then that one is refused or allowed."""
    return any(
        name.startswith("data.") and name not in FREE_SETTINGS for name in changed_settings(manifest.config, now)
    )


def _value(tree: dict[str, Any], name: str) -> Any:
    section, _, key = name.partition(".")
    return tree.get(section, {}).get(key)
