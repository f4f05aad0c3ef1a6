"""On a machine with a GPU: a run that asks for CPUs trains on them, a rank is bound to the GPU that it sees, and
train.deterministic takes other kernels of torch.

Run by ``make test-fakecuda``.
"""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from relora_mora.distributed.join import bind_device
from relora_mora.system.hardware import compute_deterministically
from relora_mora.system.run_folder import RunFolder, read_json_lines
from tests.fakecuda.watch import Watch
from tests.tools.helpers import arithmetic_put_back
from tests.tools.jobs import Job, write_config
from tests.tools.runs import logged_values, run_config, write_inputs


def test_ds_accelerator_cpu_trains_on_cpus(tokenizer_path: str, tmp_path: Path) -> None:
    """The stand-in computes nothing, so falling losses come from the CPU."""
    assert torch.cuda.is_available()
    config = run_config(write_inputs(tmp_path), tokenizer_path, tmp_path / "run", 2)
    job = Job(write_config(config, tmp_path / "run.yaml"))
    assert job.wait() == 0, job.output
    losses = logged_values(tmp_path / "run")
    assert len(losses) == 10
    assert losses[0] - losses[-1] > 0.05
    [start] = read_json_lines(RunFolder(tmp_path / "run").starts)
    assert torch.cuda.get_device_name() not in json.dumps(start)
    assert "on 2 ranks (CPU)" in job.output


def test_a_rank_is_bound_to_the_gpu_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert bind_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"LOCAL_RANK=3 .*only 2 GPUs"):
        bind_device()


@pytest.mark.parametrize("deterministic,kernel", [(False, "cudnn"), (True, "flash")])
def test_a_deterministic_run_takes_flash_attention(deterministic: bool, kernel: str) -> None:
    """torch chooses by device and switches; the numbers do not matter."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with arithmetic_put_back(), fake, Watch() as watch:
        if deterministic:
            compute_deterministically()
        q, k, v = (torch.empty(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    name = f"_scaled_dot_product_{kernel}_attention"
    assert {launch for launch in watch.launches if "attention" in launch} == {name, f"{name}_backward"}
