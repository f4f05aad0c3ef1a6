"""Launches, bytes and memory of one decoder layer on CUDA, forward and backward, counted on fake tensors.

Prints the table that ``counts.csv`` holds; ``make count-fakecuda`` runs it.
"""

import contextlib
import copy
import csv
import functools
import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

from relora_mora.adapters.inject import choose_storage, inject
from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.schema import MethodConfig, ModelConfig
from relora_mora.model.causal import LossModel, empty_model, put_values
from relora_mora.model.config import read_model_config
from relora_mora.optim.groups import set_trainable
from tests.fakecuda.watch import AFTER, Kept, Watch, size_of
from tests.tools.helpers import ROOT

SEQUENCES, LENGTH = 16, 512
MODELS = ("llama_250m", "llama_1_3b")
INT8: dict[str, Any] = {"base": "int8", "base_products": True}
METHODS = {
    "frozen": MethodConfig(name="full"),  # the linears do not train: what is left when an adapter costs nothing
    "full": MethodConfig(name="full"),
    "remora operator 1": MethodConfig(name="remora", operators=[1]),
    "remora operator 1 resident": MethodConfig(name="remora", operators=[1], form="resident"),
    "remora operator 1 int8": MethodConfig(name="remora", operators=[1], form="decoupled", **INT8),
    "remora operator 1 int8 resident": MethodConfig(name="remora", operators=[1], form="resident", **INT8),
    "relora": MethodConfig(name="relora"),
    "relora resident": MethodConfig(name="relora", form="resident"),
    "relora int8 resident": MethodConfig(name="relora", form="resident", **INT8),
}
# folding constants looks at values, padding of products is decided by timing them, a program in a cache is not written
NOTHING_RUNS = {"joint_graph_constant_folding": False, "shape_padding": False, "force_disable_caches": True}
LAUNCH = re.compile(r"^\s*(?!#).*?(triton_\w+\.run\(|extern_kernels\.\w+\(|torch\.ops\.(?!aten\.view\.)[\w.]+\()")


@dataclass(frozen=True)
class Counts:
    """Of one layer and micro-batch; MB are 1e6 bytes."""

    model: str
    method: str
    compiled: str  # eager | compiled
    launches: int
    moved_mb: int
    kept_mib: int


def model_with(
    name: str, method: str, layers: int, fake: FakeTensorMode, dtype: torch.dtype = torch.bfloat16, **overrides: int
) -> LossModel:
    """A model on the device, as the trainer builds it, without values."""
    overrides = {"num_hidden_layers": layers, **overrides}
    settings = ModelConfig(config=str(ROOT / f"configs/model/{name}.json"), overrides=overrides)
    lm: LlamaForCausalLM = empty_model(read_model_config(settings))
    if METHODS[method].uses_adapters:
        with torch.device("meta"):
            inject(lm, METHODS[method], seed=0)
        choose_storage(lm, METHODS[method], on_gpu=True)
    set_trainable(lm, METHODS[method])
    if method == "frozen":
        for linear in lm.model.layers.modules():
            if isinstance(linear, nn.Linear):
                linear.requires_grad_(False)
    with fake:
        on_device = {name: torch.empty(p.shape, dtype=dtype, device="cuda") for name, p in lm.named_parameters()}
        put_values(lm, on_device)
        for key, buffer in list(lm.model.rotary_emb.named_buffers()):
            setattr(lm.model.rotary_emb, key, torch.empty(buffer.shape, device="cuda"))
        for _, layer in adapter_layers(lm):
            layer.pack()
            layer.keep_merged()
    return LossModel(lm, passes_boundaries=True)


def eager(name: str, method: str) -> Counts:
    """Two layers less one, so that embeddings and head drop out."""
    watches = []
    kept = []
    for layers in (1, 2):
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        model = model_with(name, method, layers, fake)
        saved = Kept(model)
        with fake, Watch() as watch, saved:
            _step(model)
        watches.append(watch)
        kept.append(saved.bytes)
    one, two = watches
    launches = two.launches.total() - one.launches.total()
    moved = two.bytes.total() - one.bytes.total()
    return Counts(name, method, "eager", launches, round(moved / 1e6), (kept[1] - kept[0]) >> 20)


def compiled(name: str, method: str) -> Counts:
    """What is in the programs that Inductor writes for a layer."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = model_with(name, method, 1, fake)
    programs: list[Program] = []
    torch._dynamo.reset()
    for layer in model.lm.model.layers:
        layer.compile(backend=functools.partial(compile_fx, inner_compile=_count_into(programs)), fullgraph=True)
    with fake, torch._inductor.config.patch(NOTHING_RUNS):
        _step(model)
    launches = sum(program.launches for program in programs)
    moved = sum(program.bytes for program in programs)
    return Counts(
        name, method, "compiled", launches, round(moved / 1e6), max(program.kept for program in programs) >> 20
    )


def _step(model: LossModel) -> None:
    model.train()
    ids = torch.zeros(SEQUENCES, LENGTH, device="cuda", dtype=torch.long)
    model(ids, ids, None).backward()


@dataclass(frozen=True)
class Program:
    launches: int
    bytes: int
    kept: int  # what a forward gives to backward, without parameters and inputs


class _WrittenError(Exception):
    """Inductor has written its program; there is nothing here that could run it."""


def _count_into(programs: list[Program]) -> Any:
    """An inner compiler for Inductor that counts what it would launch and then runs the graph, on fake tensors."""

    def inner(graph: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        with _codegen_alone() as written:
            try:
                compile_fx_inner(copy.deepcopy(graph), inputs, **kwargs)
            except Exception:  # Inductor puts what ended it into errors of its own
                if not written:
                    raise
        [(code, moved)] = written
        body = code[code.index("def call(") :]
        launches = sum(bool(LAUNCH.match(line)) for line in body.splitlines())
        moved -= sum(map(size_of, _only_waited_for(graph)))
        made = _made(graph)
        kept = 0
        if kwargs.get("is_backward"):
            copied = [value for value in made if not value.is_contiguous()]
            launches += len(copied)  # autograd does, before it keeps them as gradients of parameters
            moved += 2 * sum(map(size_of, copied))
        else:
            kept = sum(map(size_of, made))
        programs.append(Program(launches, moved, kept))
        return make_boxed_func(graph.forward)

    return inner


def _only_waited_for(graph: torch.fx.GraphModule) -> list[torch.Tensor]:
    calls = [node for node in graph.graph.nodes if node.target is torch.ops.relora_mora.expand_add.default]
    return [call.args[AFTER].meta["val"] for call in calls if len(call.args) > AFTER]


def _made(graph: torch.fx.GraphModule) -> list[torch.Tensor]:
    """The outputs that are not inputs."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    made = [node for node in output.args[0] if getattr(node, "op", "placeholder") != "placeholder"]
    return [node.meta["val"] for node in made if isinstance(node.meta.get("val"), torch.Tensor)]


@contextlib.contextmanager
def _codegen_alone() -> Iterator[list[tuple[str, int]]]:
    """Ends Inductor's work when (code, bytes it moves) are known."""
    written: list[tuple[str, int]] = []

    def stop(lowering: GraphLowering) -> None:
        code, *_ = lowering.codegen()
        written.append((getattr(code, "value", str(code)), lowering.count_bytes()[0]))
        raise _WrittenError

    with mock.patch.object(GraphLowering, "compile_to_module", stop):
        yield written


def count_methods(name: str, how: str) -> list[Counts]:
    """All methods in one model, ``how``: eager | compiled."""
    torch.autograd.set_multithreading_enabled(False)  # backward in this thread, inside the modes
    count = {"eager": eager, "compiled": compiled}[how]
    return [count(name, method) for method in METHODS]


def as_csv(rows: Sequence[Counts]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Counts)], lineterminator="\n")
    table.writeheader()
    table.writerows(map(asdict, rows))
    return text.getvalue()


if __name__ == "__main__":
    rows = [row for name in MODELS for how in ("eager", "compiled") for row in count_methods(name, how)]
    sys.stdout.write(as_csv(rows))
