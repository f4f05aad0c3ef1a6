"""What of a trainer goes into a checkpoint; ``Trainer.begin_at`` takes it up again."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from relora_mora.checkpoint import Manifest
from relora_mora.model.config import plain_model_config

if TYPE_CHECKING:
    from relora_mora.train.loop import Trainer


def manifest_of(trainer: Trainer) -> Manifest:
    """The manifest of the present step, without files and the place in the data; a collective."""
    return Manifest(
        step=trainer.step,
        merges_done=trainer.schedule.merges_done(trainer.step),
        operator=trainer.run.merger.operator(),
        world_size=trainer.world_size,
        zero_stage=trainer.config.train.zero_stage,
        bf16=trainer.checked.bf16,
        group_steps=trainer.engine.group_steps(),
        parameters={name: list(trainer.engine.shapes[name]) for names in trainer.engine.members for name in names},
        frozen={name: list(trainer.engine.shapes[name]) for name in trainer.run.base.owner},
        config=trainer.config.model_dump(mode="json"),
        model_config=plain_model_config(trainer.checked.model_config),
        tokenizer_fingerprint=trainer.checked.tokenizer_fingerprint,
        data_fingerprint=trainer.checked.data_fingerprint,
        data_content=trainer.checked.data_content,
        eos_token_id=trainer.checked.tokenizer.eos_token_id,
        data_order=trainer.checked.data_order,
        data_state={},
        counters=counters_of(trainer),
        files={},
    )


def counters_of(trainer: Trainer) -> dict[str, Any]:
    """What the run has counted, and what is about to happen to it; a collective."""
    config = trainer.config
    due = trainer.is_due(config.eval.every_steps) or trainer.step == config.train.steps
    return {
        "tokens": trainer.tokens,
        "skipped_steps": trainer.skipped,
        **asdict(trainer.health),
        "trouble": trainer.trouble,
        "interval": trainer.interval.state(trainer.world_size),
        "rollbacks": trainer.rollbacks,
        "evaluated": trainer.evaluated == trainer.step or not due,
    }
