"""Compares the planner's activations with the tensors that are alive while a model trains."""

import contextlib
import csv
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig

from relora_mora.adapters.layers import adapter_layers
from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config, ModelConfig
from relora_mora.data.stream.packing import document_boundaries
from relora_mora.kernels import reference
from relora_mora.model.config import LLAMA_FAMILY, read_model_config
from relora_mora.sizing.fit import check_memory, choose_forms
from relora_mora.sizing.measure import LiveBytes, measure
from relora_mora.sizing.memory import merged_memory, peak_memory, state_memory
from relora_mora.sizing.setup import Setup
from relora_mora.sizing.work import meta_model
from relora_mora.train.begin.settings import memory_of_rank
from tests.sizing.tools import make_config, real_model
from tests.tools.each import each
from tests.tools.helpers import ROOT

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
}
MODEL = LlamaConfig(**SIZES)
ONCE = make_config({"name": "remora"})
TWICE = ONCE.model_copy(update={"train": ONCE.train.model_copy(update={"batch_size": 8})})
CHECKPOINTING = {"activation_checkpointing": True}


def with_data(config: Config, **settings: Any) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=settings)})


Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]  # settings of method, model and data
CASES: list[Case] = [
    *(({"name": name, "form": form}, {}, {}) for name in ("lora", "mora") for form in ("merged", "decoupled")),
    ({"name": "mora", "form": "resident"}, {}, {}),
    ({"name": "lora", "form": "resident"}, CHECKPOINTING, {}),
    ({"name": "mora", "operators": [6], "square_multiple": 2}, {}, {}),
    ({"name": "mora", "target_modules": ["q_proj", "down_proj"]}, {}, {}),
    ({"name": "mora", "target_modules": ["q_proj", "down_proj"], "train_linears": False}, {}, {}),
    ({"name": "full"}, {"attention": "eager"}, {}),
    ({"name": "full"}, CHECKPOINTING, {}),
    ({"name": "mora", "dropout": 0.1}, {}, {}),
    ({"name": "lora", "dropout": 0.1}, CHECKPOINTING, {}),
]
LONG: list[Case] = [
    ({"name": "mora"}, {**attention, **checkpointing}, {"sequence_length": 1024, "document_mask": not attention})
    for attention, checkpointing in (({"attention": "eager"}, {}), ({}, CHECKPOINTING), ({}, {}))
]
SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
# fused projections, experts that are frozen or train, soft caps and windows, attention next to the MLP
OTHERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("phi3", {}, {"name": "mora"}),
    ("gemma2", {"sliding_window": 16}, {"name": "lora"}),
    ("mixtral", {"num_local_experts": 4}, {"name": "remora"}),
    ("qwen3_moe", SMALL_EXPERTS, {"name": "lora", "train_experts": True}),
    ("gpt_neox", {}, {"name": "full"}),
]
FAMILY = [(kind, {}, {"name": "full"}) for kind in LLAMA_FAMILY]


@pytest.mark.more
@each(
    ("case", "bf16"), [(case, number % 2 == 0) for number, case in enumerate(CASES)] + [*product(LONG, (True, False))]
)
def test_activations_and_peak(case: Case, bf16: bool) -> None:
    check_activations_and_peak("llama", {}, *case, bf16)


@pytest.mark.more
@each("family,bf16", [*product(OTHERS, (True, False)), *((each, False) for each in FAMILY)])
def test_activations_and_peak_of_other_families(family: tuple[str, dict[str, Any], dict[str, Any]], bf16: bool) -> None:
    kind, sizes, method = family
    check_activations_and_peak(kind, {**sizes, "pad_token_id": None}, method, {}, {}, bf16)


def check_activations_and_peak(
    kind: str,
    sizes: dict[str, Any],
    method: dict[str, Any],
    model: dict[str, Any],
    data: dict[str, Any],
    bf16: bool,
) -> None:
    model_config = CONFIG_MAPPING[kind](**{**SIZES, **sizes})
    config = with_data(make_config(method, model, micro_batch_size=1 if data else 4), **data)
    trained, ids = real_model(model_config, config, bf16=bf16)
    documents = torch.arange(ids.shape[1]).div(100, rounding_mode="floor").expand(ids.shape)
    boundaries = document_boundaries(documents) if config.data.document_mask else None
    tracker = LiveBytes()
    for parameter in trained.parameters():
        tracker.add(parameter.data)
    before = tracker.now
    for _, layer in adapter_layers(trained.lm):
        if layer.merged_weight is not None:
            tracker.add(layer.merged_weight)
    weights = tracker.now
    setup = Setup(config, 0, 1, bf16=bf16)
    assert weights == before + merged_memory(trained.lm, setup)
    with tracker:
        loss = trained(ids, ids, boundaries)
        kept = tracker.now - weights
        loss.backward()
    planned = measure(meta_model(model_config, config.method), setup)
    assert kept == pytest.approx(planned.kept, rel=0.05)
    gradients = sum(parameter.nbytes for parameter in trained.parameters() if parameter.requires_grad)
    assert tracker.most == pytest.approx(weights + max(planned.most, gradients + planned.at_end), rel=0.1)


def test_on_a_gpu_documents_need_no_mask_and_logits_no_copy() -> None:
    plain = make_config({"name": "full"})
    masked = with_data(plain, document_mask=True)
    model = meta_model(MODEL, plain.method)

    def kept(config: Config, **where: bool) -> float:
        return measure(model, Setup(config, 0, 1, compiled=False, **where)).kept

    assert kept(masked, bf16=True, on_gpu=True) == kept(plain, bf16=True, on_gpu=True) < kept(masked, bf16=True)
    assert kept(masked, bf16=False, on_gpu=True) == kept(masked, bf16=False)  # flash attention does not support float32
    wide = meta_model(LlamaConfig(**{**SIZES, "vocab_size": 8192}), plain.method)  # most is needed by its loss
    seen = measure(wide, Setup(plain, 0, 1, bf16=True, on_gpu=True))
    head = 8192 * MODEL.hidden_size
    assert seen.most - seen.kept == max(256 * 8192 * 2 + 4 * head, 6 * head) - 2 * head


@pytest.mark.more
@each(
    "size,method,how",
    product(
        ("llama_250m", "llama_1_3b"), ("full", "relora resident", "remora operator 1 resident"), ("eager", "compiled")
    ),
)
def test_a_layer_keeps_what_was_counted(size: str, method: str, how: str) -> None:
    """The counts come from fake tensors (tests/fakecuda)."""
    rows = csv.DictReader((ROOT / "tests/fakecuda/counts.csv").read_text().splitlines())
    [counted] = [row for row in rows if (row["model"], row["method"], row["compiled"]) == (size, method, how)]
    config = make_config({"name": method.split()[0], "operators": [1, 2], "rank": 128}, micro_batch_size=16)
    config = with_data(config, sequence_length=512)
    setup = Setup(config, 0, 1, bf16=True, on_gpu=True, compiled=how == "compiled")
    kept = []
    for layers in (1, 2):
        overrides = {"num_hidden_layers": layers}
        settings = ModelConfig(config=str(ROOT / f"configs/model/{size}.json"), overrides=overrides)
        kept.append(measure(meta_model(read_model_config(settings), config.method), setup).kept)
    assert (kept[1] - kept[0]) / 2**20 == pytest.approx(int(counted["kept_mib"]), rel=0.05)


def test_accumulation_keeps_gradients_through_the_loss() -> None:
    model = meta_model(MODEL, ONCE.method)
    gradients = [peak_memory(model, Setup(config, 0, 1, bf16=True)).gradients for config in (ONCE, TWICE)]
    assert gradients[0] == 0 < gradients[1]


def test_ranks_on_cpus_share_the_memory_of_their_host(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(ONCE, ONCE.train.zero_stage, 4, bf16=True)
    state = state_memory(meta_model(MODEL, ONCE.method), setup)
    needed = state.weights + state.masters + state.optimizer + state.host_base
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for more, fits in ((64, True), (-64, False)):
        monkeypatch.setattr("relora_mora.train.begin.settings.host_memory_bytes", lambda more=more: 4 * needed + more)
        with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=r"on each of 4 ranks"):
            check_memory(MODEL, setup, memory_of_rank(), memory_of_rank())


def test_with_a_gpu_the_host_only_needs_memory_for_the_base() -> None:
    setup = Setup(ONCE, ONCE.train.zero_stage, 4, bf16=True, on_gpu=True)
    model = meta_model(MODEL, ONCE.method)
    state = state_memory(model, setup)
    assert state.host_base > state_memory(model, replace(setup, on_gpu=False)).host_base, "pinned memory is rounded up"
    on_device = state.weights + state.masters + state.optimizer
    check_memory(MODEL, setup, on_device, state.host_base)
    with pytest.raises(ConfigError, match=r"base weights in host memory need .* take a smaller model"):
        check_memory(MODEL, setup, on_device, state.host_base - 1)
    with pytest.raises(ConfigError, match="weights and optimizer state need"):
        check_memory(MODEL, setup, on_device - 1, state.host_base)


def test_auto_keeps_merged_weights_if_it_pays_and_they_fit() -> None:
    model = meta_model(MODEL, ONCE.method)

    def kept(config: Config, stage: int = 1, available: float | None = None, *, on_gpu: bool = False) -> int:
        choose_forms(model, Setup(config, stage, 1, bf16=True, on_gpu=on_gpu), available)
        return sum(layer.resident for _, layer in adapter_layers(model))

    assert kept(TWICE) == 7 * MODEL.num_hidden_layers
    needed = peak_memory(model, Setup(TWICE, 1, 1, bf16=True)).device
    assert kept(TWICE, available=2 * needed)
    assert not kept(TWICE, available=2 * needed - 1)
    assert kept(ONCE, on_gpu=True)
    on_gpu = Setup(TWICE, 1, 1, bf16=True, on_gpu=True)
    compiled = peak_memory(model, on_gpu).device
    choose_forms(model, replace(on_gpu, compiled=False), 2 * compiled)
    assert not any(layer.resident for _, layer in adapter_layers(model)), "eager layers need more"
    assert not any((kept(ONCE), kept(TWICE, stage=3), kept(TWICE, stage=3, on_gpu=True)))
    resident = make_config({"name": "remora", "form": "resident"})
    model = meta_model(MODEL, resident.method)
    assert [kept(resident, stage) > 0 for stage in (2, 3, 1)] == [True, False, True]


def test_measuring_leaves_no_tensor_without_values_in_a_cache() -> None:
    config = make_config({"name": "mora", "operators": [6], "square_multiple": 2})
    reference._tables.cache_clear()
    measure(meta_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}), config.method), Setup(config, 0, 1, bf16=True))
    assert reference._tables.cache_info().currsize == 0
