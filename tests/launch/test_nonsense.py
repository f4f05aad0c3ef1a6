"""Whatever the settings say, a run makes its first step or is refused with one message."""

import math
import os
import re
import traceback
from pathlib import Path
from typing import Any

import pytest

from relora_mora.config.schema import SETTINGS
from tests.tools.each import each
from tests.tools.runs import metrics, run_config, train

pytestmark = [pytest.mark.more, pytest.mark.distributed]

Tree = dict[str, dict[str, Any]]
EXTREMES = [0, -1, 2**63, 0.5, 1e300]
REFUSED: list[Tree] = [  # what the settings alone show is in tests/config
    {"model": {"overrides": {"attention_dropout": 5}}},
    {"model": {"overrides": {"pad_token_id": 99999}}},
    {"model": {"overrides": {"is_encoder_decoder": True}}},
    {"model": {"overrides": {"head_dim": 3}}},
    {"model": {"overrides": {"vocab_size": 2**24, "hidden_size": 2**16, "num_attention_heads": 1}}},
    {"method": {"square_size": 1000000}},
    {"method": {"rank": 100000}},
    {"method": {"name": "relora", "lora_alpha": 1e300}},
    {"model": {"attention": "flash_attention_2"}},  # of a machine without a GPU
]


def outcome(inputs: Path, tokenizer: str, folder: Path, changes: Tree) -> str:
    """``step``, ``refused``, or what went wrong."""
    sections: Tree = {"checkpoint": {"every_steps": 0}, "log": {"every_steps": 1}}
    sections["eval"] = {"at_start": "eval" in changes, "every_steps": 0}
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    try:
        train(run_config(inputs, tokenizer, folder, **sections), stop_after=1)
    except ValueError as error:
        ours = f"{os.sep}relora_mora{os.sep}" in traceback.extract_tb(error.__traceback__)[-1].filename
        return "refused" if ours else traceback.format_exc()
    except Exception:
        return traceback.format_exc()
    lines = metrics(folder)
    made = any("train/skipped_steps" in line or math.isfinite(line.get("train/loss", math.nan)) for line in lines)
    return "step" if made or "log" in changes else f"neither a step nor a message: {lines}"


def outcomes(inputs: Path, tokenizer: str, folder: Path, cases: list[Tree]) -> list[str]:
    """Runs in the pool."""
    return [outcome(inputs, tokenizer, folder / str(number), case) for number, case in enumerate(cases)]


NUMBERS = [name.split(".") for name, field in SETTINGS.items() if re.search("int|float", str(field.annotation))]


@each("section", sorted({section for section, _ in NUMBERS}))
def test_extremes_of_every_number(pools, inputs, tokenizer_path, tmp_path, section):
    cases = [{section: {key: value}} for place, key in NUMBERS if place == section for value in EXTREMES]
    [found] = pools(1)(outcomes, inputs, tokenizer_path, tmp_path, cases)
    wrong = [(case, text) for case, text in zip(cases, found, strict=True) if text not in ("step", "refused")]
    assert not wrong
    assert {"step", "refused"} == set(found)


def test_nonsense_is_refused_and_a_batch_larger_than_the_text_is_not(pools, inputs, tokenizer_path, tmp_path):
    cases = [*REFUSED, {"eval": {"micro_batch_size": 100000000}}]
    [found] = pools(1)(outcomes, inputs, tokenizer_path, tmp_path, cases)
    assert found == [*["refused"] * len(REFUSED), "step"], found
