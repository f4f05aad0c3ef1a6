"""The table of slow_links.py, and what link_steps.py builds for it, without hosts."""

from __future__ import annotations

from typing import Any

import pytest

from relora_mora.config.schema import ModelConfig
from relora_mora.model.config import read_model_config
from tests.cluster import slow_links
from tests.cluster.slow_links import PLAN, RATES, VARIANTS, table
from tests.tools.helpers import ROOT


def row(variant: str, rate: str, seconds: list[float], megabytes: float, trainable: int = 20_000_000) -> dict[str, Any]:
    sent = [int(megabytes * 1e6)] * len(seconds)
    return {"variant": variant, "rate": rate, "way": "tbf", "seconds": seconds, "sent": sent, "trainable": trainable}


def test_the_table_compares_each_variant_with_full_rank_on_the_same_link() -> None:
    rows = [
        row("full", "none", [1.0, 1.2, 0.9], 125, 40_000_000),
        row("remora", "none", [0.8, 0.7, 0.9], 60),
        row("full", "1gbit", [2.0, 2.1, 1.9], 125, 40_000_000),
        row("remora", "1gbit", [1.28, 1.3, 1.2], 60),
    ]
    lines = table([{"stage": 1, "bf16": True, "rows": rows}, {"stage": 2, "bf16": True, "rows": rows[:2]}]).splitlines()
    assert len({line.count("|") for line in lines[:8]}) == 1  # heading, rule and rows have as many cells
    assert lines[2:8] == [
        "| 1 | no limit | full | 1.00 (0.90 to 1.20) | 1.00 | 125.0 |  |",
        "| 1 | no limit | remora | 0.80 (0.70 to 0.90) | 0.80 | 60.0 |  |",
        # a second more, which 1 Gbit are worth
        "| 1 | 1gbit (tbf) | full | 2.00 (1.90 to 2.10) | 1.00 | 125.0 | 100% |",
        "| 1 | 1gbit (tbf) | remora | 1.28 (1.20 to 1.30) | 0.64 | 60.0 | 100% |",
        "| 2 | no limit | full | 1.00 (0.90 to 1.20) | 1.00 | 125.0 |  |",
        "| 2 | no limit | remora | 0.80 (0.70 to 0.90) | 0.80 | 60.0 |  |",
    ]
    assert lines[-1] == "Trained parameters, bf16: full: 40,000,000; remora: 20,000,000."


def test_full_rank_comes_first_and_is_measured_at_every_rate() -> None:
    assert next(iter(VARIANTS)) == "full"
    assert next(iter(RATES)) == "none"
    assert set(RATES) - {"none"} == set(slow_links.BITS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_of_a_variant_is_the_planned_model_with_its_changes(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.cluster import link_steps

    monkeypatch.chdir(ROOT)
    built: dict[str, Any] = {}
    monkeypatch.setattr(link_steps, "build_rig", lambda config, **given: built.update(given, config=config))
    link_steps.build(PLAN | {"stage": 1}, **VARIANTS[variant])
    config, llama = built["config"], built["llama"]
    changes = VARIANTS[variant]
    assert config.method.name == changes["method"]
    assert config.train.zero_stage == 1
    assert config.train.deepspeed == changes.get("deepspeed", {})
    assert config.train.batch_size == 2 * PLAN["sequences"]
    plain = read_model_config(ModelConfig(config=PLAN["model"], overrides=PLAN["overrides"]))
    assert llama.num_hidden_layers == 4
    assert llama.vocab_size == plain.vocab_size == 8192
    assert llama.tie_word_embeddings is bool(changes.get("overrides", {}).get("tie_word_embeddings", False))
