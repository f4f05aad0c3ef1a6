"""Derivatives, traces and copies of a model with adapters agree with those of its merged copy, or are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import relora_mora as rm
from tests.tools.each import each

X, V = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))


def model_of(operator: int, form: str) -> tuple[nn.Module, nn.Module]:
    """A model with adapters (``operator`` 0: LoRA), and its merged copy."""
    torch.manual_seed(0)
    method = rm.MoRA(4, operator=operator, square_multiple=2, form=form) if operator else rm.LoRA(4, form=form)
    remora = rm.attach(nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 40)), method)
    for name in remora.names:
        nn.init.normal_(remora.model.get_parameter(name), std=0.2)
    return remora.model, remora.merged()


def dual(f: Callable[[Tensor], Tensor]) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, V))).tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "jvp": lambda f: torch.func.jvp(f, (X,), (V,))[1],
    "dual": dual,
    "jacfwd": lambda f: torch.func.jacfwd(f)(X),
    "jacrev": lambda f: torch.func.jacrev(f)(X),
    "vmap": lambda f: torch.func.vmap(f)(X),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).square().sum())(X[:1]),
}


@each("operator", [0, 1, 2, 3, 4, 6])
@each("name", TRANSFORMS)
def test_the_decoupled_form_has_every_derivative(name: str, operator: int) -> None:
    model, plain = model_of(operator, "decoupled")
    transform = TRANSFORMS[name]
    torch.testing.assert_close(transform(model), transform(plain), rtol=1e-4, atol=1e-4)


@each("operator", [0, 1])
def test_the_merged_form_refuses_what_it_does_not_have(operator: int) -> None:
    model, _ = model_of(operator, "merged")
    for name in ("jvp", "dual"):
        with pytest.raises((RuntimeError, NotImplementedError), match="autograd"):
            TRANSFORMS[name](model)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@each("form", ["decoupled", "merged", "auto"])
def test_a_trace_computes_what_the_model_computes(form: str) -> None:
    model, plain = model_of(1, form)
    torch.testing.assert_close(torch.jit.trace(model, X)(V), plain(V), rtol=1e-4, atol=1e-4)
