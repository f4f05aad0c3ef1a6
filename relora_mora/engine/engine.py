"""The rest of the program's view of a DeepSpeed engine: steps, and masters, optimizer state and weights by name."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.schema import TrainConfig
from relora_mora.engine.matrices import CutMatrices
from relora_mora.engine.start import deepspeed_settings, quiet
from relora_mora.engine.zero_state import ZeroState
from relora_mora.optim.groups import MatrixAdamW, create_state
from relora_mora.optim.rules import MatrixRule, MatrixState, shapes_of
from relora_mora.system.hardware import uses_cuda
from relora_mora.system.seeds import derived_seed

ZERO_SUPPORTED_OPTIMIZERS.append(MatrixAdamW)


class StepDone(NamedTuple):
    """The result of one optimizer step."""

    loss: float  # as passed to the step
    grad_norm: float  # over all parameters, before clipping
    applied: bool  # the same on all ranks


class ZeroEngine(ZeroState):
    """Trains ``module`` on any ZeRO stage.

    ``lm`` is the causal LM inside ``module``, and parameters have their names in it. The masters are exactly the
    float32 values that the trainable parameters have before DeepSpeed casts them. Gradients are clipped to the norm
    ``clip``; 0 means no clipping.
    """

    lm: PreTrainedModel

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
        self.clip = clip
        self.bf16 = bf16
        shapes = {name: parameter.shape for name, parameter in lm.named_parameters()}
        for name, layer in adapter_layers(lm):
            shapes[f"{name}.weight"] = torch.Size((layer.out_features, layer.in_features))  # not of what is stored
            layer.pack()
        parameters = dict(lm.named_parameters())
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.groups: dict[str, list[str]] = {  # the optimizer's, with the names of their parameters
            group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups
        }
        self.moments: dict[str, tuple[str, ...]] = {
            name: group["moments"] for group in optimizer.param_groups for name in self.groups[group["name"]]
        }
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        # in float32, DeepSpeed may reuse the storage of the parameters
        initial = {name: p.data if bf16 else p.data.clone() for name, p in trained.items()}
        elements = sum(shapes[name].numel() for name in self.moments)
        settings = deepspeed_settings(
            train, dist.get_world_size(), clip=clip, bf16=bf16, trainable=elements, on_gpu=uses_cuda()
        )
        with quiet():
            self.deepspeed, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        super().__init__(lm, self.deepspeed.optimizer, shapes, train.zero_stage)
        for part in self.fragments:
            create_state(self.optimizer, part.flat, self.moments[part.name])
        self.matrix_states: dict[str, MatrixState] = {}  # only for the matrices that this rank updates
        self.matrix_shapes: dict[str, dict[str, list[int]]] = {}  # for all matrices that have a state
        if isinstance(self.optimizer, MatrixAdamW):
            self._add_matrices(self.optimizer, train.seed)
        self.clear_state(trained.keys())  # DeepSpeed's wrapper for stage 0 in bf16 has made a step of zero gradients
        self.write_masters(initial)

    def _add_matrices(self, optimizer: MatrixAdamW, seed: int) -> None:
        """Gives the optimizer access to whole matrices, and creates the states of those that this rank updates."""
        ranks = range(self.world_size) if self.stage else [self.rank]  # at stage 0 each rank has everything
        fragments = [part for rank in ranks for part in self.fragments_of_rank(rank)]
        of_rule: dict[MatrixRule, list[str]] = {}
        for group, members in self.groups.items():
            if group in optimizer.rules:
                of_rule.setdefault(optimizer.rules[group], []).extend(members)
        for rule, names in of_rule.items():
            matrices = CutMatrices(names, fragments, self.shapes, rank=self.rank, world_size=self.world_size)
            shapes = {name: shapes_of(rule, *self.shapes[name]) for name in names}
            for name in matrices.owned:
                self.matrix_states[name] = MatrixState(derived_seed(seed, name), shapes[name], self.device)
            self.matrix_shapes |= {
                name: {key: list(shape) for key, shape in kept.items()} for name, kept in shapes.items() if kept
            }
            optimizer.matrices[rule] = matrices.replace
        optimizer.states = self.matrix_states

    def moments_of(self, name: str) -> Sequence[str]:
        return self.moments[name]

    @torch.no_grad()
    def clear_state(self, names: Set[str]) -> None:
        """Zeroes the optimizer state of these parameters: moments, step counts and the states of matrices.

        All other parameters must be in other groups of the optimizer: a flat master has one step count.
        """
        states: list[Mapping[str, Tensor]] = [self.state_of(flat) for flat in self.flats(names)]
        states += [state for name, state in self.matrix_states.items() if name in names]
        for value in itertools.chain(*(state.values() for state in states)):
            value.zero_()

    def group_steps(self) -> dict[str, int]:
        """AdamW's step count of each group: 0 if it has another rule, -1 if this rank owns nothing of it."""
        counts = {}
        for group, members in self.groups.items():
            flats = self.flats(set(members))
            counts[group] = int(self.state_of(flats[0])["step"].item()) if flats else -1
        return counts

    def set_group_steps(self, counts: Mapping[str, int]) -> None:
        """Sets AdamW's step count of each group."""
        for group, members in self.groups.items():
            for flat in self.flats(set(members)):
                self.state_of(flat)["step"].fill_(counts[group])

    def pieces(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """All that this rank holds of masters and optimizer state: views by kind, parameter and first element.

        The kinds are ``master``, the names of moments, and those of the states of whole matrices, which begin at 0.
        """
        for part in self.fragments:
            yield "master", part.name, part.start, part.of(part.flat.detach())
            for kind in self.moments[part.name]:
                yield kind, part.name, part.start, part.of(self.state_of(part.flat)[kind])
        for name, matrix in self.matrix_states.items():
            for kind, value in matrix.items():
                yield kind, name, 0, value

    def __call__(self, *inputs: Tensor | float | None) -> Tensor:
        """The module's forward: see :class:`relora_mora.model.causal.LossModel`."""
        self.keep_merged()
        return self.deepspeed(*inputs)

    def keep_merged(self) -> None:
        """Builds ``W + delta`` in the resident layers that do not have it yet."""
        for layer in self.layers.values():
            layer.keep_merged()

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

        If the gradients' norm is not finite, DeepSpeed skips the step on all ranks and leaves everything unchanged.
        """
        self.drop_merged()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.stage == 0 and not self.bf16:  # DeepSpeed does not wrap our optimizer
            norm = self._plain_step()
        else:
            self.deepspeed.step()
            norm = float(self.deepspeed.get_global_grad_norm())
        return StepDone(loss.item(), norm, applied=norm < math.inf)

    def _plain_step(self) -> float:
        """Clips and skips as DeepSpeed does, which steps here with whatever gradients there are; returns their norm."""
        gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in gradients])).item()
        scale = self.clip / (norm + 1e-6)
        if not norm < math.inf:
            self.deepspeed.zero_grad()  # torch's optimizer does nothing without gradients
        elif self.clip and scale < 1:
            for gradient in gradients:
                gradient *= scale
        self.deepspeed.step()
        return norm if norm < math.inf else math.inf
