"""The resident form at ZeRO-3. No rank holds a whole weight, so each builds its own slice of ``W + delta``.

DeepSpeed gathers a parameter from the slices of the ranks: ``ds_tensor`` [n], elements n rank to n (rank + 1) of the
flat parameter, padded at its end. This module replaces W there, so that a gather yields ``W + delta``,
and keeps W.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from relora_mora.adapters.layers import AdapterLinear
from relora_mora.adapters.stored import PLAIN
from relora_mora.engine.internals import GATHER_STREAM, ZeroParamStatus
from relora_mora.system.hardware import uses_cuda

TOGETHER = 7  # linear layers whose adapters are gathered at once: a decoder layer has as many


class MergedSlices:
    """Replaces W by ``W + delta`` in this rank's slices of the ``layers``, and puts W back.

    ``optimizer`` is DeepSpeed's.
    """

    def __init__(self, layers: Sequence[AdapterLinear], optimizer: Any, rank: int) -> None:
        self.layers = layers
        self.optimizer = optimizer
        self.rank = rank
        self.bases: list[Tensor] = []  # this rank's slice of W for each layer, while W + delta replaces it

    @torch.no_grad()
    def keep(self) -> None:
        """Builds ``W + delta`` unless it exists; a collective, since a delta needs whole adapters."""
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
        """Puts W back if ``W + delta`` replaces it."""
        if self.bases:
            for layer, base in zip(self.layers, self.bases, strict=False):  # after an error there may be fewer
                _replace(layer, base, in_place=False)
            self.bases = []
            self._release()

    def _put(self, layers: Sequence[AdapterLinear]) -> None:
        parameters = [getattr(layer, name) for layer in layers for name in layer.adapter_names]
        parameters += [layer.weight for layer in layers if layer.stored != PLAIN]
        with _gathered([parameter for parameter in parameters if not _is_whole(parameter)]):
            merged = [self._merged(layer) for layer in layers]
        self.bases += [_replace(layer, values, in_place=True) for layer, values in zip(layers, merged, strict=True)]

    def _merged(self, layer: AdapterLinear) -> Tensor:
        """``W + delta`` for this rank's slice. If W is not stored as it is, all of W is here.

        Otherwise the rest of the weight that the slice is computed with is arbitrary.
        """
        base_weight: Any = layer.weight
        slice_of_base = base_weight.ds_tensor.data
        size = slice_of_base.numel()
        elements = base_weight.ds_shape.numel()
        begin = min(size * self.rank, elements)
        end = min(begin + size, elements)
        if layer.stored == PLAIN:
            weight = slice_of_base.new_empty(layer.out_features, layer.in_features)
            weight.view(-1)[begin:end] = slice_of_base[: end - begin]
        else:
            weight = base_weight.data
        merged = slice_of_base.clone()  # with its padding
        merged[: end - begin] = layer.build_stored(weight).view(-1)[begin:end]
        return merged

    def _release(self) -> None:
        """Partitions weights that are whole on this rank, since their values are out of date now."""
        whole: list[Any] = [layer.weight for layer in self.layers if _is_whole(layer.weight)]
        if whole:
            whole[0].partition(whole)

    def _before_gathers(self) -> None:
        """Makes DeepSpeed's gathers, which have their own stream, wait until this stream has written the slices.

        By itself DeepSpeed only waits when it gathers persistent parameters after a step.
        """
        if uses_cuda():
            coordinator = self.optimizer.parameter_offload.get_param_coordinator()
            getattr(coordinator, GATHER_STREAM).wait_stream(torch.cuda.current_stream())


@contextlib.contextmanager
def _gathered(parameters: list[Any]) -> Iterator[None]:
    """The parameters are whole inside. DeepSpeed's own ``GatheredParameters`` makes the host wait for the device."""
    if not parameters:
        yield
        return
    parameters[0].all_gather_coalesced(parameters).wait()
    try:
        yield
    finally:
        parameters[0].partition(parameters)


def _is_whole(parameter: Any) -> bool:
    """Whether this rank has all of it. Small parameters stay whole between their uses."""
    return parameter.ds_status is ZeroParamStatus.AVAILABLE


def _replace(layer: AdapterLinear, values: Tensor, *, in_place: bool) -> Tensor:
    """Sets this rank's slice of a weight and returns the previous one."""
    weight: Any = layer.weight
    before = weight.ds_tensor.data
    weight.ds_tensor.data = values
    layer.in_place = in_place
    return before
