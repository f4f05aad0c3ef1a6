"""What is reported if Triton or torch.compile cannot compile at run time."""

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from relora_mora.config.load import ConfigError
from relora_mora.config.schema import ModelConfig
from relora_mora.kernels import cuda, ops
from relora_mora.model.compiling import compiles_here
from relora_mora.system.process import missing_to_compile
from tests.tools.each import each


def with_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, *, compiler: bool, headers: bool) -> None:
    """Simulates a machine with or without a compiler and Python's headers."""
    monkeypatch.setattr(shutil, "which", lambda name: name if compiler else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    if headers:
        (folder / "Python.h").touch()


@each("language,variable,compiler", [("C", "CC", "gcc or clang"), ("C++", "CXX", "g++")])
def test_a_missing_compiler_is_reported(language, variable, compiler, monkeypatch, tmp_path):
    monkeypatch.delenv(variable, raising=False)
    with_compiler(monkeypatch, tmp_path, compiler=False, headers=True)
    message = f"no {language} compiler ({compiler}) was found; install one, or name it in {variable}"
    assert missing_to_compile(language) == message
    monkeypatch.setenv(variable, "mine")
    assert "compiler (mine)" in missing_to_compile(language)
    with_compiler(monkeypatch, tmp_path, compiler=True, headers=True)
    assert missing_to_compile(language) is None


def test_layers_are_compiled_if_there_is_a_compiler(monkeypatch, tmp_path, caplog):
    with_compiler(monkeypatch, tmp_path, compiler=True, headers=False)
    auto, required = ModelConfig(config="none"), ModelConfig(config="none", compile=True)
    assert not compiles_here(auto, 1, on_gpu=True)
    assert "no Python.h" in caplog.text
    assert "python3-dev" in caplog.text
    with pytest.raises(ConfigError, match=r"no Python\.h; .*, or leave it at auto"):
        compiles_here(required, 1, on_gpu=True)
    with_compiler(monkeypatch, tmp_path, compiler=True, headers=True)
    assert compiles_here(auto, 1, on_gpu=True)
    assert compiles_here(required, 1, on_gpu=False)
    assert not compiles_here(auto, 3, on_gpu=True)
    assert not compiles_here(auto, 1, on_gpu=False)


@each(
    "version,triton,compiles,capability,description",
    [
        (None, True, True, (9, 0), "torch: torch is not built for CUDA"),
        ("13.0", False, True, (9, 0), "torch: Triton is not installed"),
        ("13.0", True, False, (9, 0), "torch: Triton compiles at run time, and "),
        ("13.0", True, True, (7, 5), "torch: Triton needs a compute capability of 8.0"),
        ("13.0", True, True, (8, 0), "Triton"),
    ],
)
def test_the_gpus_kernels_are_described(version, triton, compiles, capability, description, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with_compiler(monkeypatch, tmp_path, compiler=True, headers=compiles)
    cuda.obstacle.cache_clear()
    try:
        assert ops.describe("cuda").startswith(description)
        assert ("cuda" in ops.kernels_here()) == (version is not None and triton and compiles)
    finally:
        cuda.obstacle.cache_clear()
