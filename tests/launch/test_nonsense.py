"""Whatever the settings say, a run makes its first step or is refused with one message; tried with all kinds of values.

``NONSENSE_EXAMPLES=500`` tries more random values than `make test` does, and all extremes.
"""

from __future__ import annotations

import math
import os
import traceback
from pathlib import Path
from typing import Any

import pytest

from relora_mora.config.schema import Config
from tests.tools.each import each
from tests.tools.runs import metrics, run_config, train

pytestmark = [pytest.mark.more, pytest.mark.distributed]

Tree = dict[str, dict[str, Any]]
EXTREMES = [0, 1, -1, 2**31, 2**63, 2**53, 10**30, 1e-6, 0.5, 1e6, 1e300, 1e9, 1e-300]
FEW = [0, -1, 2**63, 0.5, 1e300]


def outcome(inputs: Path, tokenizer: str, folder: Path, world: int, changes: Tree) -> str:
    """``step``, ``refused``, or what went wrong. Runs on every rank."""
    sections: Tree = {
        "eval": {"at_start": "eval" in changes, "every_steps": 0},
        "checkpoint": {"every_steps": 0},
        "log": {"every_steps": 1},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    try:
        train(run_config(inputs, tokenizer, folder, world, **sections), stop_after=1)
    except ValueError as error:
        ours = f"{os.sep}relora_mora{os.sep}" in traceback.extract_tb(error.__traceback__)[-1].filename
        return "refused" if ours else traceback.format_exc()
    except Exception:
        return traceback.format_exc()
    lines = metrics(folder)
    made = any("train/skipped_steps" in line or math.isfinite(line.get("train/loss", math.nan)) for line in lines)
    return "step" if made or "log" in changes else f"neither a step nor a message: {lines}"


def outcomes(inputs: Path, tokenizer: str, folder: Path, world: int, cases: dict[int, Tree]) -> list[str]:
    return [outcome(inputs, tokenizer, folder / str(number), world, case) for number, case in cases.items()]


def too_large(inputs: Path, tokenizer: str, folder: Path, error: Exception) -> str:
    """What a run says whose first step finds no memory."""
    from relora_mora.train.loop.loop import Trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda *_: (_ for _ in ()).throw(error))
        try:
            train(run_config(inputs, tokenizer, folder))
        except Exception as caught:
            return f"{type(caught).__module__}: {caught}"
    return "trained"


def check(pools: Any, inputs: Path, tokenizer: str, folder: Path, cases: list[Tree], world: int = 1) -> list[str]:
    """No case may fail, and all ranks find the same; returns what came of each."""
    found: list[str] = []
    for begin in range(0, len(cases), 100):  # the pool waits for one call for minutes only
        numbered = dict(list(enumerate(cases))[begin : begin + 100])
        ranks = pools(world)(outcomes, inputs, tokenizer, folder, world, numbered)
        found += [of_rank[0] if len(set(of_rank)) == 1 else str(of_rank) for of_rank in zip(*ranks, strict=True)]
    wrong = [(case, text) for case, text in zip(cases, found, strict=True) if text not in ("step", "refused")]
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(
        f"{case}: {text[-1500:]}" for case, text in wrong[:5]
    )
    return found


def numbers() -> list[tuple[str, str]]:
    """Section and key of every setting that is a number."""
    kinds = {
        (section, key): str(field.annotation)
        for section, model in Config.model_fields.items()
        for key, field in model.annotation.model_fields.items()  # type: ignore[union-attr]
    }
    return [place for place, kind in kinds.items() if "int" in kind or "float" in kind]


@each("section", sorted({section for section, _ in numbers()}))
def test_extremes_of_every_number(pools, inputs, tokenizer_path, tmp_path, section):
    values = EXTREMES if "NONSENSE_EXAMPLES" in os.environ else FEW
    cases = [{section: {key: value}} for place, key in numbers() if place == section for value in values]
    found = check(pools, inputs, tokenizer_path, tmp_path, cases)
    assert {"step", "refused"} == set(found)


@each(
    "changes",
    [
        {"model": {"overrides": {"attention_dropout": 5}}},
        {"model": {"overrides": {"pad_token_id": 99999}}},
        {"model": {"overrides": {"is_encoder_decoder": True}}},
        {"model": {"overrides": {"head_dim": 3}}},
        {"model": {"overrides": {"vocab_size": 2**24, "hidden_size": 2**16, "num_attention_heads": 1}}},
        {"train": {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 0}}}},
        {"train": {"deepspeed": {"zero_optimization": {"allgather_bucket_size": 1}}}},
        {"train": {"deepspeed": {"zero_optimization": {"overlap_comm": "maybe"}}}},
        {"train": {"deepspeed": {"communication_data_type": "fp8"}}},
        {"train": {"deepspeed": {"prescale_gradients": True}}},
        {"train": {"deepspeed": {"flops_profiler": True}}},
        {"train": {"deepspeed": {"comms_logger": {"prof_ops": 3}}}},
        {"train": {"seed": 99999999999999999999999}},
        {"train": {"peer_timeout_seconds": 1e308}},
        {"method": {"square_size": 1000000}},
        {"method": {"rank": 100000}},
        {"method": {"name": "relora", "lora_alpha": 1e300}},
        {"optim": {"eps": 1e-300}},
        {"model": {"attention": "flash_attention_2"}},  # of a machine without a GPU
    ],
)
def test_nonsense_is_refused(pools, inputs, tokenizer_path, tmp_path, changes):
    assert check(pools, inputs, tokenizer_path, tmp_path, [changes]) == ["refused"]


def test_more_sequences_than_there_is_text_for(pools, inputs, tokenizer_path, tmp_path):
    assert check(pools, inputs, tokenizer_path, tmp_path, [{"eval": {"micro_batch_size": 100000000}}]) == ["step"]


@each(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_running_out_of_memory_gives_one_message(pools, inputs, tokenizer_path, tmp_path, error):
    [message] = pools(1)(too_large, inputs, tokenizer_path, tmp_path / "run", error)
    assert message.startswith("relora_mora.")
    assert "train.micro_batch_size: 4 sequences of 32 tokens" in message
    assert "lower it" in message
