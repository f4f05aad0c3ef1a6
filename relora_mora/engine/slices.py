"""The resident form at ZeRO-3, where no rank holds a whole weight: each builds its own slice of ``W + delta``.

DeepSpeed makes a parameter whole from the slices that the ranks have of it: ``ds_tensor`` [n], elements n rank to
n (rank + 1) of the flat parameter, padded at its end (DeepSpeed 0.19). With ``W + delta`` in place of W there, whoever
gathers the weight gets that, and only this module knows W.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor

from relora_mora.adapters.layers import AdapterLinear
from relora_mora.system.hardware import uses_cuda

TOGETHER = 7  # layers whose adapters are gathered at a time, as many as a decoder layer has


class MergedSlices:
    """Puts ``W + delta`` in place of W in this rank's slices of the ``layers``, and W back.

    ``optimizer`` is DeepSpeed's.
    """

    def __init__(self, layers: Sequence[AdapterLinear], optimizer: Any, rank: int) -> None:
        self.layers = layers
        self.optimizer = optimizer
        self.rank = rank
        self.bases: list[Tensor] = []  # slices of W, layer by layer, while their places hold W + delta

    @torch.no_grad()
    def keep(self) -> None:
        """Builds ``W + delta`` unless it is there; a collective, since a delta needs whole adapters."""
        self._before_gathers()
        if self.bases or not self.layers:
            return
        try:
            for start in range(0, len(self.layers), TOGETHER):
                self._put(self.layers[start : start + TOGETHER])
        except BaseException:
            self.drop()
            raise
        self._release()
        self._before_gathers()

    def drop(self) -> None:
        """Puts W back unless it is there."""
        if self.bases:
            for layer, base in zip(self.layers, self.bases, strict=False):  # an error may have left fewer
                _replace(layer, base, in_place=False)
            self.bases = []
            self._release()

    def _put(self, layers: Sequence[AdapterLinear]) -> None:
        parameters = [getattr(layer, name) for layer in layers for name in layer.adapter_names]
        with _gathered([parameter for parameter in parameters if not _is_whole(parameter)]):
            merged = [self._merged(layer) for layer in layers]
        self.bases += [_replace(layer, values, in_place=True) for layer, values in zip(layers, merged, strict=True)]

    def _merged(self, layer: AdapterLinear) -> Tensor:
        """``W + delta`` of this rank's slice. What others have is arbitrary in the weight that it is built with."""
        slice_of_base = _slice(layer)
        size = slice_of_base.numel()
        elements = layer.out_features * layer.in_features
        begin = min(size * self.rank, elements)
        end = min(begin + size, elements)
        weight = slice_of_base.new_empty(layer.out_features, layer.in_features)
        weight.view(-1)[begin:end] = slice_of_base[: end - begin]
        merged = slice_of_base.clone()  # with its padding
        merged[: end - begin] = layer.build_merged(weight).view(-1)[begin:end]
        return merged

    def _release(self) -> None:
        """Parts with weights that are whole on this rank, as they are now another matrix."""
        whole: list[Any] = [layer.weight for layer in self.layers if _is_whole(layer.weight)]
        if whole:
            whole[0].partition(whole)

    def _before_gathers(self) -> None:
        """Has DeepSpeed's gathers, on a stream of their own, find what this one writes into the slices.

        They do not wait for it themselves, but where DeepSpeed gathers persistent parameters after a step.
        """
        if uses_cuda():
            coordinator = self.optimizer.parameter_offload.get_param_coordinator()
            gathers = getattr(coordinator, "_PartitionedParameterCoordinator__allgather_stream", None)
            writes = torch.cuda.current_stream()
            if gathers is None:  # another DeepSpeed
                writes.synchronize()
            else:
                gathers.wait_stream(writes)


@contextlib.contextmanager
def _gathered(parameters: list[Any]) -> Iterator[None]:
    """They are whole inside. DeepSpeed's own ``GatheredParameters`` has the host wait for the device."""
    if not parameters:
        yield
        return
    parameters[0].all_gather_coalesced(parameters).wait()
    try:
        yield
    finally:
        parameters[0].partition(parameters)


def _is_whole(parameter: Any) -> bool:
    """Whether this rank has all of it, as of small parameters between their uses too."""
    return parameter.ds_status is ZeroParamStatus.AVAILABLE


def _slice(layer: AdapterLinear) -> Tensor:
    weight: Any = layer.weight
    return weight.ds_tensor.data


def _replace(layer: AdapterLinear, values: Tensor, *, in_place: bool) -> Tensor:
    """Another slice of a weight; returns the one that was there."""
    weight: Any = layer.weight
    before = weight.ds_tensor.data
    weight.ds_tensor.data = values
    layer.in_place = in_place
    return before
