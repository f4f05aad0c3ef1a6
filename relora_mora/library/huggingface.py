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
        remora = self.remora
        if remora.step and not state.global_step:
            raise ValueError(f"the adapters have made {remora.step} steps already; attach() to a new model")
        if remora.trained_in is state:
            raise ValueError("the Trainer has two ReMoRACallbacks for one model; remove one, or merges come too often")
        remora.trained_in = state
        scheduler = getattr(parts["lr_scheduler"], "scheduler", parts["lr_scheduler"])
        remora.rewarm(scheduler, total_steps=state.max_steps, restart_warmup_steps=self.restart_warmup_steps)
        if state.global_step:
            remora.load(self.checkpoint or args.resume_from_checkpoint or _folder(args, state.global_step))
            if remora.step + remora.skipped != state.global_step:  # the Trainer counts skipped steps
                raise ValueError(
                    f"the state of the adapters is of step {remora.step + remora.skipped}, the Trainer's is of step "
                    f"{state.global_step}; give the folder of both: ReMoRACallback(remora, checkpoint=...)"
                )
            remora.catch_up(parts["optimizer"], scheduler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Merges if it is due."""
        record = self.remora.after_step(parts["optimizer"])
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
