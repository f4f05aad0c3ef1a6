"""Adapters in a model and a training loop that know nothing about this package."""

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from relora_mora.adapters.inject import replace_linears, watch_callers
from relora_mora.adapters.layers import AdapterLinear, adapter_layers, adapter_parameters, layer_generator
from relora_mora.adapters.mora import operator_in_use, set_operators
from relora_mora.adapters.scope import reset_scopes
from relora_mora.config.registry import ScheduleKind
from relora_mora.config.schema import MethodConfig
from relora_mora.engine.merging import MergeError, Merger, MergeRecord
from relora_mora.engine.protocol import Engine
from relora_mora.engine.torch_state import TorchState, rank_and_size
from relora_mora.library.masters import LoopMasters, is_sharded, merged_values, plain_copy
from relora_mora.library.rates import Rewarmed, check_rates, optimizer_groups, rate_of_step, rewarming_groups
from relora_mora.library.state import check_state, identity_of, read_state, write_state
from relora_mora.library.targets import describe_targets, target_linears
from relora_mora.schedule import Schedule
from relora_mora.system.logs import log

ENDLESS = 2**62  # steps


def attach(
    model: nn.Module,
    method: MethodConfig,
    *,
    seed: int = 0,
    targets: str | Sequence[str] | None = None,
    process_group: Any = None,
) -> "AttachedAdapters":
    """Replaces linears of ``model`` with adapter layers in place, whose weights are frozen.

    ``method`` is what :func:`LoRA`, :func:`ReLoRA`, :func:`MoRA` or :func:`ReMoRA` returns. ``targets`` chooses the
    linears: a regular expression that the whole name must match, or a list of names or of their last parts, such as
    ``["q_proj"]``; None means all but the output head, if it can be recognized. The log and the result's ``repr`` say
    which linears were replaced. All other parameters keep their ``requires_grad``. The adapters
    are float32. All random values come from ``seed`` and the names of the layers.

    Call it before DDP, ``fully_shard`` or ``deepspeed.initialize``, and make the optimizer afterwards. With several
    ranks, all ranks of ``process_group`` (default: all) train this model.

    Raises ValueError if a target matches nothing or cannot have an adapter, or if an operator does not fit a layer.
    """
    if not isinstance(method, MethodConfig):
        raise ValueError(f"method: expected what ReMoRA(...) or another method returns, got {method!r}")
    if any(True for _ in adapter_layers(model)):
        raise ValueError("the model has adapters already; attach() once")
    seed = int(seed)  # also of numpy, which JSON cannot save
    names = target_linears(model, targets)
    kinds = {name.rpartition(".")[2] for name in names}
    unknown = [kind for kind in method.rank_pattern if kind not in kinds]
    if unknown:
        raise ValueError(f"rank_pattern: no target is named {', '.join(unknown)}; they are {', '.join(sorted(kinds))}")
    for name, layer in replace_linears(model, names, method, seed=seed).items():
        generator = layer_generator(seed, name, 0)
        for key in layer.adapter_names:
            value = layer.fresh(key, generator).to(layer.weight.device)
            setattr(layer, key, nn.Parameter(value))
        layer.train(model.training)
    watch_callers(model)
    remora = AttachedAdapters(model, method, seed, process_group)
    if hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = remora.save_pretrained
    text, is_doubtful = describe_targets(model)
    log.log(logging.WARNING if is_doubtful else logging.INFO, text)
    return remora


class AttachedAdapters:
    """The adapters of a model: their parameter groups, rates, merges and state. Made by :func:`attach`.

    ``step`` is the number of optimizer steps done. ``skipped`` counts those that accelerate or DeepSpeed left out
    because a gradient in float16 had overflowed.
    """

    def __init__(self, model: nn.Module, method: MethodConfig, seed: int, process_group: Any) -> None:
        self.model = model
        self.method = method
        self.seed = seed
        self.step = 0
        self.skipped = 0
        self.process_group = process_group
        self.merges_done = 0
        self.clock = Schedule(
            kind="constant",
            total_steps=ENDLESS,
            warmup_steps=0,
            min_ratio=1.0,
            merge_every=method.merge_every if method.merges else 0,
            merge_until_step=method.merge_until_step,
            operators=method.cycle,
        )
        self._checked = False
        self._owes_merge = False

    def __repr__(self) -> str:
        return f"<AttachedAdapters: {self.method.name}, step {self.step}, {describe_targets(self.model)[0]}>"

    @functools.cached_property
    def _masters(self) -> LoopMasters:
        """Made at its first use, when ``torch.distributed`` has been initialized."""
        return LoopMasters([f"{name}.weight" for name in self.layers], *rank_and_size(self.process_group))

    @property
    def layers(self) -> dict[str, AdapterLinear]:
        """The adapter layers by name."""
        return dict(adapter_layers(self.model))

    @property
    def names(self) -> list[str]:
        """The names of the adapters' parameters in the model."""
        return list(adapter_parameters(self.model))

    @property
    def operator(self) -> int | None:
        """The operator in use, or None for LoRA."""
        return operator_in_use(self.model)

    def parameter_groups(
        self, lr: float, lr_other: float | None = None, *, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """The parameters that train, for a torch optimizer: adapters at ``lr``, all others at ``lr_other`` (or ``lr``).

        Norms, biases and other vectors have no weight decay. Raises ValueError if weights of adapter layers train.
        """
        return optimizer_groups(self.model, lr, lr if lr_other is None else lr_other, weight_decay)

    def schedule(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        warmup_steps: int,
        restart_warmup_steps: int = 0,
        kind: ScheduleKind = "cosine",
        min_ratio: float = 0.1,
        decay_steps: int = 0,
        rewarm: Literal["all", "adapters"] = "all",
    ) -> LambdaLR:
        """The schedule of the trainer: a warmup, a decay to ``min_ratio``, and a warmup after each merge.

        ``kind`` is ``cosine``, ``linear``, ``wsd`` (``decay_steps`` long) or ``constant``. ``rewarm`` says which groups
        warm up after a merge. All lengths are in optimizer steps. There is no merge after the last step, which
        :meth:`merged` makes anyway. Call ``step()`` of the result after each step of the optimizer.
        """
        groups = rewarming_groups(optimizer, rewarm, self.model)
        clock = self._set_clock(
            kind=kind,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            min_ratio=min_ratio,
            decay_steps=decay_steps,
            restart_warmup_steps=restart_warmup_steps,
        )
        return LambdaLR(optimizer, [rate_of_step(clock, rewarm=group) for group in groups])

    def _set_clock(self, *, restart_warmup_steps: int, **changes: Any) -> Schedule:
        steps = restart_warmup_steps if self.method.merges else 0
        clock = dataclasses.replace(self.clock, restart_warmup_steps=steps, **changes)
        check_rates(clock)
        self.clock = clock
        return clock

    def rewarm(
        self,
        scheduler: LambdaLR,
        *,
        total_steps: int,
        restart_warmup_steps: int,
        rewarm: Literal["all", "adapters"] = "all",
    ) -> None:
        """Adds a warmup after each merge to the schedule of somebody else, such as the one of Hugging Face's Trainer.

        Raises ValueError for a scheduler that is not a ``LambdaLR``: the others compute a rate from the one before.
        """
        clock = self._set_clock(total_steps=total_steps, restart_warmup_steps=restart_warmup_steps)
        if not clock.restart_warmup_steps:
            return
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"a warmup after merges needs a LambdaLR, got {type(scheduler).__name__}; use schedule(), or "
                "restart_warmup_steps=0"
            )
        groups = rewarming_groups(scheduler.optimizer, rewarm, self.model)
        scheduler.lr_lambdas = [
            rate_of_step(Rewarmed(**vars(clock), curve=curve), rewarm=group)
            for curve, group in zip(scheduler.lr_lambdas, groups, strict=True)
        ]

    def after_step(self, optimizer: Any) -> MergeRecord | None:
        """Call it after every step of ``optimizer``: merges, switches the operator and resets the state when it is due.

        ``optimizer`` is the one that trains the model; with DeepSpeed, its engine or the engine's optimizer. Returns
        what a merge did. With several ranks, all of them call it. A step that was skipped because a gradient in
        float16 had overflowed does not count: accelerate and DeepSpeed leave it out of their schedules, too.

        Raises ValueError at the first step if the optimizer cannot be reset, and :class:`MergeError` if a merge cannot
        be made.
        """
        if optimizer is None:
            raise ValueError("after_step() needs the optimizer that trains the model, got None")
        reset_scopes(self.model)
        if self._owes_merge:
            raise ValueError("the run that is continued left out the merge after its last step; call catch_up() first")
        if _was_skipped(optimizer):
            self.skipped += 1
            return None
        self.step += 1
        if not self._checked:
            self._engine(optimizer)
            self._checked = True
        return self._merge(optimizer) if self.clock.merge_after(self.step) else None

    def catch_up(self, optimizer: Any, schedule: LRScheduler) -> MergeRecord | None:
        """Call it after :meth:`load` to continue a finished run for more steps than it had.

        Makes the merge that the run left out because it came after its last step, and returns what it did; None if
        there is none. Sets the rates of the next step, which the run computed from its own length, if ``schedule`` is a
        ``LambdaLR``: the others compute a rate from the one before.
        """
        owes, self._owes_merge = self._owes_merge, False
        record = self._merge(optimizer) if owes else None
        if not isinstance(schedule, LambdaLR):
            return record
        rates = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, peak, multiplier in rates:
            group["lr"] = peak * multiplier(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
        return record

    def _merge(self, optimizer: Any) -> MergeRecord:
        engine = self._engine(optimizer)
        self._masters.prepare(engine)
        merger = Merger(engine, self._masters, self.method, seed=self.seed)
        done = self.clock.merges_done(self.step)
        try:
            record = merger.merge(self.step, done, self.clock.operator(self.step))
        except MergeError:
            raise
        except Exception as error:
            raise MergeError(
                f"step {self.step}: the merge stopped halfway, so base and adapters no longer fit together, and the "
                f"model is unusable; go back to an earlier checkpoint ({type(error).__name__}: {error})"
            ) from error
        self.merges_done = merger.merges_done
        return record

    def _engine(self, optimizer: Any) -> Engine:
        """How merges see the model and what trains it; without an optimizer they can only read."""
        while type(optimizer).__module__.startswith("accelerate."):
            optimizer = optimizer.optimizer
        if type(optimizer).__name__ == "DeepSpeedEngine":
            optimizer = optimizer.optimizer
        if type(optimizer).__module__.startswith("deepspeed.runtime."):
            from relora_mora.engine.zero_state import UserZero  # which imports DeepSpeed

            return UserZero(self.model, optimizer, self.names)
        if optimizer is None and any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            raise ValueError("DeepSpeed has sharded the model: give the engine, as in after_step()")
        engine = TorchState(self.model, optimizer, self.names, self.process_group)
        if optimizer is not None and self.method.merges:
            engine.check_state(self.method.reset)
        return engine

    @torch.no_grad()
    def merged_state_dict(self, optimizer: Any = None) -> dict[str, Tensor]:
        """The state of the model without adapters, ``W + delta`` rounded once to the dtype of W; a collective.

        If the model is sharded, only the first rank gets it, in host memory. With DeepSpeed it needs ``optimizer``, as
        in :meth:`after_step`.
        """
        held = self.model.state_dict(keep_vars=True)
        return merged_values(held, self._engine(optimizer), self._masters)

    @torch.no_grad()
    def merged(self, optimizer: Any = None) -> nn.Module:
        """A copy of the model with plain linears; see :meth:`merged_state_dict`. Raises ValueError if it is sharded."""
        if is_sharded(self._engine(optimizer)):
            raise ValueError("the model is sharded: load merged_state_dict() into a new model on the first rank")
        return plain_copy(self.model, self.merged_state_dict(optimizer))

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """In place of the method of a transformers model, which would leave out the delta since the last merge.

        Writes the merged model. A checkpoint of the Trainer, which gives the folder ``checkpoint-<step>`` and the
        state, gets weights and adapters as they are, because a resume continues from it. Raises ValueError if the ranks
        have to merge together.
        """
        if "state_dict" in options and re.fullmatch(r"checkpoint-\d+", Path(save_directory).name):
            as_it_is: Any = type(self.model)
            as_it_is.save_pretrained(self.model, save_directory, **options)
            return
        engine = self._engine(None)
        if engine.world_size > 1 and (is_sharded(engine) or self._masters.kept):
            raise ValueError(
                f"{save_directory}: save_pretrained() is called on one rank, and the adapters of this model can only "
                "be merged on all ranks together; call merged() or merged_state_dict() on all of them, and save its "
                "result"
            )
        options.pop("state_dict", None)
        merged: Any = self.merged()
        merged.save_pretrained(save_directory, *arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the model has, whose ``save_pretrained()`` is ours: no process group, which has no copies."""
        return {**vars(self), "process_group": None}

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides the states of the model and its optimizer; a collective.

        ``base`` has the float32 values of frozen weights that the model itself does not have exactly, on the first
        rank.
        """
        engine = TorchState(self.model, None, self.names, self.process_group)
        base: dict[str, Tensor] = {}
        for name in self._masters.kept:
            value = self._masters.exact(name, engine)
            if engine.rank == 0:
                base[name] = value.cpu()
            del value  # only one weight at a time is whole on a device
        return {
            **identity_of(self.method, self.seed, self.layers),
            "step": self.step,
            "skipped": self.skipped,
            "total_steps": self.clock.total_steps,
            "merges_done": self.merges_done,
            "operator": self.operator,
            "base": base,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the state that was saved together with the model's and the optimizer's.

        Call it after these are loaded, and after :meth:`schedule` if there is one. Raises ValueError if the state
        belongs to other adapters (method, seed, rank, alpha, operators, targets, dtype of the weights, ...) or to
        another course of merges; nothing changes then.
        """
        layers = self.layers
        self._owes_merge = check_state(state, identity_of(self.method, self.seed, layers), self.clock, layers)
        self.step = int(state["step"])
        self.skipped = int(state["skipped"])
        self.merges_done = state["merges_done"]
        set_operators(self.model, state["operator"])
        self._masters.load(state["base"])

    def save(self, folder: str | Path) -> None:
        """Writes :meth:`state_dict` to ``remora.safetensors`` in a folder, on the first rank; a collective."""
        state = self.state_dict()
        if self._masters.rank == 0:
            write_state(Path(folder), state)

    def load(self, folder: str | Path) -> None:
        """Reads what :meth:`save` has written. Raises FileNotFoundError if there is nothing."""
        self.load_state_dict(read_state(Path(folder)))


def _was_skipped(optimizer: Any) -> bool:
    """Whether accelerate's wrapper, or DeepSpeed's engine or optimizer, has just left out a step."""
    if type(optimizer).__name__ == "DeepSpeedEngine":
        return not optimizer.was_step_applied()
    return bool(getattr(optimizer, "step_was_skipped", False) or getattr(optimizer, "overflow", False))
