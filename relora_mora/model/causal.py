"""Any causal language model that transformers builds: its layers, initial values, hidden states and loss.

Nothing here knows a family of models. What differs between families is asked of the model itself: its layers are those
that transformers checkpoints, its head is tried with random numbers, and ``guard`` compares its loss at the start of a
run. Shapes: ``B`` sequences, ``T`` tokens, ``H`` hidden size, ``V`` vocabulary, ``N = B * T``, ``P`` documents.
"""

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from relora_mora.adapters.inject import decoder_layers
from relora_mora.model.compiling import RECOMPILE_LIMIT, allow_programs
from relora_mora.model.documents import SDPA_OR_DOCUMENTS, documents, needs_no_mask
from relora_mora.model.loss import IGNORE, LossHead, bytes_per_logit, loss_chunk
from relora_mora.system.seeds import derived_seed

SMALL = 2**16  # elements of a parameter whose constructor may compute its value


def build_model(model_config: PreTrainedConfig, *, seed: int, attention: str = "auto") -> PreTrainedModel:
    """A float32 model on the CPU with initial weights that depend only on the seed."""
    lm = empty_model(model_config, attention=attention)
    put_values(lm, initial_values(lm, [name for name, _ in lm.named_parameters()], seed))
    return lm


def empty_model(model_config: PreTrainedConfig, *, attention: str = "auto") -> PreTrainedModel:
    """The model with float32 parameters on the meta device, without values; :func:`put_values` fills them in.

    Constructors run on the CPU, one parameter at a time, since some compute values that nothing else knows. Buffers
    have their values.
    """
    register = nn.Module.register_parameter

    def to_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:
            meta = nn.Parameter(param.detach().to("meta", torch.float32), param.requires_grad)
            meta.built = param.detach().float() if param.numel() <= SMALL else None  # type: ignore[attr-defined]
            module._parameters[name] = meta

    nn.Module.register_parameter = to_meta  # type: ignore[method-assign, assignment]
    try:
        with no_init_weights():
            lm: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(model_config),  # building changes it
                attn_implementation=None if attention == "auto" else attention,
                dtype=torch.float32,
            )
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
    lm.tie_weights()
    for module in lm.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # there is no padding, so the embedding of pad_token_id trains too
    return lm


@torch.no_grad()
def initial_values(lm: PreTrainedModel, names: Iterable[str], seed: int) -> dict[str, Tensor]:
    """The float32 values on the CPU that transformers gives to these parameters of a plain, empty model.

    A value depends only on seed, name and shape, so any rank can draw any parameter, in any order.
    """
    layers = [name for name, _ in decoder_layers(lm)]
    wanted: dict[str, set[str]] = {}  # by the layer, or outside of layers by the module, that is drawn at a time
    for name in names:
        unit = next((layer for layer in layers if name.startswith(f"{layer}.")), name.rpartition(".")[0])
        wanted.setdefault(unit, set()).add(name)
    values: dict[str, Tensor] = {}
    for unit, members in wanted.items():
        values |= _draw(lm, unit, members, seed)
    return values


def _draw(lm: PreTrainedModel, unit: str, wanted: set[str], seed: int) -> dict[str, Tensor]:
    """Values of the parameters ``wanted`` in a layer or module. Parts of a layer may set values of each other."""
    prefix = f"{unit}." if unit else ""
    above = [lm.get_submodule(unit[:at]) for at, char in enumerate(unit) if char == "."]
    whole = lm.get_submodule(unit)
    owner = next(m for m in (whole, *reversed(above), lm) if isinstance(m, PreTrainedModel))
    alone = type(owner)._init_weights is PreTrainedModel._init_weights  # it looks at one module at a time
    part: nn.Module = copy.copy(whole)
    if isinstance(whole, GradientCheckpointingLayer):
        part = copy.deepcopy(whole)
    else:
        part._modules = {}
        part._parameters = dict(whole._parameters)
    built = {name: getattr(parameter, "built", None) for name, parameter in whole.named_parameters()}
    modules = [(f"{prefix}{name}" if name else unit, module) for name, module in part.named_modules()]
    for place, module in modules:
        own = [key for key, old in module._parameters.items() if old is not None]
        if not alone or any(f"{place}.{key}" in wanted for key in own):
            for key in own:
                shape = module.get_parameter(key).shape
                module._parameters[key] = nn.Parameter(torch.full(shape, torch.nan))
    with torch.random.fork_rng(devices=[]):
        for place, module in reversed(modules):  # children first
            key = next((key for key, old in module._parameters.items() if old is not None), "")
            torch.manual_seed(derived_seed(seed, "initial", f"{place}.{key}"))
            owner._init_weights(module)
    values: dict[str, Tensor] = {}
    for name, parameter in part.named_parameters():
        if f"{prefix}{name}" in wanted:
            constructed = built[name]
            if constructed is not None and parameter.isnan().any():
                values[f"{prefix}{name}"] = constructed
            else:
                values[f"{prefix}{name}"] = parameter.detach()
    return values


def put_values(lm: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replaces parameters by name with tensors of any device and dtype; tied parameters stay tied."""
    new = {
        id(old): nn.Parameter(values[name], old.requires_grad) for name, old in lm.named_parameters() if name in values
    }
    for module in lm.modules():
        for key, old in module._parameters.items():
            if id(old) in new:
                module._parameters[key] = new[id(old)]


def ends_of(lm: PreTrainedModel) -> tuple[str, str]:
    """The names of the embeddings' and the head's weight in a state dict; they may be the same tensor."""
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    names = {module: name for name, module in lm.named_modules()}
    embedding, head = (f"{names[module]}.weight" for module in ends)
    return embedding, head


def body_of(lm: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """The model without its head, and its name in ``lm``; some classes have a wrong ``base_model_prefix``."""
    inside = [(name, module) for name, module in lm.named_children() if isinstance(module, PreTrainedModel)]
    return next((each for each in inside if each[0] == lm.base_model_prefix), inside[0])


class _Result(dict[str, Any]):
    """What a base model returns: ``result[0]`` and ``result.last_hidden_state`` are the hidden states."""

    def __getattr__(self, key: str) -> Any:
        return self.get(key)

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key == 0 else super().__getitem__(key)


def own_logits(lm: PreTrainedModel, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
    """hidden [1, N, H] -> logits [1, N, V] as the family computes them: scaled, capped, with biases.

    ``head`` replaces the output head.
    """
    shadow = copy.copy(lm)
    body = nn.Module()
    result = _Result(last_hidden_state=hidden)
    body.forward = lambda *args, **settings: result  # type: ignore[method-assign]
    shadow._modules = dict(lm._modules) | {body_of(lm)[0]: body}
    if head is not None:
        own = lm.get_output_embeddings()
        shadow._modules |= {key: head for key, module in lm._modules.items() if module is own}
    nothing = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    logits: Tensor = shadow(input_ids=nothing, use_cache=False).logits
    return logits


@torch.no_grad()
def head_scale(lm: PreTrainedModel) -> tuple[bool, float | None]:
    """Whether :func:`own_logits` works, and the s of a head that computes ``s W h``; None if it does more.

    Needs no weights: it tries a small random head.
    """
    own = lm.get_output_embeddings()
    multiplies_only = type(own) in (nn.Linear, LossHead) and getattr(own, "bias", None) is None
    generator = torch.Generator().manual_seed(0)
    width = own.weight.shape[1]
    small = nn.Linear(width, 5, bias=False)
    small.weight.copy_(torch.randn(small.weight.shape, generator=generator))
    hidden = torch.randn(1, 7, width, generator=generator)
    try:
        near, far = (own_logits(lm, factor * hidden, small) / factor for factor in (1.0, 100.0))
    except Exception:  # a forward that does more than call body and head
        return False, None
    if near.shape[-1] != 5:  # the head is somewhere inside
        return True, None
    plain = small(hidden)
    scale = round(float((near * plain).sum() / plain.square().sum()), 6)
    same = all(torch.allclose(each, scale * plain, rtol=1e-4, atol=1e-4 * abs(scale)) for each in (near, far))
    return True, scale if same and multiplies_only else None


class LossModel(nn.Module):
    """A causal LM with its loss.

    The body is transformers' own forward. A head that computes ``s W h`` is fused with the loss; otherwise the loss is
    computed from chunks of the family's own logits, or if that does not work either, from all logits at once.
    With ``compiled``, torch.compile compiles each decoder layer as one program. With
    ``passes_boundaries``, layers pass the boundaries of documents on to their attention, which saves a mask on a GPU.
    """

    def __init__(self, lm: PreTrainedModel, *, compiled: bool = False, passes_boundaries: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.passes_boundaries = passes_boundaries
        self.in_chunks, self.scale = head_scale(lm)
        if self.scale is not None:
            lm.set_output_embeddings(LossHead(lm.get_output_embeddings()))
        if lm.config._attn_implementation == "sdpa":
            lm.config._attn_implementation = SDPA_OR_DOCUMENTS
        self.takes = inspect.signature(body_of(lm)[1].forward).parameters
        self.compiled = compiled
        if compiled:
            allow_programs(RECOMPILE_LIMIT)
            for _, layer in decoder_layers(lm):  # at its first use, for each shape and operator
                layer.compile(dynamic=False)

    def forward(
        self, input_ids: Tensor, labels: Tensor, boundaries: Tensor | None = None, tokens: float | None = None
    ) -> Tensor:
        """input_ids [B, T] and labels [B, T] (already shifted; -100 is not scored) -> the loss in nats / ``tokens``.

        Without ``tokens``, it is the mean over the scored tokens. With boundaries [P + 1]
        (:func:`document_boundaries`), every document sees only itself, from position 0, as if it were the only one.
        """
        if self.scale is not None:
            hidden = self.hidden(input_ids, boundaries)
            hidden = hidden if self.scale == 1 else hidden * self.scale
            loss: Tensor = self.lm.get_output_embeddings()(hidden, labels, tokens)
            return loss
        scored = (labels != IGNORE).sum().clamp(min=1) if tokens is None else tokens
        if not self.in_chunks:
            logits = self._call(self.lm, input_ids, boundaries).logits
            return _summed(logits.flatten(0, 1), labels.flatten()) / scored
        hidden = self.hidden(input_ids, boundaries).flatten(0, 1)
        vocabulary = len(self.lm.get_output_embeddings().weight)
        logit_bytes = bytes_per_logit(hidden.dtype, in_place=False)
        chunk = loss_chunk(len(hidden), vocabulary, 2 * logit_bytes, on_gpu=hidden.is_cuda)
        pieces = zip(hidden.split(chunk), labels.flatten().split(chunk), strict=True)
        losses = [checkpoint(self._loss_of_piece, *piece, use_reentrant=False) for piece in pieces]
        return torch.stack(losses).sum() / scored

    def _loss_of_piece(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return _summed(own_logits(self.lm, hidden.unsqueeze(0))[0], labels)

    def hidden(self, input_ids: Tensor, boundaries: Tensor | None) -> Tensor:
        """input_ids [B, T] -> [B, T, H] by the base model of transformers."""
        result: Tensor = self._call(body_of(self.lm)[1], input_ids, boundaries)[0]
        return result

    def _call(self, model: PreTrainedModel, input_ids: Tensor, boundaries: Tensor | None) -> Any:
        given: dict[str, Any] = {"use_cache": False} if "use_cache" in self.takes else {}
        flash = boundaries is not None and self.passes_boundaries and needs_no_mask(self.lm, input_ids.device)
        if flash:
            given["boundaries"] = boundaries
            if self.compiled:  # one program for any number of documents
                torch._dynamo.mark_dynamic(boundaries, 0)
        with documents(boundaries, input_ids.shape, flash=flash) as positions:
            if positions is not None and "position_ids" in self.takes:
                given["position_ids"] = positions
            return model(input_ids=input_ids, **given)


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
