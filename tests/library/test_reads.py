"""Models that multiply with the weights of their linears themselves: they train, and merges keep their function."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import relora_mora as rm
from tests.tools.each import each

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """A decoder with the weight of its encoder: called and read."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 5, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x).tanh(), self.encoder[0].weight.T)


class Reads(nn.Module):
    """As Mamba's dt_proj: only read, by the module around it."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        assert self.proj.weight.dtype == x.dtype  # as T5 asks
        return x @ self.proj.weight.T + self.proj.bias


def encoder() -> nn.Module:
    """Its attention reads the weight of ``out_proj``."""
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)


@each("make", [Tied, Reads, encoder])
@each("method", [rm.ReMoRA(2, merge_every=2), rm.ReLoRA(2, merge_every=2)])
def test_a_weight_that_is_read_trains_and_merges(make: Callable[[], nn.Module], method: object) -> None:
    torch.manual_seed(0)
    remora = rm.attach(make().train(), method)  # type: ignore[arg-type]
    model = remora.model
    optimizer = torch.optim.AdamW(remora.parameter_groups(lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        assert not [name for name in remora.names if model.get_parameter(name).grad is None]
        optimizer.step()
        before = model(X)
        remora.after_step(optimizer)
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(remora.merged()(X), model(X), rtol=1e-4, atol=1e-5)
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_weight_that_is_read_and_called() -> None:
    """Compared with a model in which delta is a term of its own."""
    model = Tied()
    weight = model.encoder[0].weight.detach().clone()
    remora = rm.attach(model, rm.MoRA(2))
    layer = remora.layers["encoder.0"]
    M = model.get_parameter("encoder.0.mora_M")
    nn.init.normal_(M, std=0.3)
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        M.grad = None
        run(X).square().sum().backward()
        explicit = M.detach().clone().requires_grad_()
        whole = weight + layer.delta_of(explicit)
        F.linear(F.linear(X, whole).tanh(), whole.T).square().sum().backward()
        torch.testing.assert_close(M.grad, explicit.grad, rtol=1e-5, atol=1e-5)


class Checkpoints(Reads):
    """A part of its forward runs again in the backward."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        part = super().forward
        return part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)


def test_a_read_that_gradient_checkpointing_repeats() -> None:
    gradients = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        model = Checkpoints(reentrant)
        rm.attach(model, rm.MoRA(2))
        M = nn.init.ones_(model.get_parameter("proj.mora_M"))
        x = X.clone().requires_grad_()
        model(x).square().sum().backward()
        gradients.append((M.grad, x.grad))
    for again in gradients[1:]:
        torch.testing.assert_close(again, gradients[0])


def test_a_read_in_a_functional_call() -> None:
    """Which has plain tensors in place of parameters."""
    model = Tied()
    rm.attach(model, rm.MoRA(2, form="decoupled"))
    M = nn.init.ones_(model.get_parameter("encoder.0.mora_M"))
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def total(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (X,)).square().sum()

    expected = model(X).square().sum()
    expected.backward()
    torch.testing.assert_close(total(values), expected.detach())
    torch.testing.assert_close(torch.func.grad(total)(values)["encoder.0.mora_M"], M.grad)


def test_a_copy_of_a_model_that_reads_a_weight() -> None:
    """Outside of a forward, the weight is the frozen one, also after an error."""
    model = Tied()
    weight = model.encoder[0].weight
    remora = rm.attach(model, rm.MoRA(2, form="decoupled"))
    nn.init.ones_(model.get_parameter("encoder.0.mora_M"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), model(X))
    assert remora.layers["encoder.0"].weight is weight
    with pytest.raises(RuntimeError):
        model(torch.zeros(3, 9))
    assert remora.layers["encoder.0"].weight is weight


class Interrupted(nn.Module):
    """An interrupt (Ctrl-C) comes in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.k_proj = nn.Linear(8, 8)
        self.interrupted = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.q_proj(x * self.q_proj.weight.sum())
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        return y + self.k_proj(x)


def test_an_interrupted_forward_leaves_nothing_behind() -> None:
    remora = rm.attach(nn.Sequential(Interrupted()), rm.ReMoRA(2, form="merged"))
    model = remora.model
    with pytest.raises(KeyboardInterrupt):
        model(X)
    assert copy.deepcopy(model)(X).shape == remora.merged()(X).shape == X.shape
    optimizer = torch.optim.AdamW(remora.parameter_groups(lr=1e-2))
    layer = remora.layers["0.q_proj"]
    model(X).sum().backward()
    optimizer.step()
    remora.after_step(optimizer)
    model(X)
    assert layer.weight is layer.base_weight
    assert layer.shared_input.last is None
    assert not any(caller.read for caller in layer.callers)


def test_a_weight_that_the_model_changes_in_place_is_refused_by_name() -> None:
    """RWKV scales two weights of each block when it changes to eval."""
    from transformers import RwkvConfig, RwkvForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 8, "attention_hidden_size": 8, "intermediate_size": 12}
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        model = RwkvForCausalLM(RwkvConfig(**sizes, num_hidden_layers=4, rescale_every=2))
        rm.attach(model, rm.MoRA(2))
        ids = torch.arange(4)[None]
        model.train()(ids, use_cache=False)
        with context(), pytest.raises(ValueError, match=r"rwkv.blocks.0.attention.output: .*leave it out of targets"):
            model.eval()(ids, use_cache=False)


class OnlyMultiplies(nn.Linear):
    """As Falcon has it."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Reused(nn.Module):
    """One linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = OnlyMultiplies(8, 8)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x).tanh())


@each("targets", [None, ["again"], ["first", "again"]])
def test_a_module_with_two_names_has_one_adapter(targets: list[str] | None) -> None:
    remora = rm.attach(Reused(), rm.ReMoRA(2, merge_every=2), targets=targets)
    model = remora.model
    assert list(remora.layers) == ["first"]
    assert model.again is model.first
    optimizer = torch.optim.AdamW(remora.parameter_groups(lr=1e-2))
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
        remora.after_step(optimizer)
    plain = remora.merged()
    assert plain.again is plain.first
    torch.testing.assert_close(plain(X), model(X), rtol=1e-4, atol=1e-5)
    assert list(plain.state_dict()) == list(Reused().state_dict())
