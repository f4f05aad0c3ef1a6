"""The rest of the program's view of a DeepSpeed engine: steps, and masters, optimizer state and weights by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.schema import TrainConfig
from relora_mora.distributed.waiting import collective
from relora_mora.engine.masters import Fragment, owned_fragments, update_parameters
from relora_mora.engine.matrices import CutMatrices
from relora_mora.engine.norms import gradient_norms, replaced, step_with_norms
from relora_mora.engine.slices import MergedSlices
from relora_mora.engine.start import allow_optimizer, deepspeed_settings, quiet
from relora_mora.optim.groups import MATRIX_GROUPS, MatrixAdamW, state_of
from relora_mora.optim.rules import COUNT, MatrixState
from relora_mora.system.hardware import uses_cuda
from relora_mora.system.seeds import derived_seed


class StepDone(NamedTuple):
    """The result of one optimizer step."""

    loss: float  # as passed to the step
    grad_norm: float  # over all parameters, before clipping
    applied: bool  # the same on all ranks


class ZeroEngine:
    """Trains ``module`` on any ZeRO stage. Resets, merges and checkpoints only use its ``fragments``.

    ``lm`` is the causal LM inside ``module``, and parameters have their names in it. The masters are exactly the
    float32 values that the trainable parameters have before DeepSpeed casts them. Gradients are clipped to the norm
    ``clip``; 0 means no clipping.
    """

    def __init__(
        self,
        module: nn.Module,
        lm: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        train: TrainConfig,
        *,
        clip: float,
        bf16: bool,
    ) -> None:
        self.module = module
        self.lm = lm
        self.stage = train.zero_stage
        self.clip = clip
        self.bf16 = bf16
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.parameters: dict[str, nn.Parameter] = dict(lm.named_parameters())
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.group_names = [group["name"] for group in optimizer.param_groups]
        self.members = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        self.moments: dict[str, tuple[str, ...]] = {  # names of the optimizer state of each trainable parameter
            name: group["moments"]
            for group, members in zip(optimizer.param_groups, self.members, strict=True)
            for name in members
        }
        trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        # in float32, DeepSpeed may reuse the storage of the parameters
        initial = {name: p.data if bf16 else p.data.clone() for name, p in trained.items()}
        elements = sum(self.shapes[name].numel() for group in self.members for name in group)
        settings = deepspeed_settings(
            train, self.world_size, clip=clip, bf16=bf16, trainable=elements, on_gpu=uses_cuda()
        )
        allow_optimizer(type(optimizer))
        with quiet():
            self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.device = self.deepspeed.device
        self.adapters = [layer for _, layer in adapter_layers(lm)]
        for layer in self.adapters:
            layer.gathered = train.zero_stage == 3
        resident = [layer for layer in self.adapters if layer.resident]
        self.slices = MergedSlices(resident, self.deepspeed.optimizer, self.rank)
        self.fragments = self._fragments(self.rank)
        self.fragments_of: dict[str, list[Fragment]] = {}
        for fragment in self.fragments:
            self.fragments_of.setdefault(fragment.name, []).append(fragment)
        self.moments_of_flat = {id(part.flat): self.moments[part.name] for part in self.fragments}
        self.matrix_states: dict[str, MatrixState] = {}  # only for the matrices that this rank updates
        self.matrix_shapes: dict[str, dict[str, list[int]]] = {}  # for all matrices that have a state
        if isinstance(self.optimizer, MatrixAdamW):
            self._add_matrices(self.optimizer, train.seed)
        self.clear_state()
        self.write_masters(initial)

    def _add_matrices(self, optimizer: MatrixAdamW, seed: int) -> None:
        """Gives the optimizer access to whole matrices, and creates the states of those that this rank updates."""
        groups = zip(self.group_names, self.members, strict=True)
        names = [name for group, members in groups if group in MATRIX_GROUPS for name in members]
        ranks = range(self.world_size) if self.stage else [self.rank]  # at stage 0 each rank has everything
        fragments = {rank: self._fragments(rank) for rank in ranks}
        matrices = CutMatrices(names, fragments, self.shapes, rank=self.rank, world_size=self.world_size)
        state_shapes = {name: optimizer.rule.state_shapes(*self.shapes[name]) for name in names}
        for name in matrices.owned:
            # the host reads the counts, so they stay in its memory
            tensors = {
                key: torch.zeros(shape, dtype=torch.float32, device="cpu" if key == COUNT else self.device)
                for key, shape in state_shapes[name].items()
            }
            self.matrix_states[name] = MatrixState(derived_seed(seed, name), tensors)
        self.matrix_shapes = {
            name: {key: list(shape) for key, shape in shapes.items()} for name, shapes in state_shapes.items() if shapes
        }
        optimizer.states = self.matrix_states
        optimizer.matrices = matrices

    def _fragments(self, rank: int) -> list[Fragment]:
        """The fragments that a rank owns. Those of another rank refer to the flat tensors of this one."""
        return list(owned_fragments(self.deepspeed.optimizer, self.members, self.parameters, self.shapes, rank))

    # ---- masters and optimizer state --------------------------------------------------------------------------

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer, whose state is keyed by the flat masters."""
        optimizer = self.deepspeed.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def flats(self, group: str | None = None) -> list[Tensor]:
        """The flat masters of one parameter group (default: of all groups), each once."""
        names = set(self.parameters if group is None else self.members[self.group_names.index(group)])
        return list({id(part.flat): part.flat for part in self.fragments if part.name in names}.values())

    def state_of(self, flat: Tensor) -> dict[str, Tensor]:
        """Moments and ``step`` of a flat master. They are zeros if the optimizer has not created them yet."""
        return state_of(self.optimizer, flat, self.moments_of_flat[id(flat)])

    @torch.no_grad()
    def clear_state(self, group: str | None = None) -> None:
        """Zeroes the optimizer state of a parameter group (default: of all): moments, counts, states of matrices.

        A new engine needs this too: DeepSpeed's wrapper for stage 0 in bf16 starts with one step of zero gradients.
        """
        for flat in self.flats(group):
            for value in self.state_of(flat).values():
                value.zero_()
        cleared = self.parameters if group is None else self.members[self.group_names.index(group)]
        for name in self.matrix_states.keys() & set(cleared):
            for value in self.matrix_states[name].tensors.values():
                value.zero_()

    def group_steps(self) -> dict[str, int]:
        """Adam's step count of each group: 0 if it has another rule, -1 if this rank owns nothing of it."""
        counts = {}
        for group in self.group_names:
            flats = self.flats(group)
            counts[group] = int(self.state_of(flats[0])["step"].item()) if flats else -1
        return counts

    @torch.no_grad()
    def write_masters(self, values: Mapping[str, Tensor]) -> None:
        """Sets masters from whole float32 parameters, the same on every rank, and then parameters from masters."""
        for name, value in values.items():
            self.scatter(name, value)
        self.refresh()

    @torch.no_grad()
    def scatter(self, name: str, value: Tensor, key: str | None = None) -> int:
        """Writes this rank's fragments of a whole value to the master of a parameter, or to its moment ``key``.

        Returns the number of elements written. Call :meth:`refresh` afterwards to update the parameters.
        """
        written = 0
        for fragment in self.fragments_of.get(name, ()):
            target = fragment.flat if key is None else self.state_of(fragment.flat)[key]
            piece = value.reshape(-1)[fragment.start : fragment.start + fragment.numel]
            fragment.of(target).copy_(piece, non_blocking=True)  # does not wait if the value is in host memory
            written += fragment.numel
        return written

    def refresh(self) -> None:
        """Updates the parameters from the masters."""
        self.drop_merged()
        update_parameters(self.deepspeed.optimizer)

    @torch.no_grad()
    def gather(self, name: str, key: str | None = None, to: int | None = None) -> Tensor:
        """The whole float32 master of a trainable parameter, or its moment ``key``; a collective.

        With ``to``, only that rank gets the value; what the others get is undefined. The masters of frozen weights are
        not here: :class:`relora_mora.engine.merging.FrozenMasters` has them.
        """
        assert any(name in group for group in self.members), f"{name} is frozen"
        whole = torch.zeros(self.shapes[name].numel(), dtype=torch.float32, device=self.device)
        for fragment in self.fragments_of.get(name, ()):
            source = fragment.flat if key is None else self.state_of(fragment.flat)[key]
            whole[fragment.start : fragment.start + fragment.numel] = fragment.of(source)
        if self.world_size > 1 and self.stage > 0:
            # every element has one owner, and adding the zeros of the other ranks keeps its bits
            if to is None:
                dist.all_reduce(whole)
            else:
                dist.reduce(whole, dst=to)
        return whole.view(self.shapes[name])

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in host memory. The host waits for the other ranks; ``values`` is overwritten."""
        if self.world_size == 1:
            return values.cpu()
        with collective():
            dist.all_reduce(values)
            return values.cpu()

    def broadcast(self, value: Tensor, src: int) -> None:
        """Copies the value of rank ``src`` to every rank, in place; a collective."""
        if self.world_size > 1:
            dist.broadcast(value, src=src)

    def sum_over_ranks(self, value: float) -> float:
        """The sum of a number over the ranks, exact for integers up to 2^53."""
        return float(self.all_reduce(torch.tensor(value, dtype=torch.float64, device=self.device)))

    # ---- frozen weights ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def write_weight(self, name: str, value: Tensor | None, owner: int) -> None:
        """Sets a frozen weight on all ranks from its owner's float32 value; a collective."""
        self.drop_merged()
        parameter = self.parameters[name]
        if self.stage == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=owner):
                if self.rank == owner:
                    assert value is not None
                    parameter.data.copy_(value)
            return
        if self.rank == owner:
            assert value is not None
            parameter.data.copy_(value)
        self.broadcast(parameter.data, owner)

    # ---- steps ------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The module's forward: see :class:`relora_mora.model.llama.LossModel`."""
        self.keep_merged()
        return self.deepspeed(*inputs)

    def keep_merged(self) -> None:
        """Builds ``W + delta`` in the resident layers that do not have it yet; at stage 3 a collective."""
        if self.stage == 3:
            self.slices.keep()
            return
        for layer in self.adapters:
            layer.keep_merged()

    def drop_merged(self) -> None:
        """Drops every ``W + delta`` of the resident layers; call it before their values change."""
        if self.stage == 3:
            self.slices.drop()
            return
        for layer in self.adapters:
            layer.drop_merged()

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Backward of one micro-batch. After the ``last`` one of a step, :meth:`step` uses the averaged gradients."""
        self.deepspeed.backward(loss)
        if not last:
            self.deepspeed.step()  # counts the micro-batch

    def step(self, rates: list[float], loss: Tensor) -> StepDone:
        """One optimizer step with a learning rate per group. ``loss`` [] is on the device; the host reads it here.

        The host reads the loss together with the norm of the gradients, before the optimizer runs. This is the only
        time in a step that the host waits for a value from the device. If the norm is not finite, all ranks skip the
        step, on every stage: torch's optimizer does nothing, and DeepSpeed writes the parameters unchanged.
        """
        self.drop_merged()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        plain = self.stage == 0 and not self.bf16  # DeepSpeed does not wrap our optimizer
        gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None] if plain else []
        if plain:
            parts = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
            norms = torch.linalg.vector_norm(parts).view(1)
        else:
            norms = gradient_norms(self.deepspeed.optimizer)
        with collective():  # on a GPU, the host waits for the other ranks here
            *norms_on_host, mean = torch.cat([norms.double(), loss.double().view(1)]).cpu().tolist()
        if not all(0 <= norm < math.inf for norm in norms_on_host):
            with replaced(self.optimizer, "step", lambda: None):
                self._deepspeed_step(torch.ones(len(norms_on_host), dtype=norms.dtype))
            return StepDone(mean, math.inf, applied=False)
        if plain:
            scale = self.clip / (norms_on_host[0] + 1e-6)
            if self.clip and scale < 1:
                for gradient in gradients:
                    gradient *= scale
        self._deepspeed_step(torch.tensor(norms_on_host, dtype=norms.dtype))
        norm = norms_on_host[0] if plain else float(self.deepspeed.get_global_grad_norm())
        return StepDone(mean, norm, applied=True)

    def _deepspeed_step(self, norms: Tensor) -> None:
        """DeepSpeed's step with these norms [n] on the host."""
        if self.stage == 0 and not self.bf16:
            self.deepspeed.step()
            return
        with step_with_norms(self.deepspeed.optimizer, norms):
            self.deepspeed.step()
