"""What a machine can do, asked of the device that is meant."""

from __future__ import annotations

import pytest

from relora_mora.system import hardware


def test_the_speed_of_a_cpu_is_measured_there_also_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "uses_cuda", lambda: True)
    monkeypatch.setattr(hardware.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    of_gpu, source = hardware.peak_flops(bf16=True)
    assert of_gpu > 9e14 and "measured" not in source
    of_cpu, source = hardware.peak_flops(bf16=True, on_cpu=True)
    assert 0 < of_cpu < of_gpu and "measured" in source
