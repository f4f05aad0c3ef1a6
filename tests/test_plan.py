"""The plan of a run, and its command line."""

from __future__ import annotations

import json
import re

import pytest

from relora_mora.config import load_config
from relora_mora.flops import flops_per_token
from relora_mora.model import read_model_config
from relora_mora.plan import FRAGMENTATION, METHODS, PROCESS_BYTES, STAGES, Plan, duration, make_plan, render
from tests.helpers import ROOT

CONFIG = ROOT / "configs" / "run" / "tiny_remora.yaml"


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan_of(tokens_per_second: float | None = None, utilisation: float | None = None, **overrides: str) -> Plan:
    config = load_config(CONFIG, overrides, world_size=2)
    return make_plan(
        read_model_config(config.model),
        config,
        world_size=2,
        bf16=True,
        on_cpu=True,
        peak=(1e12, "the test"),
        tokens_per_second=tokens_per_second,
        utilisation=utilisation,
    )


def test_parameters_and_tokens() -> None:
    plan = plan_of()
    assert plan.parameters.total == 7_358_720
    # MoRA has at most LoRA's 7 layers' r (in + out): here R = floor(sqrt(...)) loses less than 2 %
    lora = 32 * 4 * (4 * 512 + 3 * (256 + 688))
    assert 0.98 * lora < plan.parameters.adapters <= lora
    assert plan.parameters.trainable == 2 * 8192 * 256 + 9 * 256 + plan.parameters.adapters
    assert (plan.tokens_per_step, plan.tokens) == (4096, 4_096_000)


def test_time_follows_from_what_is_known() -> None:
    assumed, given, measured = plan_of(), plan_of(utilisation=0.8), plan_of(tokens_per_second=2000.0)
    assert assumed.tokens_per_second == pytest.approx(2 * 0.4e12 / assumed.flops.performed)
    assert given.seconds == pytest.approx(assumed.seconds / 2)
    assert measured.seconds == 2048.0
    assert "assuming 40% of 1 TFLOP/s a device (the test)" in assumed.assumption
    assert f"{2000 * measured.flops.total / 2e12:.1%}" in measured.assumption
    assert plan_of(**{"log.peak_tflops": "2.0"}).seconds == pytest.approx(assumed.seconds / 2)


@pytest.mark.parametrize(("name", "value"), [("utilisation", 0.0), ("utilisation", 1.5), ("tokens_per_second", 0.0)])
def test_refuses_impossible_rates(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        plan_of(**{name: value})


def test_every_method_on_every_stage() -> None:
    plan = plan_of()
    assert set(plan.memory) == set(METHODS)
    assert all(set(stages) == set(STAGES) for stages in plan.memory.values())
    full, remora = plan.memory["full"][0], plan.memory["remora"][0]
    assert remora.optimizer < full.optimizer
    assert full.host_base == 0 < remora.host_base
    assert plan.memory["mora"][1].activations < plan.memory["lora"][1].activations


def test_text_names_every_part() -> None:
    plan = plan_of()
    text = render(plan)
    assert "7,358,720 in the model; remora trains" in text
    assert "4,096 tokens a step, 4,096,000 in all" in text
    assert re.search(r"^ *2\* ", text, re.MULTILINE), "the stage in the settings is marked"
    assert all(method in text for method in METHODS)
    memory = plan.memory["remora"][2]
    assert plan.resident == FRAGMENTATION * (PROCESS_BYTES + memory.device + memory.host_base)
    assert f"resident memory of a rank: {plan.resident / 2**30:.3g} GiB" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(6.05, "6.0 s"), (306, "5 min 6 s"), (4 * 3600 + 300, "4 h 5 min"), (76 * 3600.0, "3 d 4 h"), (47 * 3600, "47 h 0 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def run_cli(*arguments: str) -> int:
    from launch import plan as script
    from relora_mora.cli import run

    with pytest.raises(SystemExit) as end:
        run(script.main, list(arguments))
    return int(end.value.code or 0)


def test_command_line_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(str(CONFIG), "--world_size=2", "--train.steps=2000", "--tokens_per_second=4096", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    config = load_config(CONFIG)
    assert values["tokens"] == 8_192_000
    assert values["seconds"] == 2000
    assert values["flops"]["total"] == flops_per_token(read_model_config(config.model), config).total
    assert values["memory"]["remora"]["2"]["device"] > values["memory"]["remora"]["2"]["activations"] > 0


def test_command_line_for_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(str(ROOT / "configs/run/paper_250m_remora.yaml"), "--world_size=32", "--device=cuda") == 0
    out = capsys.readouterr().out
    assert "remora in bf16" in out
    assert "resident" not in out
    assert "5,242,880,000 in all" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world_size=3"], "no multiple of train.micro_batch_size 8 x 3 ranks"),
        (["--world_size=0"], "--world_size: got 0"),
        (["--device=tpu"], "expected cuda or cpu"),
        (["--train.stepss=3"], "did you mean steps?"),
        (["--data.sequence_length=4096"], "max_position_embeddings"),
    ],
)
def test_command_line_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run_cli(str(CONFIG), *arguments) == 2
    assert message in capsys.readouterr().err
