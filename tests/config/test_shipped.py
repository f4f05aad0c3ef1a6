"""Every shipped config loads, and says what the papers say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from relora_mora.config.checks.combinations import unused_by
from relora_mora.config.data import as_sources
from relora_mora.config.load import FINETUNING, load_config
from relora_mora.config.schema import Config
from relora_mora.data.named_sets import C4
from relora_mora.model.config import check_length, read_model_config
from relora_mora.optim.groups import count_parameters, make_schedule
from relora_mora.sizing.work import meta_model
from tests.tools.each import each
from tests.tools.helpers import ROOT

MODELS = sorted((ROOT / "configs" / "model").glob("*.json"))
RUNS = sorted((ROOT / "configs" / "run").glob("*.yaml"))
TASKS = sorted((ROOT / "configs" / "task").glob("*.yaml"))
METHODS = ("full", "lora", "mora", "relora", "remora")

pytestmark = pytest.mark.usefixtures("at_root")


@each("path", MODELS)
def test_a_model_is_read_as_written_and_has_its_parameters(path: Path) -> None:
    written = json.loads(path.read_text(encoding="utf-8"))
    config = LlamaConfig(**written)
    read = config.to_dict()
    assert {key: read[key] for key in written} == written
    assert set(written) <= set(LlamaConfig().to_dict()), "transformers would keep an unknown key and ignore it"
    assert read["head_dim"] * read["num_attention_heads"] == read["hidden_size"]
    assert read["pad_token_id"] is None
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    h, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    # with untied embeddings
    assert count == 2 * config.vocab_size * h + layers * (4 * h * h + 3 * h * f + 2 * h) + h
    row = f"| `{path.stem}` | {count:,} | {h} | {f} | {layers} | {config.num_attention_heads} |"
    assert row in (ROOT / "configs" / "README.md").read_text(encoding="utf-8")


@pytest.mark.more
@each("path", RUNS)
def test_a_run_loads_and_matches_its_name(path: Path) -> None:
    config = load_config(path, world_size=1 if path.stem == "study_full" else 2)  # a run of a study has one rank
    assert not unused_by(config)
    model_config = read_model_config(config.model)
    check_length(model_config, config.data.sequence_length, str(config.model.config))
    if path.stem != "demo":
        assert path.stem.removesuffix("_paper").endswith(f"_{config.method.name}")
        assert config.train.run_dir == f"runs/{path.stem}"
    if config.method.uses_adapters:
        assert count_parameters(meta_model(model_config, config.method)).adapters > 0


@each("size", ["250m", "1_3b"])
def test_the_run_of_the_paper(size: str) -> None:
    config = load_config(f"configs/run/paper_{size}_remora.yaml", world_size=32)
    assert (config.train.steps, config.train.batch_size, config.data.sequence_length) == (10_000, 1024, 512)
    assert config.tokens_per_step * config.train.steps == 5_242_880_000
    optim = config.optim
    assert (optim.lr, optim.lr_other, optim.warmup_steps, optim.schedule) == (5e-4, None, 1000, "cosine")
    assert config.data.train == config.data.validation[""] == as_sources(C4)
    assert read_model_config(config.model).vocab_size == 32_000
    assert (config.method.rank, config.method.operators) == (128, [1, 2])
    schedule = make_schedule(config.method, optim, config.train.steps)
    assert [step for step in range(10_001) if schedule.merge_after(step)] == [2000, 4000, 6000, 8000]
    assert schedule.restart_warmup_steps == 50


GROUPS = [[f"paper_{size}_{method}" for method in METHODS] for size in ("250m", "1_3b")]
TINY = [["tiny_mora", "tiny_relora", "tiny_remora_paper"], ["tiny_full", "tiny_lora", "tiny_remora"]]


@each("group", [*GROUPS, *TINY])
def test_methods_of_a_group_differ_in_nothing_else(group: list[str]) -> None:
    given = [load_config(f"configs/run/{name}.yaml") for name in group]
    configs = {config.method.name: config for config in given}
    assert len({config.method.rank for config in given if config.method.uses_adapters}) == 1
    if "mora" in configs:
        assert configs["mora"].method.operators == configs["remora"].method.operators[:1]
        merges = {n: (config.method.merge_every, config.optim.restart_warmup_steps) for n, config in configs.items()}
        assert merges["relora"] == merges["remora"]
    assert group in TINY or {config.optim.lr for config in given} == {5e-4}
    own = {"method": True, "train": {"run_dir"}, "optim": {"lr", "restart_warmup_steps"}}
    assert len({config.model_dump_json(exclude=own) for config in configs.values()}) == 1


# ---- tasks -----------------------------------------------------------------------------------------------------------

# kind of the records; tokens of a sequence, records or sequences of a step, epochs; MoRA's rates and operator in the
# paper at the rank of the file (arXiv 2405.12130, table 5 and section 5.1)
WHAT_TASKS_ARE: dict[str, tuple[str | None, tuple[int, int, float], set[float], int]] = {
    "continue_paper": (None, (512, 128, 3), {5e-5, 7e-5}, 1),
    "instruction": ("messages", (2048, 128, 2), {2e-4, 3e-4}, 6),
    "math": ("alpaca", (512, 128, 3), {2e-4, 3e-4}, 6),
    "math_gsm_symbolic": ("question", (512, 128, 3), {2e-4, 3e-4}, 6),
    "memory": ("prompt", (96, 1000, 100), {5e-5, 1e-4, 2e-4}, 1),
}


def task(name: str, **overrides: str) -> Config:
    return load_config(f"configs/task/{name}.yaml", overrides, world_size=8, defaults=FINETUNING)


def test_the_two_ways_to_continue_differ_only_in_method_and_rate() -> None:
    trees = {}
    for name in ("remora", "full"):
        config = task(f"continue_{name}")
        assert config.method.name == name and not unused_by(config)
        assert [each.name for each in config.data.train] == list(config.data.validation) == ["new", "old"]
        trees[name] = config.model_dump(exclude={"method": True, "optim": {"lr", "restart_warmup_steps"}})
        del trees[name]["train"]["run_dir"]
    assert trees["remora"] == trees["full"]


@each("name", WHAT_TASKS_ARE)
def test_a_task_trains_only_mora_adapters_as_in_the_paper_or_any_other_method(name: str) -> None:
    kind, sizes, rates, operator = WHAT_TASKS_ARE[name]
    config = task(name)
    assert not unused_by(config)
    assert kind == (config.data.records and config.data.records.kind)
    assert (config.data.sequence_length, config.train.batch_size, config.train.epochs) == sizes
    assert (config.method.name, config.method.operators[0]) == ("mora", operator)
    assert config.optim.lr in rates
    assert not (config.method.train_embeddings or config.method.train_norms or config.method.train_head)
    for method in METHODS:
        cycle = {"method.operators": "[1, 2]"} if method == "remora" else {}
        assert set(unused_by(task(name, **{"method.name": method}, **cycle))) <= {"method.operators", "method.rank"}
