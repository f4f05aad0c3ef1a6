"""ReMoRA in the Trainer of Hugging Face's transformers."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from relora_mora.library.attached import AttachedAdapters
from relora_mora.system.logs import log


class ReMoRACallback(TrainerCallback):
    """Makes the merges of ``remora``, the result of :func:`relora_mora.attach`, while a Trainer trains its model.

    The learning rate warms up over ``restart_warmup_steps`` after each merge, on top of the Trainer's own schedule: by
    default over 50 steps, or half of ``merge_every`` if that is less.

    A checkpoint of the Trainer also gets ``remora.safetensors``, and a resume reads it from ``checkpoint``: by default
    ``args.resume_from_checkpoint``, or the folder of that step in ``args.output_dir``.

    With DeepSpeed, give the Trainer ``optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params":
    remora.parameter_groups(lr=...)})``: the Trainer's own groups mix adapters with other parameters.
    """

    def __init__(
        self, remora: AttachedAdapters, *, restart_warmup_steps: int | None = None, checkpoint: str | Path | None = None
    ) -> None:
        self.remora = remora
        if restart_warmup_steps is None:
            restart_warmup_steps = min(50, remora.method.merge_every // 2)
        self.restart_warmup_steps = restart_warmup_steps
        self.checkpoint = checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any
    ) -> None:
        """Adds the warmups to the schedule, and continues from a checkpoint if the Trainer does."""
        scheduler = getattr(parts["lr_scheduler"], "scheduler", parts["lr_scheduler"])
        self.remora.rewarm(scheduler, total_steps=state.max_steps, restart_warmup_steps=self.restart_warmup_steps)
        if state.global_step:
            self.remora.load(self.checkpoint or args.resume_from_checkpoint or _folder(args, state.global_step))
        self._check_step(state)
        if state.global_step:
            self.remora.catch_up(parts["optimizer"], scheduler)

    def _check_step(self, state: TrainerState) -> None:
        """Raises ValueError unless the adapters have made as many steps as the Trainer."""
        made = self.remora.step + self.remora.skipped  # the Trainer counts skipped steps
        if made != state.global_step:
            raise ValueError(
                f"the adapters have made {made} steps and the Trainer {state.global_step}, so merges would come at the "
                "wrong time; give the Trainer one ReMoRACallback, attach() to a new model for a new run, and resume "
                "both from one folder: ReMoRACallback(remora, checkpoint=...)"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Merges if it is due."""
        record = self.remora.after_step(parts["optimizer"])
        self._check_step(state)
        if record is not None:
            log.info("step %d: merged %s", state.global_step, record.summary())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Writes the state of the adapters next to that of the model."""
        self.remora.save(_folder(args, state.global_step))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Goes back with the model if the Trainer has loaded its best checkpoint."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.remora.load(state.best_model_checkpoint)


def _folder(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{step}"
