"""One part of a step by itself: ``loss`` (head and cross-entropy) or ``attention``, in each implementation that was
tried, or the matrix ``products`` of the linears, in int8 too, and of MoRA's gradient.

python -m launch.benchmark parts loss configs/model/llama_130m.json [--tokens=4096] [--dtype=bf16] [--threads=2]
    [--device=cuda]
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from launch.benchmark.device import chosen_device, seconds_of
from launch.benchmark.turns import medians, take_turns
from relora_mora import kernels
from relora_mora.adapters.mora import layer_square_size
from relora_mora.adapters.stored import OLDEST, EightBits
from relora_mora.cli.arguments import PositiveInt
from relora_mora.config.schema import MethodConfig, ModelConfig
from relora_mora.model.config import attention_widths, read_model_config
from relora_mora.model.loss import chunked_cross_entropy
from relora_mora.system.hardware import device_name
from relora_mora.system.process import keep_freed_memory

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Draw = Callable[..., Tensor]  # draws a random tensor of a shape
Ways = dict[str, tuple[Callable[[], object], float]]  # (the computation, its FLOPs or 0 if unknown) by name


def main(
    part: str,
    model: str,
    *,
    tokens: PositiveInt = 4096,
    sequence_length: PositiveInt = 512,
    dtype: str = "bf16",
    threads: PositiveInt | None = None,
    repetitions: PositiveInt = 7,
    device: str | None = None,
) -> None:
    """Prints milliseconds of each implementation, its ratio to the first, and the same as one line of JSON.

    Loss and attention are measured forward and backward.

    The implementations take turns, and the median of each counts.

    Args:
        part: loss, attention or products
        model: a model's JSON file such as configs/model/llama_130m.json
        tokens: tokens of a micro-batch
        sequence_length: tokens of a sequence
        dtype: bf16 or fp32
        threads: threads of torch; default: torch's choice
        repetitions: turns of each implementation, after one that does not count
        device: cpu or cuda; default: the device that a run would use here
    """
    if part not in PARTS:
        raise ValueError(f"got {part}, expected one of {', '.join(PARTS)}, followed by a model's JSON file")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: got {dtype}, expected {' or '.join(DTYPES)}")
    if tokens % sequence_length:
        raise ValueError(f"--tokens: {tokens} is not a multiple of --sequence_length {sequence_length}")
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()  # as in training
    place = chosen_device(device)
    draw = draws(DTYPES[dtype], place)
    ways = PARTS[part](read_model_config(ModelConfig(config=model)), tokens, sequence_length, draw)
    measures = {name: partial(seconds_of, act, place) for name, (act, _) in ways.items()}
    seconds = medians(list(take_turns(measures, rounds=repetitions, warmup=1)))
    milliseconds = {name: 1000 * value for name, value in seconds.items()}
    first = next(iter(milliseconds.values()))
    print(
        f"{part} on {device_name()}: {tokens:,} tokens, {dtype}, {torch.get_num_threads()} threads; "
        f"kernels: {kernels.describe(place.type)}"
    )
    for name, value in milliseconds.items():
        rate = f"{ways[name][1] / value / 1e9:8.3f} TFLOP/s" if ways[name][1] else ""
        print(f"{name:42}{value:10.3f} ms {value / first:8.3f}{rate}")
    ratios = {name: value / first for name, value in milliseconds.items()}
    print(json.dumps({"part": part, "device": device_name(), "milliseconds": milliseconds, "ratio": ratios}))


def draws(dtype: torch.dtype, device: torch.device) -> Draw:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)


def loss_ways(model: PreTrainedConfig, tokens: int, sequence_length: int, draw: Draw) -> Ways:
    """Head and cross-entropy, from hidden states [N, H] to their gradients and those of the head [V, H]."""
    hidden = draw(tokens, model.hidden_size).requires_grad_()
    weight = draw(model.vocab_size, model.hidden_size).mul_(0.02).requires_grad_()
    labels = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(hidden.device) % model.vocab_size
    d_logits = draw(tokens, model.vocab_size)

    def products() -> None:
        with torch.no_grad():
            hidden @ weight.T, d_logits @ weight, d_logits.T @ hidden

    def ours() -> None:
        torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels), (hidden, weight))

    def ours_in_torch() -> None:
        with kernels.disabled():
            ours()

    def whole() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight).float(), labels), (hidden, weight))

    return {
        "only the three products": (products, 6.0 * hidden.numel() * model.vocab_size),
        "in parts, compiled kernel (the default)": (ours, 0.0),
        "in parts, torch operations": (ours_in_torch, 0.0),
        "whole logits in float32, like transformers": (whole, 0.0),
    }


def attention_ways(model: PreTrainedConfig, tokens: int, sequence_length: int, draw: Draw) -> Ways:
    """Causal attention of one layer, without its projections; q, k, v [B, heads, T, D]."""
    heads = model.num_attention_heads
    shape = (tokens // sequence_length, sequence_length, heads, attention_widths(model)[0] // heads)
    q, k, v = (draw(*shape).transpose(1, 2).requires_grad_() for _ in range(3))
    d_out = draw(*shape).transpose(1, 2)

    def backward(of: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(of(), (q, k, v), d_out)

    def products() -> None:
        """The arithmetic of the unmasked half: two products forward, five backward (scores are recomputed)."""
        half = sequence_length // 2
        with torch.no_grad():
            scores = q @ k[..., :half, :].mT
            for _ in range(2):
                q @ k[..., :half, :].mT
            for _ in range(2):
                scores @ v[..., :half, :]
            for _ in range(2):
                scores.mT @ d_out

    def blocks(size: int, attend: Callable[[Tensor, int, int], Tensor]) -> Callable[[], Tensor]:
        starts = range(0, sequence_length, size)
        return lambda: torch.cat(
            [attend(q[..., a : a + size, :], a, min(a + size, sequence_length)) for a in starts], -2
        )

    def masked(size: int, end: int, start: int) -> Tensor:
        return torch.ones(size, end, dtype=torch.bool, device=q.device).tril(start)

    def of_torch(queries: Tensor, start: int, end: int) -> Tensor:
        mask = masked(queries.shape[-2], end, start)
        return F.scaled_dot_product_attention(queries, k[..., :end, :], v[..., :end, :], attn_mask=mask)

    def written_out(queries: Tensor, start: int, end: int) -> Tensor:
        scores = (queries / math.sqrt(queries.shape[-1])) @ k[..., :end, :].mT
        scores = scores.masked_fill(~masked(queries.shape[-2], end, start), -math.inf)
        return F.softmax(scores, -1) @ v[..., :end, :]

    return {
        "the products of the unmasked half": (products, 7.0 * q.numel() * sequence_length),
        "torch (what the model uses)": (backward(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)), 0.0),
        "torch, for blocks of 256 queries": (backward(blocks(256, of_torch)), 0.0),
        "written out, for blocks of 128 queries": (backward(blocks(128, written_out)), 0.0),
        "written out, all queries at once": (backward(blocks(sequence_length, written_out)), 0.0),
    }


def product_ways(model: PreTrainedConfig, tokens: int, sequence_length: int, draw: Draw) -> Ways:
    """The products of each linear shape: forward, its gradients, and the square matrix's gradient (D^T dy)^T (C x).

    The first two again in int8, if the device has such products.
    """
    method = MethodConfig()
    ways: Ways = {}
    queries, _ = attention_widths(model)
    for inputs, outputs in sorted({(model.hidden_size, queries), (model.hidden_size, model.intermediate_size)}):
        size = layer_square_size(method, inputs, outputs)
        sizes = ((tokens, inputs), (outputs, inputs), (tokens, outputs), (tokens, size), (tokens, size))
        x, weight, dy, compressed, reduced = (draw(*shape) for shape in sizes)
        flops = 2.0 * tokens * inputs * outputs
        shape = f"{inputs} -> {outputs}"
        ways |= {
            f"{shape}: x W^T": (partial(torch.matmul, x, weight.T), flops),
            f"{shape}: dy W": (partial(torch.matmul, dy, weight), flops),
            f"{shape}: dW, if it trains": (partial(torch.matmul, dy.T, x), flops),
            f"{shape}: dM, R = {size}": (partial(torch.matmul, reduced.T, compressed), 2.0 * tokens * size**2),
        }
        if not x.is_cuda or torch.cuda.get_device_capability() >= OLDEST["int8"]:
            ways |= {f"{shape}: {name}": (act, flops) for name, act in _int8_products(x, weight, dy).items()}
    return ways


def _int8_products(x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, Callable[[], object]]:
    """W x and W^T dy with the passes that quantize x or dy and scale the sums, and a product by itself."""
    form = EightBits.of("int8", *weight.shape, multiplies=True, on_gpu=x.is_cuda)
    stored = form.encode(weight)
    values, _ = form.parts(stored)
    quantized, _ = kernels.quantize_rows(x, values.dtype, padded=values.shape[1])
    return {
        "x W^T in int8, with its passes": partial(form.linear, x, stored),
        "its product by itself": partial(torch._int_mm, quantized, values.mT),
        "dy W in int8, with its passes": partial(form.linear_transposed, dy, stored),
    }


PARTS: dict[str, Callable[[PreTrainedConfig, int, int, Draw], Ways]] = {
    "loss": loss_ways,
    "attention": attention_ways,
    "products": product_ways,
}
