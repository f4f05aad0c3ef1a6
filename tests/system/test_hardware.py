"""What a machine can do, asked of the device that is meant."""

from pathlib import Path

import pytest
import torch

from relora_mora.system import hardware
from tests.tools.each import each


def test_the_speed_of_a_slow_cpu_is_measured_with_a_small_product_even_if_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one without instructions for bf16 has it: a billion operations per second."""
    monkeypatch.setattr(hardware, "uses_cuda", lambda: True)
    monkeypatch.setattr(hardware.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    speed, source = hardware.peak_flops(bf16=True)
    assert speed > 9e14
    assert "measured" not in source
    seconds: list[float] = []

    def product(a: torch.Tensor) -> float:
        seconds.append(2 * len(a) ** 3 / 1e9)
        return seconds[-1]

    monkeypatch.setattr(hardware, "_seconds_of_product", product)
    speed, source = hardware.peak_flops(bf16=True, on_cpu=True)
    assert speed == pytest.approx(1e9)
    assert "measured on a " in source
    assert sum(seconds) < 1


@each(
    ("groups", "limits", "bound"),
    [
        ("0::/\n", {"memory.max": "4096\n"}, 4096),
        ("0::/job/task\n", {"job/memory.max": "4096\n", "job/task/memory.max": "max\n"}, 4096),
        ("0::/\n", {"memory.max": "max\n"}, None),
        (None, {"memory.max": "4096\n"}, None),
    ],
)
def test_the_memory_of_a_host_is_limited_by_control_groups(
    tmp_path: Path, groups: str | None, limits: dict[str, str], bound: int | None
) -> None:
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if groups is not None:
        (tmp_path / "groups").write_text(groups)
    machine = hardware.host_memory_bytes(tmp_path / "none", tmp_path)
    assert machine > 1 << 28
    assert hardware.host_memory_bytes(tmp_path / "groups", tmp_path) == (bound or machine)
