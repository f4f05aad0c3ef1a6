"""Runs that begin with an adapter, and the adapters that they export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import Config
from relora_mora.weights.export import export
from relora_mora.weights.peft import AdapterFolder
from tests.tools.adapter_tools import ADAPTERS_ONLY, METHODS, adapted, logits, save_base, write_run
from tests.tools.commands import EVALUATE, call
from tests.tools.each import each
from tests.tools.grids import rest
from tests.tools.runs import built, logged_values, run_config, train

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def adapters(base, tokenizer_path, tmp_path_factory) -> dict[str, Path]:
    """Adapters of ``base``: some without other trained modules, and lora also with them."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for name, form, others in (
        ("lora", "peft", ADAPTERS_ONLY),
        ("mora1", "peft-mora", ADAPTERS_ONLY),
        ("mora6", "peft-mora", ADAPTERS_ONLY),
        ("lora_with_modules", "peft", {}),
        ("lora_pattern", "peft", ADAPTERS_ONLY),
    ):
        method = METHODS[name.removesuffix("_with_modules")] | others
        write_run(folder / f"run_{name}", adapted(base, method), base, tokenizer_path, method)
        export(folder / f"run_{name}", folder / name, form=form)
        found[name] = folder / name
    return found


def config_of(
    inputs: Path,
    tokenizer: str,
    run_dir: Path,
    base: Path,
    adapter: Path,
    method: dict[str, Any],
    world: int = 1,
    **train: Any,
) -> Config:
    model = {"config": str(base / "config.json"), "init_from": str(base), "adapter": str(adapter)}
    sections = {"optim": {"warmup_steps": 1}, "train": {"steps": 4} | train, "eval": {"every_steps": 0}}
    return run_config(inputs, tokenizer, run_dir, world, model=model, method=method, **sections)


def masters(config: Config) -> dict[str, torch.Tensor]:
    """Runs on every rank: the float32 values that a run begins with."""
    run = built(config)
    return {name: run.engine.gather(name) for name in run.engine.moments}


@pytest.mark.parametrize(
    ("name", "stage", "precision", "world"),
    [
        ("mora6", 3, "bf16", 2),
        *rest(("lora", 0, "fp32", 1), ("mora1", 2, "bf16", 2), ("lora_with_modules", 2, "bf16", 2)),
    ],
)
def test_a_run_begins_with_the_values_in_the_file(
    pools, inputs, base, adapters, tokenizer_path, tmp_path, name, stage, precision, world
):
    method = METHODS[name.removesuffix("_with_modules")] | ({} if name.endswith("modules") else ADAPTERS_ONLY)
    started = {"zero_stage": stage, "precision": precision}
    config = config_of(inputs, tokenizer_path, tmp_path / "run", base, adapters[name], method, world, **started)
    adapter = AdapterFolder(adapters[name])
    for found in pools(world)(masters, config):
        assert set(found) == set(adapter.shapes)
        assert all(value.equal(adapter.value(key)) for key, value in found.items())


@pytest.mark.more
@pytest.mark.parametrize("name", ["lora", "mora6"])
def test_the_first_loss_is_the_adapters_and_the_last_is_its_exports(
    pools, inputs, base, adapters, tokenizer_path, tmp_path, name
):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (pip install '.[dev]')")
    run = tmp_path / "run"
    config = config_of(inputs, tokenizer_path, run, base, adapters[name], METHODS[name] | ADAPTERS_ONLY)
    pools(1)(train, config, stop_after=2)
    pools(1)(train, config)  # goes on at step 2
    for form in ("merged", "peft"):
        export(run, tmp_path / form, form=form)
    first, last = logged_values(run, "eval/loss")
    scored = []
    for folder in (adapters[name], tmp_path / "peft", tmp_path / "merged"):
        options = (f"--data={inputs}/validation/*.json.gz", "--data.sequence_length=32", "--max_tokens=200")
        answer = call(EVALUATE, folder, *options)
        assert answer.code == 0, answer.err
        scored.append(json.loads(answer.out.splitlines()[-1])["loss"])
    assert scored == pytest.approx([first, last, last], abs=1e-5)
    assert abs(first - last) > 1e-3
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "peft").eval()
    merged = logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (logits(theirs) - merged).abs().max() < 2e-5


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def refuses(inputs, tokenizer_path, tmp_path):
    """Asserts that a run is refused before it begins, with all these parts in the message."""
    from relora_mora.model.config import read_model_config
    from relora_mora.train.begin.settings import check_adapter

    def check(base: Path, adapter: Path, method: dict[str, Any], *parts: str) -> None:
        config = config_of(inputs, tokenizer_path, tmp_path / "run", base, adapter, method)
        with pytest.raises(ConfigError) as caught:
            check_adapter(config, read_model_config(config.model))
        assert all(part in str(caught.value) for part in parts), str(caught.value)

    return check


@each(
    ("name", "changes", "parts"),
    [
        (
            "lora",
            METHODS["mora1"],
            ["lora_A is (4, 40) in", "it is LoRA with ranks {down_proj: 4, ", "set method.name"],
        ),
        ("mora1", METHODS["lora"], ["lora_A is missing in", "it is MoRA with R of {down_proj: 16, "]),
        ("lora", {"target_modules": ["q_proj", "v_proj"]}, ["missing in this run", "set method.name, rank"]),
        ("mora1", {"operators": [6], "square_multiple": 2}, ["method.operators: begins with 6", "has operator 1"]),
        ("lora", {"lora_alpha": 4.0}, ["method.lora_alpha: 4.0 in the settings and 6 in the adapter"]),
        ("lora", {"rank": 2}, ["lora_A is (4, 40)", "and (2, 40) in this run (28 tensors differ)"]),
        ("lora_pattern", {"rank_pattern": {}}, ["lora_A", "(8 tensors", "with ranks {down_proj: 6, gate_proj: 4,"]),
        ("mora1", {"rank": 5}, ["mora_M is (16, 16)", "and (17, 17) in this run (14 tensors differ)"]),
        ("lora_with_modules", ADAPTERS_ONLY, ["it contains lm_head.weight"]),
    ],
)
def test_settings_that_differ_from_the_adapters_are_refused(refuses, base, adapters, name, changes, parts):
    others = {} if name.endswith("modules") else ADAPTERS_ONLY
    refuses(
        base,
        adapters[name],
        METHODS[name.removesuffix("_with_modules")] | others | changes,
        str(adapters[name]),
        *parts,
    )


def test_an_adapter_of_another_model_is_refused(refuses, adapters, tmp_path):
    narrow = save_base(tmp_path / "narrow", intermediate_size=32)
    messages = (
        "down_proj.lora_A is (4, 40)",
        str(adapters["lora"]),
        "and (4, 32) in this run",
        "and model.init_from to its model",
    )
    refuses(narrow, adapters["lora"], METHODS["lora"] | ADAPTERS_ONLY, *messages)


def test_an_adapter_of_other_weights_of_the_same_sizes_is_refused(pools, adapters, inputs, tokenizer_path, tmp_path):
    other = save_base(tmp_path / "base", seed=8)
    config = config_of(
        inputs, tokenizer_path, tmp_path / "run", other, adapters["mora1"], METHODS["mora1"] | ADAPTERS_ONLY
    )
    with pytest.raises(Exception, match=f"was trained on other weights than {other} has; give the model"):
        pools(1)(masters, config)


def test_an_adapter_is_not_an_initial_model(base, adapters, inputs, tokenizer_path, tmp_path):
    from relora_mora.train.begin.settings import check_start

    model = {"config": str(base / "config.json"), "init_from": str(adapters["lora"])}
    with pytest.raises(ConfigError, match=r"holds an adapter without its model; .* and the adapter in model\.adapter"):
        check_start(run_config(inputs, tokenizer_path, tmp_path, model=model))
