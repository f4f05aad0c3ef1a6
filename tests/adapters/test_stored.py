"""Adapter layers with a frozen weight in 8 bits: values and gradients against float64 with the same rounding."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from relora_mora.adapters.inject import layer_class
from relora_mora.adapters.layers import AdapterLinear
from relora_mora.adapters.stored import EightBits, with_products
from relora_mora.config.load import ConfigError
from relora_mora.config.registry import OPERATORS
from relora_mora.config.schema import MethodConfig
from tests.tools.each import each

IN, OUT, TOKENS = 96, 160, 29
LARGEST = {"int8": 127.0, "fp8": 448.0}
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def _layer(kind: str, form: str, stored: EightBits | None, *, operator: int = 1) -> AdapterLinear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(OUT, IN, generator=generator) * 0.05)
        linear.bias.copy_(torch.randn(OUT, generator=generator))
    linear.weight.requires_grad_(False)
    method = MethodConfig(name=kind, rank=8, square_size=50, operators=[operator], form=form)
    layer = layer_class(method)(linear, method, generator)
    name, size = ("lora_B", 0.02) if kind == "lora" else ("mora_M", 0.01)
    parameter = layer.get_parameter(name)
    parameter.data = torch.randn(parameter.shape, generator=generator) * size
    if stored is not None:
        layer.stored = stored
        layer.pack()
    return layer


def _eight(kind: str, *, multiplies: bool = True, on_gpu: bool = False) -> EightBits:
    return EightBits(kind, OUT, IN, multiplies=multiplies, on_gpu=on_gpu)


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, IN, generator=generator)
    return x.requires_grad_(), torch.randn(TOKENS, OUT, generator=generator)


def _rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x [n, m] after a round trip through 8 bits with a scale per row, in float64."""
    scale = x.float().abs().amax(1, keepdim=True) / LARGEST[kind]
    values = x.float() * (1 / scale)
    values = values.round() if kind == "int8" else values.to(DTYPES[kind]).float()
    return values.double() * scale.double()


CASES = [(kind, form, base) for kind in ("lora", "mora") for form in ("resident", "decoupled") for base in LARGEST]


@each("kind,form,base", CASES)
def test_values_and_gradients_are_those_of_the_rounded_factors(kind, form, base, device):
    if base == "fp8" and device.type == "cuda":
        pytest.skip("on a GPU, the results of fp8 products are in bf16")
    layer = _layer(kind, form, _eight(base, on_gpu=device.type == "cuda")).to(device)
    layer.keep_merged()
    x, dy = _inputs()
    on_device = x.detach().to(device).requires_grad_()
    y = layer(on_device)
    y.backward(dy.to(device))
    y, x.grad = y.cpu(), on_device.grad.cpu()
    layer = layer.cpu()

    plain = _layer(kind, "decoupled", None)
    parameters = [p.detach().double() for name, p in plain.named_parameters() if p.requires_grad and name != "bias"]
    delta = plain.delta_of(*parameters)
    stored = _rounded(plain.weight.detach(), base)
    scale = (stored + delta if form == "resident" else stored).float().abs().amax(1) / LARGEST[base]
    weight = _rounded((stored + delta).float(), base) if form == "resident" else stored
    added = torch.zeros_like(delta) if form == "resident" else delta
    rounded_x = _rounded(x.detach(), base)
    expected_y = rounded_x @ weight.T + x.detach().double() @ added.T + plain.bias.detach().double()
    # the scale of an output feature multiplies dy before dy is rounded
    rounded_dy = _rounded(dy * scale, base) / scale.double()
    expected_dx = rounded_dy @ weight + dy.double() @ added
    torch.testing.assert_close(y.double(), expected_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), expected_dx, rtol=1e-4, atol=1e-4)

    exact = _layer(kind, "decoupled", None)
    other, _ = _inputs()
    exact(other).backward(dy)
    for name in layer.adapter_names:  # computed from the x and dy that are not rounded
        torch.testing.assert_close(layer.get_parameter(name).grad, exact.get_parameter(name).grad, rtol=1e-4, atol=1e-4)
    distance = (y - exact(other)).norm() / y.norm()
    assert 1e-4 < distance < (0.02 if base == "int8" else 0.06)


@each("operator", OPERATORS)
@each("multiplies", [True, False])
def test_forms_agree_for_every_operator(operator, multiplies):
    x, dy = _inputs()
    found = []
    for form in ("decoupled", "resident" if multiplies else "merged"):
        layer = _layer("mora", form, _eight("int8", multiplies=multiplies), operator=operator)
        layer.keep_merged()
        x.grad = None
        y = layer(x)
        y.backward(dy)
        found.append([y.detach(), x.grad.clone(), layer.mora_M.grad])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < (0.02 if multiplies else 1e-5) * one.norm()


@each("base", LARGEST)
def test_a_stored_weight_takes_one_byte_and_survives_padding(base):
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    odd = EightBits(base, OUT - 3, IN - 1, multiplies=True, on_gpu=True)
    padded = odd.encode(weight[:-3, :-1])
    values, _ = odd.parts(padded)
    assert values.shape == (OUT, IN)
    assert not values[-3:].float().any()
    assert not values[:, -1:].float().any()
    plain = EightBits(base, OUT - 3, IN - 1, multiplies=True, on_gpu=False)
    stored = plain.encode(weight[:-3, :-1])
    assert torch.equal(plain.dense(stored, torch.float32), odd.dense(padded, torch.float32))
    assert stored.nbytes == plain.empty(weight).nbytes <= (OUT - 3) * (IN - 1) + 4 * (OUT - 3) + 15
    assert torch.equal(stored, plain.encode(plain.dense(stored, torch.float32))), "rounding twice changes nothing"
    x = torch.randn(5, IN - 1, generator=torch.Generator().manual_seed(3))
    assert torch.equal(plain.linear(x, stored), odd.linear(x, padded))
    dy = torch.randn(5, OUT - 3, generator=torch.Generator().manual_seed(4))
    assert torch.equal(plain.linear_transposed(dy, stored), odd.linear_transposed(dy, padded))


@each("form", ["resident", "decoupled"])
def test_there_are_no_second_derivatives(form):
    layer = _layer("mora", form, _eight("int8"))
    layer.keep_merged()
    x, _ = _inputs()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


# base, form, bf16, capability of the GPU (None: a CPU), AVX512-VNNI; whether products are faster in 8 bits, and refused
MACHINES = [
    ("int8", "auto", True, None, True, True, False),
    ("int8", "auto", True, None, False, False, False),
    ("int8", "merged", True, None, True, False, False),
    ("int8", "resident", True, None, False, True, False),
    ("fp8", "auto", True, None, True, False, False),
    ("int8", "auto", True, (7, 5), True, False, True),
    ("int8", "auto", False, (8, 0), False, True, False),
    ("fp8", "auto", True, (8, 6), True, False, True),
    ("fp8", "auto", True, (8, 9), False, True, False),
    ("fp8", "auto", True, (10, 0), False, True, False),
    ("fp8", "auto", False, (9, 0), True, False, True),
]


@each("base,form,bf16,capability,vnni,faster,refused", MACHINES)
def test_auto_multiplies_in_8_bits_if_that_is_faster_and_a_gpu_that_cannot_is_refused(
    base, form, bf16, capability, vnni, faster, refused
):
    method = MethodConfig(base=base, form=form)
    chosen, reason = with_products(method, bf16=bf16, capability=capability, vnni=vnni)
    assert chosen == method.model_copy(update={"base_products": faster})
    assert reason
    for given in (True, False):
        explicit = method.model_copy(update={"base_products": given})
        with pytest.raises(ConfigError, match=r"method\.base") if refused and given else nullcontext():
            assert with_products(explicit, bf16=bf16, capability=capability, vnni=vnni) == (explicit, None)
