"""`relora-mora plan`: what it prints, as text and as JSON, and what it refuses."""

from __future__ import annotations

import json

import pytest

from relora_mora.config.load import load_config
from relora_mora.model.config import read_model_config
from relora_mora.sizing.work import flops_per_token
from tests.tools.each import each
from tests.tools.helpers import ROOT

CONFIG = ROOT / "configs" / "run" / "tiny_remora_paper.yaml"


pytestmark = pytest.mark.usefixtures("at_root", "known_speed")


@pytest.fixture
def known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured: that takes time, and tests/system/test_hardware.py does it."""
    monkeypatch.setattr("relora_mora.system.hardware.peak_flops", lambda **_: (1e12, "the test"))


def run_cli(*arguments: str) -> int:
    from relora_mora.cli.command import run
    from relora_mora.commands import plan as script

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


@each("setting", ["--method.operators=[6]", "--method.square_multiple=4096"])
def test_settings_that_only_other_methods_use_do_not_keep_a_run_from_its_plan(
    capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    arguments = ["--method.name=full", "--method.rank=33", setting]
    assert run_cli(str(CONFIG), "--world_size=1", *arguments, "--json") == 0
    assert "full" in (planned := json.loads(capsys.readouterr().out)["memory"])
    assert "remora" not in planned
    assert run_cli(str(CONFIG), "--world_size=1", *arguments[1:]) == 2


@each(
    ("settings", "message"),
    [
        (
            ["--method.base=fp8", "--method.base_products=true"],
            "method.base: the results of fp8 products are in bf16; use train.precision=bf16",
        ),
    ],
)
def test_a_precision_that_a_run_refuses_has_no_plan(
    capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert run_cli(str(CONFIG), "--world_size=1", "--device=h100", "--train.precision=fp32", *settings) == 2
    assert message in capsys.readouterr().err


@each(
    ("arguments", "message"),
    [
        (["--world_size=3"], "not a multiple of train.micro_batch_size 8 x 3 ranks"),
        (["--world_size=0"], "--world_size: got 0"),
        (["--device=tpu"], "got 'tpu', expected cuda, cpu or one of a100, a100-40gb"),
        (["--nodes=2"], "--gpus_per_node: missing with --nodes=2"),
        (["--nodes=2", "--world_size=2"], "--world_size: given together with --nodes"),
        (["--link_gbits=-1"], "--link_gbits: got -1"),
        (["--link_gbits=10"], "--link_gbits: a single host does not use its network"),
        (["--train.stepss=3"], "did you mean steps?"),
        (["--data.sequence_length=4096"], "max_position_embeddings"),
    ],
)
def test_command_line_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run_cli(str(CONFIG), *arguments) == 2
    assert message in capsys.readouterr().err
