"""The loss of GPUs as Triton compiles it for A100, H100 and B200, and its launch on a device that does nothing.

Run by ``make test-fakecuda``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from relora_mora.kernels import cross_entropy_, triton_launch
from relora_mora.kernels.triton_loss import _BLOCK, _WARPS, _cross_entropy
from tests.fakecuda.assembled import resources

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def compiled(architecture: int, dtype: torch.dtype, vocabulary: int, stride: int) -> dict[str, bytes | str]:
    """{kind of code: code}, for pointers that are multiples of 16 bytes"""
    pointers = {"logits": f"*{TYPES[dtype]}", "labels": "*i64", "scale": "*fp32", "losses": "*fp32"}
    constants = {"vocabulary": vocabulary, "stride": stride, "ignore": -100, "gradient": True, "block": _BLOCK}
    source = ASTSource(
        _cross_entropy,
        pointers | dict.fromkeys(constants, "constexpr"),
        {(_cross_entropy.arg_names.index(name),): value for name, value in constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))},
    )
    target = GPUTarget("cuda", architecture, 32)
    code: dict[str, bytes | str] = triton.compile(source, target=target, options={"num_warps": _WARPS}).asm
    return code


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_rows_are_read_and_written_in_vectors_and_nothing_spills(
    architecture: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    code = compiled(architecture, dtype, 32000, 32000)
    single = re.compile(r"(ld|st)\.global(?!\S*\.v\d)\S*\.(b16|b32)\b")
    vectors = re.compile(r"(ld|st)\.global\S*\.v4\.b32\b")
    assert {found[1] for found in vectors.finditer(code["ptx"])} == {"ld", "st"}
    # the label's logit, the scale; and twice a loss
    assert len(single.findall(code["ptx"])) == 4
    used = resources(code, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] * 32 * _WARPS * 2 <= 65536  # two rows at the same time on a multiprocessor


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_an_odd_vocabulary_is_read_in_vectors_up_to_its_last_block(architecture: int, tmp_path: Path) -> None:
    code = compiled(architecture, torch.bfloat16, 50257, 50272)
    vectors = re.findall(r"(ld|st)\.global\S*\.v4\.b32\b", code["ptx"])
    assert vectors.count("ld") == 4
    assert vectors.count("st") >= 2
    used = resources(code, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0


def test_a_second_launch_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_compiled", {})
    logits = torch.empty(3, 32000, dtype=torch.bfloat16, device="cuda")
    labels = torch.empty(3, dtype=torch.long, device="cuda")
    scale = torch.empty((), device="cuda")
    for _ in range(2):
        _, gradient = cross_entropy_(logits, labels, ignore=-100, scale=scale, gradient=True)
        assert gradient is logits
    assert len(triton_launch._compiled) == 1
