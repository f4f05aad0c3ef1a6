"""Models of families that the package does not know: each is asked for what it is, and compared with transformers."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from relora_mora.adapters.inject import decoder_linears
from relora_mora.config.load import ConfigError
from relora_mora.config.schema import MethodConfig
from relora_mora.data.stream.packing import document_boundaries
from relora_mora.evaluation.generation import greedy
from relora_mora.kernels import ops
from relora_mora.model import causal, documents
from relora_mora.model.causal import LossModel, body_of, build_model, empty_model, ends_of, initial_values
from relora_mora.model.config import family_of, parse_model_config
from relora_mora.model.guard import examine
from relora_mora.optim.groups import count_parameters, group_of
from relora_mora.sizing.fit import check_adapters
from relora_mora.sizing.setup import Setup
from relora_mora.sizing.work import meta_model
from relora_mora.system.process import missing_to_compile
from relora_mora.train.begin.build import _describe
from tests.tools.any_model import FAMILIES, KINDS, any_config, some
from tests.tools.each import each
from tests.tools.tiny import tiny_config


@pytest.mark.parametrize("kind", some(*FAMILIES))
def test_loss_and_documents_are_those_of_transformers(kind: str) -> None:
    """Sequences are longer than the windows of attention, and a document in a sequence computes what it does alone."""
    config = any_config(kind)
    for attention in ("auto", "eager"):
        assert examine(config, attention=attention, documents=True).difference < 1e-5
    lm = empty_model(config)
    assert {group_of(name, lm.get_parameter(name).shape) for name in ends_of(lm)} == {"embeddings"}
    names = [name for name, _ in decoder_linears(lm)]
    assert len({name.rpartition(".")[2] for name in names}) == KINDS[kind]
    method = MethodConfig(name="remora", rank=2)
    check_adapters(config, method)
    counts = count_parameters(meta_model(config, method))
    assert 0 < counts.adapters < counts.total == sum(parameter.numel() for parameter in lm.parameters())
    values = initial_values(lm, [name for name, _ in lm.named_parameters()], seed=0)
    assert [name for name, value in values.items() if not value.isfinite().all()] == []


def test_windows_of_the_llama_family_are_those_of_transformers() -> None:
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        windows = (
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
            if kind.startswith("qwen")
            else {}
        )
        config = any_config(kind, **windows)
        assert (getattr(config, "sliding_window", None) == 16) == (kind != "llama")
        findings = examine(config, attention="auto", documents=True)
        assert findings.passes_boundaries
        assert findings.difference < 1e-5


def test_another_head_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "head_scale", lambda lm: (True, 1.0))
    with pytest.raises(ConfigError, match=r"the loss of a small cohere is \d.* in transformers and \d.* here"):
        examine(any_config("cohere"), attention="auto", documents=True)


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_a_model_whose_documents_leak_trains_only_without_a_mask(kind: str) -> None:
    config = any_config(kind)
    with pytest.raises(ConfigError, match=r"data.document_mask: in a .* documents change each other"):
        examine(config, attention="auto", documents=True)
    assert examine(config, attention="auto", documents=False).difference < 1e-5


@each("kind,tied", [("cohere", True), ("gemma2", True), ("opt", True), ("llama", True), ("llama", False)])
def test_gradients_are_those_of_transformers(kind: str, tied: bool, device: torch.device) -> None:
    """A scaled head is fused with the loss, a capped one works in chunks, and a head inside needs all its logits."""
    config = any_config(kind, tie_word_embeddings=tied)
    ids = torch.randint(config.vocab_size, (2, 24)).to(device)
    gradients: list[dict[str, Tensor]] = []
    for ours in (False, True):
        lm = build_model(config, seed=2).to(device).eval()
        if ours:
            loss = LossModel(lm)(ids, F.pad(ids[:, 1:], (0, 1), value=-100))
        else:
            loss = lm(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in lm.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


class NoValueIsRead(TorchDispatchMode):
    """Fails if a value is read back, since that makes the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in {"_local_scalar_dense", "nonzero", "equal"}, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", some("llama", "olmo2"))
@each("attention", ["auto", "eager"])
def test_no_value_is_read_back_in_a_forward_of_transformers(kind: str, attention: str) -> None:
    """Transformers would read positions back to find documents; here they are known."""
    lm = build_model(any_config(kind), seed=0, attention=attention).eval()
    ids = torch.randint(64, (2, 24))
    expected = body_of(lm)[1](input_ids=ids, use_cache=False)[0]
    module = LossModel(lm)
    assert torch.equal(module.hidden(ids, None), expected)
    boundaries = document_boundaries(torch.arange(24).expand(2, 24) // 9)
    with mock.patch.object(ops, "enabled", False), NoValueIsRead():  # CPU kernels read the labels, GPU kernels do not
        module(ids, ids, boundaries, 48.0)
        module(ids, ids, None, 48.0)
    if kind == "olmo2":  # another program, whose documents are found
        with pytest.raises(AssertionError, match="_local_scalar_dense"), NoValueIsRead():
            body_of(lm)[1](input_ids=ids, position_ids=torch.arange(24)[None])


COMPILED = [(kind, "compiled") for kind in ("gemma2", "phi3", "mixtral")]


@pytest.mark.more
@pytest.mark.parametrize(("kind", "how"), [*((kind, "recomputed") for kind in KINDS), *COMPILED])
def test_layers_that_are_recomputed_or_compiled_have_the_same_gradients(kind: str, how: str) -> None:
    if how == "compiled" and missing_to_compile("C++") is not None:
        pytest.skip("torch.compile needs a compiler")
    config = any_config(kind)
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    boundaries = document_boundaries(torch.arange(24).expand(2, 24) // 9)
    gradients: list[dict[str, Tensor]] = []
    for changed in (False, True):
        lm = build_model(config, seed=2).train()
        if changed and how == "recomputed":
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = LossModel(lm, compiled=changed and how == "compiled")
        torch.manual_seed(0)  # of dropout
        module(ids, ids.roll(-1), boundaries).backward()
        gradients.append({name: p.grad for name, p in lm.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        exact = {"rtol": 0, "atol": 0} if how == "recomputed" else {"rtol": 1e-3, "atol": 1e-6}
        torch.testing.assert_close(gradients[1][name], gradient, **exact, msg=name)


@pytest.mark.parametrize("kind", some("gemma2", "gpt_oss", "qwen3"))
def test_a_batch_generates_what_transformers_does_for_each(kind: str) -> None:
    lm = build_model(any_config(kind), seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():  # larger than initial values, so that tokens differ
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    prompts = [torch.randint(3, 300, (length,), generator=generator) for length in (5, 1, 9)]
    plain = [lm.generate(prompt[None], max_new_tokens=7, do_sample=False, pad_token_id=0)[0, -7:] for prompt in prompts]
    expected = torch.stack(plain)
    assert len(expected.unique()) > 2
    assert torch.equal(greedy(lm, prompts, 7, torch.device("cpu")), expected)
    trained = LossModel(lm).lm  # with attention that takes boundaries in place of masks
    attention = lm.config._attn_implementation
    assert torch.equal(greedy(trained, prompts, 7, torch.device("cpu")), expected)
    assert lm.config._attn_implementation == attention


def test_a_model_keeps_its_attention_when_another_is_built_from_its_config() -> None:
    config = any_config("llama")
    module = LossModel(build_model(config, seed=0))
    meta_model(module.lm.config, MethodConfig(name="remora", rank=2))
    empty_model(config)
    assert module.lm.config._attn_implementation == documents.SDPA_OR_DOCUMENTS


def test_experts_and_routers_train_only_if_asked() -> None:
    config = any_config("mixtral")
    trained = {}
    for given in (False, True):
        model = meta_model(config, MethodConfig(name="remora", rank=2, train_experts=given))
        trained[given] = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    experts = trained[True] - trained[False]
    assert {name.split(".")[3] for name in experts} == {"mlp"}
    assert len(experts) == 3 * config.num_hidden_layers  # two kinds of experts and a router
    whole = meta_model(config, MethodConfig(name="full"))
    assert all(parameter.requires_grad for parameter in whole.parameters())


@each(
    "kind,settings,said",
    [
        ("mixtral", {}, ["adapters on 8 linears, 14% of", "experts and routers have no adapters, and are frozen"]),
        ("mixtral", {"train_experts": True}, ["experts and routers have no adapters, and train at full rank"]),
        ("llama", {"target_modules": ["down_proj"]}, ["adapters on 2 linears, 20% of"]),
        ("opt", {}, ["100% of", "needs all logits of a micro-batch at once, 1.2 GiB"]),
    ],
)
def test_a_start_logs_what_has_adapters_and_what_needs_all_logits(
    kind: str, settings: dict[str, Any], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(method=settings, data={"sequence_length": 2**18})
    model_config = any_config(kind)
    inputs: Any = SimpleNamespace(config=config, setup=Setup(config, 0, 1, bf16=False), model_config=model_config)
    with caplog.at_level("INFO"):
        _describe(meta_model(model_config, config.method), inputs)
    assert all(words in caplog.text for words in said), caplog.text
    assert ("all logits" in caplog.text) == (kind == "opt")


def test_models_that_cannot_be_trained_are_refused_by_name() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model_type": "gema2"}, "did you mean gemma2"),
        ({"model_type": "bert-like"}, "expected a causal language model"),
        ({"model_type": "olmo2", "hiden_size": 64}, "did you mean hidden_size"),
        ({"model_type": "olmo2", "hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"model_type": "mixtral", "output_router_logits": True}, "another loss"),
        ({"model_type": "olmo2", "num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"model_type": "gemma3"}, "type of its text part"),
        ({"model_type": "olmo2", "quantization_config": {"bits": 4}}, "quantized"),
    ]
    for values, words in cases:
        with pytest.raises(ConfigError, match=words):
            parse_model_config(values, "x.json")
    for kind, settings, words in (
        ("gpt2", {}, "no linears"),
        ("olmo2", {"target_modules": ["q_proj", "qq_proj"]}, "method.target_modules: qq_proj"),
        ("olmo2", {"rank_pattern": {"down": 4}}, "method.rank_pattern: down"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_adapters(any_config(kind), MethodConfig(name="remora", rank=2, **settings))


def _text_of(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key in family_of(config.to_dict(), "x.json").known}


@each("kind", ["llama", "mistral", "gemma3_text", "falcon"])
def test_a_config_that_was_written_can_be_read_again(kind: str) -> None:
    config = any_config(kind)
    again = parse_model_config(_text_of(config), "x.json")
    assert again.to_dict() == config.to_dict()
